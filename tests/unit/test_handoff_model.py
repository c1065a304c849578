"""Both machines, a network, journals, a registry and crashes, explored until nothing new comes.

What must hold in each world stands in `World.check`, what an end is in `World.ended`. That the exploration would notice
a flaw is shown by damaging the tables: each command taken out, each of the classical mistakes put in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from migrate.handoff import commands as do
from migrate.handoff import messages as say
from migrate.handoff.destination import DestinationEvent, DestinationHandoff, DestinationState
from migrate.handoff.machine import Kind, Machine, Table
from migrate.handoff.source import SourceEvent, SourceHandoff, SourceState
from tests.handoff_moves import Result, explore
from tests.handoff_world import Faults, World

S, D = SourceState, DestinationState
ON, AT = SourceEvent, DestinationEvent
KINDS: tuple[type[Machine], ...] = (SourceHandoff, DestinationHandoff)


class Setting(NamedTuple):
    """Where an exploration begins."""

    faults: Faults
    connections: int = 1
    shared: bool = False
    dead: str = ""

    def world(self) -> World:
        return World(self.connections, self.faults, shared=self.shared, dead=self.dead)

    def __str__(self) -> str:
        faults = [f"{count} {name}" for name, count in self.faults._asdict().items() if count]
        where = [f"{self.connections} connections"] * (self.connections > 1) + ["registry"] * self.shared
        return ", ".join([*faults, *where, *([f"{self.dead} gone for good"] if self.dead else [])]) or "no fault"


def both(faults: Faults, connections: int = 1) -> list[Setting]:
    return [Setting(faults, connections), Setting(faults, connections, shared=True)]


SETTINGS = [
    *both(Faults()),
    *both(Faults(refusals=1)),
    *both(Faults(refusals=1), 2),
    *both(Faults(cuts=1)),
    *both(Faults(source_crashes=1)),
    *both(Faults(destination_crashes=1)),
    *both(Faults(source_failures=1)),
    *both(Faults(destination_failures=1)),
    *both(Faults(cancels=1, early=1)),
    *both(Faults(kept=2)),
    *both(Faults(kept=1, refusals=1), 2),
    *both(Faults(kept=1, early=1, cuts=1)),
    *both(Faults(kept=1, destination_crashes=1)),
    *both(Faults(kept=1, source_crashes=1)),
    *both(Faults(early=2)),
    Setting(Faults(outages=1, early=1), shared=True),
    Setting(Faults(destination_crashes=1), dead="destination"),
    Setting(Faults(destination_crashes=1), dead="destination", shared=True),
    *both(Faults(destination_crashes=1, closes=1)),
    *both(Faults(destination_crashes=1, cuts=1, closes=1)),
    Setting(Faults(destination_crashes=1, early=1, closes=1)),
    Setting(Faults(source_crashes=1), dead="source"),
    Setting(Faults(source_crashes=1, destination_crashes=1), dead="source"),
    Setting(Faults(source_crashes=1), dead="source", shared=True),
    *[setting._replace(dead="source") for setting in both(Faults(source_crashes=1, returns=1))],
    Setting(Faults(source_crashes=1, refusals=1, returns=1), 2, dead="source"),
    *both(Faults(early=1, source_failures=1)),
    Setting(Faults(early=1, destination_failures=1)),
    *both(Faults(source_failures=1, refusals=1), 2),
    Setting(Faults(destination_failures=1, refusals=1), 2),
    Setting(Faults(destination_crashes=1, refusals=1), 2, dead="destination"),
    *both(Faults(cancels=1, destination_crashes=1)),
    *both(Faults(source_crashes=1, refusals=1), 2),
    *both(Faults(destination_crashes=1, refusals=1), 2),
    *both(Faults(source_crashes=1, destination_crashes=1)),
    Setting(Faults(destination_crashes=1, early=1, outages=1), shared=True),
    Setting(Faults(destination_crashes=1, early=1, refusals=1), 2, shared=True),
    *both(Faults(source_crashes=1, early=1, cuts=1)),
    *both(Faults(destination_crashes=1, early=1, cuts=1)),
    *both(Faults(source_crashes=1, destination_crashes=1), 2),
    Setting(Faults(source_crashes=1, source_failures=1, early=1), shared=True),
]


@functools.cache
def explored(setting: Setting) -> tuple[Result, frozenset[str]]:
    """What comes of it with the tables as they are, and the transitions on the way."""
    world = setting.world()
    world.points = set()
    return explore(world), frozenset(world.points)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_whatever_happens_there_is_one_owner_and_an_end(setting: Setting) -> None:
    result, _ = explored(setting)
    assert not result.wrong, "\n".join([result.wrong, *result.path])


@pytest.mark.parametrize("setting", both(Faults(cuts=1)), ids=str)
def test_carrying_out_at_once_what_nobody_can_come_between_hides_nothing(setting: Setting) -> None:
    result = explore(setting.world(), stepwise=True)
    assert not result.wrong, "\n".join([result.wrong, *result.path])


def test_every_transition_is_explored() -> None:
    seen = frozenset[str]().union(*(explored(setting)[1] for setting in SETTINGS))
    named = {f"{kind.role}:{s.name}:{e.name}" for kind in KINDS for s, row in kind.TRANSITIONS.items() for e in row}
    assert named - seen == set()


# ---- damaged tables


# Commands whose loss no exploration can notice, and why they stand in the tables all the same.
SPARE: dict[str, set[str]] = {
    "it saves the other side waiting for its own timer": {
        "source:PREPARING:TIMEOUT:Abort",
        "source:FREEZING:FROZEN_NONE:Abort",
        "source:OFFERED:CANCEL:Query",
        "destination:CHECKING:CHECKED:StartTimer",
        "destination:CHECKING:CHECKED_NONE:Prepared",
        "destination:PREPARED:QUERY:Discarded",
        "destination:PREPARED:FAILED:Prepared",
        "destination:COMMITTING:WON:Committed",
        "destination:ACTIVE:QUERY:Committed",
        "destination:ACTIVE:RELEASED:Activated",
    },
    "it is done sooner: a timer, or a later step, would do it": {
        "source:FREEZING:FROZEN:Thaw",
        "source:OFFERED:RESTARTED:Thaw",
        "source:OFFERED:RESTARTED:Ask",
        "source:CLAIMING:WON:Ask",
        "source:SETTLING:RESTARTED:Ask",
        "source:RELEASED:RESTARTED:SendKept",
        "destination:PREPARED:OFFER:Discard",
        "destination:SERVING:RELEASED:Activated",
    },
    "the model has one epoch, and no second handoff of the same connection": {
        "source:NEW:START:WriteJournal",
        "source:CLAIMING:WON:WriteJournal",
        "destination:ABSENT:OFFER:Forget",
        "destination:CHECKING:CHECKED:WriteJournal",
    },
    "in the model a hold needs nobody to listen to it, what it keeps is not told apart, and steering takes no time": {
        "source:OFFERED:RESTARTED:Rehold",
        "source:RELEASED:RESTARTED:Rehold",
        "source:LINGERING:TIMEOUT:SendKept",
        "destination:COMMITTING:RESTARTED:Rehold",
        "destination:RESTORING:KEPT:Replay",
        "destination:COMMITTING:KEPT:Replay",
        "destination:ACTIVE:KEPT:Replay",
        "destination:ACTIVE:RELEASED:Replay",
        "destination:SERVING:KEPT:Replay",
        "destination:SERVING:RELEASED:Replay",
        "destination:ACTIVE:RESTARTED:Steer",
    },
    "the other host is gone: nobody is left to contradict": {
        "source:RELEASED:RESOLVED_THERE:Report",
    },
}


def damaged(kind: type[Machine], state: Any, event: Any, target: Any, commands: tuple[Kind, ...]) -> Table:
    """The table with one entry replaced."""
    table = kind.TRANSITIONS
    return {**table, state: {**table[state], event: (target, commands)}}


def flaw(kind: type[Machine], table: Table) -> str:
    """What is found wrong with that table in place of the right one, where an exploration comes through the change."""
    right = kind.TRANSITIONS
    changed = {
        f"{kind.role}:{state.name}:{event.name}"
        for state, row in right.items()
        for event, entry in row.items()
        if table[state][event] != entry
    }
    visits = [(explored(setting)[0].worlds, setting) for setting in SETTINGS if changed & explored(setting)[1]]
    kind.TRANSITIONS = table
    try:
        return next((wrong for _, setting in sorted(visits) if (wrong := explore(setting.world()).wrong)), "")
    finally:
        kind.TRANSITIONS = right


def losses() -> Iterator[tuple[str, type[Machine], Table]]:
    """Every table with one command missing. What stands once in the source, for several entries, is damaged in all."""
    for kind in KINDS:
        done = set()
        for state, row in kind.TRANSITIONS.items():
            for event, entry in row.items():
                if id(entry) in done:
                    continue
                done.add(id(entry))
                target, commands = entry
                for i, command in enumerate(commands):
                    less = target, (*commands[:i], *commands[i + 1 :])
                    table = {
                        s: {e: less if each is entry else each for e, each in r.items()}
                        for s, r in kind.TRANSITIONS.items()
                    }
                    yield f"{kind.role}:{state.name}:{event.name}:{command.__name__}", kind, table


def test_each_command_of_the_tables_is_missed() -> None:
    spare = {name for names in SPARE.values() for name in names}
    unnoticed = [name for name, kind, table in losses() if name not in spare and not flaw(kind, table)]
    assert unnoticed == []


def test_what_is_spared_is_in_the_tables() -> None:
    names = [name for names in SPARE.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) <= {name for name, _, _ in losses()}


# The classical mistakes, and what comes of each.
MISTAKES = {
    "the source thaws when nobody answers": (
        "two owners",
        damaged(SourceHandoff, S.OFFERED, ON.TIMEOUT, S.STAYED, (do.Thaw, do.Forget, do.Report)),
    ),
    "the source thaws when the stream breaks": (
        "two owners",
        damaged(SourceHandoff, S.OFFERED, ON.LINK_LOST, S.STAYED, (do.Thaw, do.Forget, do.Report)),
    ),
    "the source thaws after a restart": (
        "two owners",
        damaged(SourceHandoff, S.OFFERED, ON.RESTARTED, S.STAYED, (do.Thaw, do.Forget, do.Report)),
    ),
    "the source thaws when the registry does not answer": (
        "two owners",
        damaged(SourceHandoff, S.CLAIMING, ON.REGISTRY_FAILED, S.STAYED, (do.Thaw, do.Forget, do.Report)),
    ),
    "the source offers before it writes": (
        "two owners",
        damaged(SourceHandoff, S.FREEZING, ON.FROZEN, S.OFFERED, (say.Offer, do.WriteJournal, do.Thaw, do.StartTimer)),
    ),
    "the source releases before it writes": (
        "reset",
        damaged(
            SourceHandoff,
            S.OFFERED,
            ON.COMMITTED,
            S.RELEASED,
            (do.Release, do.SendKept, do.WriteJournal, do.Steer, do.Thaw, do.StartTimer),
        ),
    ),
    "the source forgets its claim before the destination has heard": (
        "two owners",
        damaged(SourceHandoff, S.CLAIMING, ON.WON, S.STAYED, (do.Thaw, do.Unclaim, do.Forget, do.Report)),
    ),
    "the source lifts its hold as soon as it has released": (
        "reset",
        damaged(
            SourceHandoff,
            S.OFFERED,
            ON.COMMITTED,
            S.RELEASED,
            (do.WriteJournal, do.Release, do.SendKept, do.LiftHold, do.Steer, do.Thaw, do.StartTimer),
        ),
    ),
    "the destination commits without a claim": (
        "two owners",
        damaged(
            DestinationHandoff,
            D.RESTORING,
            AT.RESTORED,
            D.ACTIVE,
            (do.WriteJournal, do.Discard, do.Adopt, do.Activate, say.Committed, do.Steer, do.WriteJournal, do.LiftHold),
        ),
    ),
    "the destination lets them run before it has claimed": (
        "two owners",
        damaged(
            DestinationHandoff,
            D.RESTORING,
            AT.RESTORED,
            D.COMMITTING,
            (do.WriteJournal, do.Adopt, do.Activate, do.Claim),
        ),
    ),
    "the destination claims before it writes": (
        "no owner",
        damaged(DestinationHandoff, D.RESTORING, AT.RESTORED, D.COMMITTING, (do.Claim, do.WriteJournal)),
    ),
    "the destination answers while it claims": (
        "two owners",
        damaged(DestinationHandoff, D.COMMITTING, AT.QUERY, D.COMMITTING, (say.Discarded,)),
    ),
    "the destination discards what it could not hear it had claimed": (
        "no end",
        damaged(
            DestinationHandoff, D.COMMITTING, AT.REGISTRY_FAILED, D.DISCARDED, (do.Discard, do.Forget, say.Discarded)
        ),
    ),
    "the destination says that it discards and goes on": (
        "two owners",
        damaged(DestinationHandoff, D.RESTORING, AT.QUERY, D.RESTORING, (say.Discarded,)),
    ),
    "the destination discards what it committed": (
        "two owners",
        damaged(DestinationHandoff, D.ACTIVE, AT.LINK_LOST, D.DISCARDED, (do.Discard, do.Forget)),
    ),
    "the destination discards what it committed when it restarts": (
        "two owners",
        damaged(DestinationHandoff, D.COMMITTING, AT.RESTARTED, D.DISCARDED, (do.Discard, do.Forget)),
    ),
    "the destination disowns what an operator has settled": (
        "two owners",
        damaged(DestinationHandoff, D.ABSENT, AT.QUERY_AGAIN, D.DISCARDED, (do.Forget, say.Discarded)),
    ),
    "the destination says that they run before it has forgotten": (
        "no end",
        damaged(
            DestinationHandoff,
            D.ACTIVE,
            AT.RELEASED,
            D.SERVING,
            (do.Replay, say.Activated, do.Unclaim, do.Forget, do.StartTimer),
        ),
    ),
    "the destination lifts its hold before they can speak": (
        "silent socket without a hold",
        damaged(
            DestinationHandoff,
            D.COMMITTING,
            AT.WON,
            D.ACTIVE,
            (
                do.Discard,
                do.Rebuild,
                do.Adopt,
                do.LiftHold,
                do.Activate,
                say.Committed,
                do.Steer,
                do.WriteJournal,
            ),
        ),
    ),
    "the destination writes that they run before they do": (
        "reset",
        damaged(
            DestinationHandoff,
            D.COMMITTING,
            AT.WON,
            D.ACTIVE,
            (
                do.Discard,
                do.Rebuild,
                do.Adopt,
                do.WriteJournal,
                do.Activate,
                say.Committed,
                do.Steer,
                do.LiftHold,
            ),
        ),
    ),
    "the destination lifts its hold before it writes that they run": (
        "a connection that came to its end is rebuilt",
        damaged(
            DestinationHandoff,
            D.COMMITTING,
            AT.WON,
            D.ACTIVE,
            (
                do.Discard,
                do.Rebuild,
                do.Adopt,
                do.Activate,
                say.Committed,
                do.Steer,
                do.LiftHold,
                do.WriteJournal,
            ),
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_classical_mistakes_are_noticed(mistake: str) -> None:
    wrong, table = MISTAKES[mistake]
    kind = SourceHandoff if S.NEW in table else DestinationHandoff
    assert wrong in flaw(kind, table)
