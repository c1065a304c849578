"""Both tables as tables: complete, closed, and nothing happens that they do not say."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import pytest

from migrate.errors import Error, RemoteError, UsageError
from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.machine import Machine, Times, crash_points
from migrate.handoff.source import SourceHandoff
from tests.handoff_play import BATCH, A, B

KINDS = (SourceHandoff, DestinationHandoff)
ALL = {A.id: "no", B.id: "no"}
BOTH = frozenset(ALL)
RECORDS = {A.id: b"a", B.id: b"b"}
EVENTS: tuple[on.Event, ...] = (
    say.Prepare(batch=BATCH, connections=(A, B)),
    say.Offer(batch=BATCH, connections=(A, B), records=RECORDS),
    say.Abort(batch=BATCH),
    say.Query(batch=BATCH, connections=(A, B)),
    say.Kept(batch=BATCH, kept=()),
    say.Released(batch=BATCH),
    say.Prepared(batch=BATCH, journal="", refused={}),
    say.Prepared(batch=BATCH, journal="", refused=ALL),
    say.Committed(batch=BATCH, journal="", refused={}),
    say.Discarded(batch=BATCH, journal="", refused={}),
    say.Activated(batch=BATCH, journal=""),
    on.Start(),
    on.Restarted(),
    on.Checked({}),
    on.Checked(ALL),
    on.Frozen(RECORDS, {}),
    on.Frozen({}, ALL),
    on.Restored({}),
    on.Restored(ALL),
    on.Claimed(frozenset()),
    on.Claimed(BOTH),
    on.RegistryFailed(),
    on.Failed("it failed"),
    on.Timeout(0),
    on.LinkLost(),
    on.Cancel(),
    on.Resolved(True),
    on.Resolved(False),
)
# Steps with a fallible command whose failure needs no event: the row is behind, and a restart from it ends the same.
BEHIND = {
    "destination": {"ACTIVE"},
    "source": {"SETTLING"},
}


def machine_in(kind: type[Machine], state: enum.Enum, *, exhausted: bool = False) -> Machine:
    row = do.Row(
        batch=BATCH, role=kind.role, state=state.name, peer="", connections=(A, B), refused={}, shared=exhausted
    )
    return kind.recover(row, Times(asks=0 if exhausted else 9))


def pairs() -> Iterator[tuple[Machine, on.Event]]:
    for kind in KINDS:
        for state in kind.TRANSITIONS:
            yield from ((machine_in(kind, state), event) for event in EVENTS)
            if state.name == "ABSENT":
                machine = DestinationHandoff(BATCH, "", others=frozenset())
                yield machine, say.Query(batch=BATCH, connections=(A, B))
            if state.name == "DOUBT":
                yield machine_in(kind, state, exhausted=True), on.Timeout(0)


def classified(machine: Machine, event: on.Event) -> enum.Enum | None:
    try:
        return machine._classify(event)
    except (RemoteError, RuntimeError, UsageError):
        return None  # no event of this side at all


def legal(machine: Machine, event: on.Event) -> bool:
    return classified(machine, event) in machine.TRANSITIONS[machine.state]


def test_each_pair_of_the_tables_does_what_it_says() -> None:
    made = set()
    for machine, event in pairs():
        if not legal(machine, event):
            continue
        what = classified(machine, event)
        assert what is not None
        state, kinds = machine.TRANSITIONS[machine.state][what]
        step = machine.receive(event)
        assert machine.state is state
        allowed = iter(kinds)
        for point, _ in step.points():
            name = point.rpartition(":")[2]
            assert any(kind.__name__ == name for kind in allowed), f"{point} is not in the table, or out of order"
        made.add(step.point)
    named = {f"{kind.role}:{s.name}:{e.name}" for kind in KINDS for s, row in kind.TRANSITIONS.items() for e in row}
    assert made == named


def test_each_other_pair_raises_and_changes_nothing() -> None:
    tried = 0
    for machine, event in pairs():
        if legal(machine, event):
            continue
        before = dict(machine.__dict__)
        fault = (RemoteError,) if isinstance(event, say.Message) else (RuntimeError, UsageError)
        with pytest.raises(fault) as caught:
            machine.receive(event)
        assert isinstance(caught.value, UsageError) == isinstance(event, on.Cancel | on.Resolved)
        assert machine.__dict__ == before
        tried += 1
    assert tried > 400


def test_a_broken_message_changes_nothing() -> None:
    for kind in KINDS:
        for state in kind.TRANSITIONS:
            machine = machine_in(kind, state)
            before = dict(machine.__dict__)
            for event in (
                say.Offer(batch=BATCH, connections=(A,), records={}),
                say.Prepare(batch=BATCH, connections=()),
                say.Query(batch=b"other", connections=(A,)),
            ):
                with pytest.raises(RemoteError):
                    machine.receive(event)
            assert machine.__dict__ == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_reached_and_left(kind: type[Machine]) -> None:
    states: list[enum.Enum] = list(kind.TRANSITIONS)
    assert set(states) == {*type(states[0]).__members__.values()}, "a state without a row"
    reached, rest = {states[0]}, [states[0]]
    while rest:
        for state, _ in kind.TRANSITIONS[rest.pop()].values():
            if state not in reached:
                reached.add(state)
                rest.append(state)
    assert reached == set(states)
    events = {event for row in kind.TRANSITIONS.values() for event in row}
    assert events == {*type(next(iter(events))).__members__.values()}, "an event that can never happen"
    ends = {state.name for state in states if not kind.TRANSITIONS[state]}
    assert ends == ({"MOVED", "STAYED"} if kind is SourceHandoff else {"DONE", "DISCARDED"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_of_a_table_can_be_made(kind: type[Machine]) -> None:
    used = {command for row in kind.TRANSITIONS.values() for _, commands in row.values() for command in commands}
    assert used == set(kind.BUILDERS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_fail_is_expected_to(kind: type[Machine]) -> None:
    for state, row in kind.TRANSITIONS.items():
        for event, (target, commands) in row.items():
            expected = any(each.name == "FAILED" for each in kind.TRANSITIONS[target])
            if set(commands) & set(do.FALLIBLE) and not expected:
                assert target.name in BEHIND[kind.role], f"{state.name} {event.name}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_journal_can_be_gone_on_from(kind: type[Machine]) -> None:
    written = {
        target.name
        for row in kind.TRANSITIONS.values()
        for target, commands in row.values()
        if do.WriteJournal in commands
    }
    resumed = {state.name for state, row in kind.TRANSITIONS.items() if any(e.name == "RESTARTED" for e in row)}
    assert written == resumed


def test_crash_points_have_names_of_their_own() -> None:
    names = [name for kind in KINDS for name in crash_points(kind)]
    assert len(names) == len(set(names))
    assert {"source:OFFERED:COMMITTED:Release", "source:OFFERED:COMMITTED"} <= set(names)
    assert {"destination:RESTORING:RESTORED:Claim", "source:FREEZING:FROZEN:Offer"} <= set(names)


def test_errors_of_a_breach_name_nobody_s_data() -> None:
    machine = machine_in(DestinationHandoff, next(iter(DestinationHandoff.TRANSITIONS)))
    with pytest.raises(Error) as caught:
        machine.receive(say.Committed(batch=BATCH, journal="secret", refused={b"id": "secret"}))
    assert "secret" not in str(caught.value)
