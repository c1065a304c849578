"""The source's machine: scripts of events in and commands out."""

from __future__ import annotations

import msgspec
import pytest

from migrate.errors import RemoteError, UsageError
from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.ids import Connection
from migrate.handoff.machine import Times
from migrate.handoff.source import SourceHandoff
from tests.handoff_play import BATCH, A, B, C, Play

TIMES = Times(prepare=1, patience=2, answer=3, ask=4, asks=2, linger=5)
PREPARED = say.Prepared(batch=BATCH, journal="theirs", refused={})
COMMITTED = say.Committed(batch=BATCH, journal="theirs", refused={})
DISCARDED = say.Discarded(batch=BATCH, journal="theirs", refused={})
ACTIVATED = say.Activated(batch=BATCH, journal="theirs")
QUERY = say.Query(batch=BATCH, connections=(A, B))
RELEASING = (do.WriteJournal, do.Release, do.SendKept, do.Steer, do.StartTimer)


def begun() -> Play:
    machine = SourceHandoff(BATCH, "b.example:7070", (A, B), steer="forward", registry="registry", times=TIMES)
    play = Play(machine)
    return play.gets(on.Start(), "PREPARING", do.WriteJournal, say.Prepare, do.StartTimer)


def frozen() -> Play:
    play = begun().gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold((A, B)), do.Freeze((A, B)))
    return play.gets(on.Frozen({A.id: b"a", B.id: b"b"}, {}), "OFFERED", do.WriteJournal, say.Offer, do.StartTimer)


def doubting(*, shared: bool) -> Play:
    play = begun()
    answer = say.Prepared(batch=BATCH, journal="theirs", refused={}, shared=shared)
    play.gets(answer, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    play.gets(on.Frozen({A.id: b"a", B.id: b"b"}, {}), "OFFERED", do.WriteJournal, say.Offer, do.StartTimer)
    return play.gets(on.LinkLost(), "DOUBT", do.Ask(QUERY), do.StartTimer)


def test_the_usual_run() -> None:
    play = begun()
    assert play.said() == say.Prepare(batch=BATCH, connections=(A, B), steer="forward", registry="registry", patience=2)
    assert play.wants(do.StartTimer) == do.StartTimer(1, play.machine.serial)
    play.gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold((A, B)), do.Freeze((A, B)))
    play.gets(on.Frozen({A.id: b"a", B.id: b"b"}, {}), "OFFERED", do.WriteJournal, say.Offer, do.StartTimer)
    assert play.said() == say.Offer(batch=BATCH, connections=(A, B), records={A.id: b"a", B.id: b"b"})
    play.gets(
        COMMITTED,
        "RELEASED",
        do.WriteJournal,
        do.Release((A, B)),
        do.SendKept((A, B), BATCH, True),
        do.Steer((A, B), "forward"),
        do.StartTimer,
    )
    moved = do.Forget((A, B), BATCH, frozenset({A.id, B.id}))
    play.gets(ACTIVATED, "LINGERING", moved, do.Report("moved", {}), do.StartTimer(5, play.machine.serial + 2))
    play.time_out("MOVED", do.SendKept((A, B), BATCH, False), do.LiftHold((A, B)))
    assert play.machine.over


def test_the_journal_says_where_it_stands() -> None:
    play = frozen()
    row = do.Row(
        batch=BATCH,
        role="source",
        state="OFFERED",
        peer="b.example:7070",
        connections=(A, B),
        refused={},
        steer="forward",
        shared=False,
        journal="theirs",
    )
    assert play.wants(do.WriteJournal) == do.WriteJournal(row)


def test_the_refused_drop_out_one_by_one_and_the_rest_moves() -> None:
    play = Play(SourceHandoff(BATCH, "b", (A, B, C), times=TIMES))
    play.gets(on.Start(), "PREPARING", do.WriteJournal, say.Prepare, do.StartTimer)
    unready = say.Prepared(batch=BATCH, journal="theirs", refused={A.id: "no adopter"})
    play.gets(unready, "FREEZING", do.WriteJournal, do.Hold((B, C)), do.Freeze((B, C)))
    half = on.Frozen({C.id: b"c"}, {B.id: "it closed"})
    play.gets(half, "OFFERED", do.WriteJournal, say.Offer, do.Thaw((B,)), do.StartTimer)
    assert play.said() == say.Offer(batch=BATCH, connections=(C,), records={C.id: b"c"})
    play.gets(COMMITTED, "RELEASED", do.WriteJournal, do.Release((C,)), do.SendKept, do.Steer, do.Thaw, do.StartTimer)
    play.gets(ACTIVATED, "LINGERING", do.Forget, do.Report, do.StartTimer)
    assert play.wants(do.Report) == do.Report("moved", {A.id: "no adopter", B.id: "it closed"})


def test_what_the_destination_could_not_rebuild_is_thawed() -> None:
    some = say.Committed(batch=BATCH, journal="theirs", refused={A.id: "out of descriptors", b"stranger": "?"})
    play = frozen().gets(some, "RELEASED", *RELEASING[:4], do.Thaw((A,)), do.StartTimer)
    assert play.wants(do.Release) == do.Release((B,))
    assert play.machine.refused == {A.id: "out of descriptors"}


def test_freezing_may_leave_one_out_without_a_word() -> None:
    play = begun().gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    play.gets(on.Frozen({A.id: b"a"}, {}), "OFFERED", do.WriteJournal, say.Offer, do.Thaw((B,)), do.StartTimer)
    assert play.machine.refused == {B.id: "it could not be frozen"}


@pytest.mark.parametrize("answer", [say.Prepared, say.Committed])
def test_a_destination_that_refuses_each_takes_none(answer: type[say.Prepared] | type[say.Committed]) -> None:
    none = answer(batch=BATCH, journal="theirs", refused={A.id: "no", B.id: "no"})
    if answer is say.Prepared:
        begun().gets(none, "STAYED", do.Forget((A, B), BATCH, frozenset()), do.Report)
    else:
        frozen().gets(none, "STAYED", do.Thaw((A, B)), do.Forget, do.Report)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (on.LinkLost(), "the stream to the destination broke"),
        (on.Cancel(), "the move was stopped"),
        (on.Failed("the disk is full"), "the disk is full"),
    ],
)
def test_before_the_offer_it_may_give_up(event: on.Event, why: str) -> None:
    reported = do.Report("stayed", {A.id: why, B.id: why})
    begun().gets(event, "STAYED", say.Abort, do.Forget, reported)
    play = begun().gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    play.gets(event, "STAYED", say.Abort, do.Thaw((A, B)), do.Forget, reported)


def test_a_destination_that_does_not_answer_in_time_is_not_waited_for() -> None:
    begun().time_out("STAYED", say.Abort, do.Forget, do.Report)


def test_none_could_be_frozen() -> None:
    play = begun().gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    play.gets(on.Frozen({}, {A.id: "x", B.id: "y"}), "STAYED", say.Abort, do.Thaw((A, B)), do.Forget, do.Report)
    assert play.wants(do.Report) == do.Report("stayed", {A.id: "x", B.id: "y"})


# ---- after the offer


@pytest.mark.parametrize("event", [on.LinkLost(), on.Failed("the disk is full")])
def test_after_the_offer_it_asks(event: on.Event) -> None:
    play = frozen().gets(event, "DOUBT", do.Ask(QUERY), do.StartTimer)
    play.time_out("DOUBT", do.Ask(QUERY), do.StartTimer)
    play.gets(on.LinkLost(), "DOUBT").gets(on.Cancel(), "DOUBT")
    play.gets(DISCARDED, "STAYED", do.Thaw((A, B)), do.Forget, do.Report)
    assert set(play.machine.refused.values()) == {"the destination discarded it"}


def test_a_slow_destination_is_asked_to_decide() -> None:
    frozen().time_out("DOUBT", do.Ask(QUERY), do.StartTimer).gets(COMMITTED, "RELEASED", *RELEASING)


def test_stopping_after_the_offer_is_the_destination_s_word() -> None:
    play = frozen().gets(on.Cancel(), "OFFERED", do.Send(QUERY))
    play.gets(COMMITTED, "RELEASED", *RELEASING).gets(on.Cancel(), "RELEASED")


def test_without_a_shared_registry_it_asks_for_ever() -> None:
    play = doubting(shared=False)
    for _ in range(20):
        play.time_out("DOUBT", do.Ask(QUERY), do.StartTimer)


def test_asked_often_enough_the_registry_decides() -> None:
    play = doubting(shared=True).time_out("DOUBT", do.Ask, do.StartTimer)
    play.time_out("CLAIMING", do.Claim((A, B), True))
    play.gets(COMMITTED, "CLAIMING").gets(DISCARDED, "CLAIMING").gets(on.Cancel(), "CLAIMING")
    play.gets(on.RegistryFailed(), "DOUBT", do.Ask, do.StartTimer)
    play.time_out("CLAIMING", do.Claim((A, B), True))


def test_the_registry_gave_it_back() -> None:
    play = doubting(shared=True).time_out("DOUBT", do.Ask, do.StartTimer).time_out("CLAIMING", do.Claim)
    play.gets(
        on.Claimed(frozenset()),
        "SETTLING",
        do.Thaw((A, B)),
        do.WriteJournal,
        do.Report,
        do.Ask(QUERY),
        do.StartTimer,
    )
    play.time_out("SETTLING", do.Ask(QUERY), do.StartTimer)
    play.gets(DISCARDED, "STAYED", do.Unclaim((A, B)), do.Forget((A, B), BATCH, frozenset()))


def test_the_registry_had_given_some_away() -> None:
    play = doubting(shared=True).time_out("DOUBT", do.Ask, do.StartTimer).time_out("CLAIMING", do.Claim)
    play.gets(on.Claimed(frozenset({A.id})), "RELEASED", *RELEASING[:4], do.Thaw((B,)), do.StartTimer)
    assert play.wants(do.Release) == do.Release((A,))


def test_an_operator_decides_where_nobody_else_can() -> None:
    doubting(shared=False).gets(on.Resolved(False), "STAYED", do.Thaw((A, B)), do.Forget, do.Report)
    play = doubting(shared=False).gets(on.Resolved(True), "RELEASED", *RELEASING)
    play.gets(on.Resolved(True), "MOVED", do.LiftHold((A, B)), do.Forget, do.Report)


# ---- after the release


def test_it_says_released_until_it_is_heard() -> None:
    play = frozen().gets(COMMITTED, "RELEASED", *RELEASING).gets(COMMITTED, "RELEASED")
    play.gets(on.LinkLost(), "RELEASED").time_out("RELEASED", *RELEASING)
    play.gets(ACTIVATED, "LINGERING", do.Forget, do.Report, do.StartTimer).gets(ACTIVATED, "LINGERING")
    play.gets(on.LinkLost(), "LINGERING").time_out("MOVED", do.SendKept, do.LiftHold)


def test_what_it_cannot_write_it_does_not_say() -> None:
    play = frozen().gets(COMMITTED, "RELEASED", *RELEASING)
    play.gets(on.Failed("the disk is full"), "RELEASED", do.StartTimer).time_out("RELEASED", *RELEASING)


# ---- after a restart


@pytest.mark.parametrize(
    ("state", "then", "commands"),
    [
        ("PREPARING", "STAYED", (say.Abort, do.Forget, do.Report)),
        ("FREEZING", "STAYED", (do.Thaw((A, B)), do.Unclaim, do.Forget, do.Report)),
        ("OFFERED", "DOUBT", (do.Thaw((A,)), do.Rehold((B,)), do.Ask(QUERY), do.StartTimer)),
        ("SETTLING", "SETTLING", (do.Ask(QUERY), do.StartTimer)),
        (
            "RELEASED",
            "RELEASED",
            (do.Rehold, do.Release((B,)), do.SendKept, do.Steer((B,), "vip"), do.Thaw((A,)), do.StartTimer),
        ),
    ],
)
def test_it_goes_on_from_its_row(state: str, then: str, commands: tuple[do.Command, ...]) -> None:
    row = do.Row(
        batch=BATCH,
        role="source",
        state=state,
        peer="b",
        connections=(A, B),
        refused={A.id: "no"},
        steer="vip",
        shared=True,
        journal="theirs",
    )
    machine = SourceHandoff.recover(row, TIMES)
    assert machine.row() == row
    Play(machine).gets(on.Restarted(), then, *commands)


# ---- who is not believed


def test_another_journal_s_word_counts_for_nothing() -> None:
    play = frozen()
    for answer in (say.Committed, say.Discarded):
        assert play.machine.receive(answer(batch=BATCH, journal="new", refused={})) == ("", (), False)
    assert play.machine.state.name == "OFFERED"


def test_a_destination_cannot_share_a_registry_that_is_not_here() -> None:
    play = Play(SourceHandoff(BATCH, "b", (A, B), times=TIMES))
    play.gets(on.Start(), "PREPARING", do.WriteJournal, say.Prepare, do.StartTimer)
    shared = say.Prepared(batch=BATCH, journal="theirs", refused={}, shared=True)
    play.gets(shared, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    assert not play.machine.shared


def test_a_timer_that_was_replaced_counts_for_nothing() -> None:
    play = begun()
    old = play.machine.serial
    play.gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold, do.Freeze)
    assert play.machine.receive(on.Timeout(old)).point == ""
    assert play.machine.state.name == "FREEZING"


def test_another_batch_s_message_is_a_breach() -> None:
    with pytest.raises(RemoteError, match="another batch"):
        begun().machine.receive(say.Prepared(batch=b"other", journal="theirs", refused={}))


def test_a_message_out_of_turn_is_a_breach() -> None:
    with pytest.raises(RemoteError, match="source in state PREPARING does not expect Activated"):
        begun().machine.receive(ACTIVATED)
    with pytest.raises(RemoteError, match="does not expect Offer"):
        begun().machine.receive(say.Offer(batch=BATCH, connections=(A,), records={A.id: b""}))


def test_an_operator_has_nothing_to_say_where_nothing_is_in_doubt() -> None:
    with pytest.raises(UsageError, match="nothing to decide"):
        frozen().machine.receive(on.Resolved(True))


def test_the_destination_hears_its_own_name_of_a_connection() -> None:
    there = A.four_tuple._replace(local=b"\x0a\0\0\7", local_port=8080)
    mapped, named = msgspec.structs.replace(A, there=there), Connection(A.id, A.epoch, there)
    play = Play(SourceHandoff(BATCH, "b.example:7070", (mapped, B), times=TIMES))
    play.gets(on.Start(), "PREPARING", do.WriteJournal, say.Prepare, do.StartTimer)
    assert play.said() == say.Prepare(batch=BATCH, connections=(named, B), patience=2)
    play.gets(PREPARED, "FREEZING", do.WriteJournal, do.Hold((mapped, B)), do.Freeze((mapped, B)))
    records = {A.id: b"a", B.id: b"b"}
    play.gets(on.Frozen(records, {}), "OFFERED", do.WriteJournal, say.Offer, do.StartTimer)
    assert play.said() == say.Offer(batch=BATCH, connections=(named, B), records=records)
    play.gets(on.Cancel(), "OFFERED", say.Query)
    query = say.Query(batch=BATCH, connections=(named, B))
    assert play.said() == query
    play.gets(on.LinkLost(), "DOUBT", do.Ask(query), do.StartTimer)
    release, kept = do.Release((mapped, B)), do.SendKept((mapped, B), BATCH, True)
    play.gets(COMMITTED, "RELEASED", do.WriteJournal, release, kept, do.Steer, do.StartTimer)
