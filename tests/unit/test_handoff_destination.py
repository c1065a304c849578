"""The destination's machine: scripts of events in and commands out."""

from __future__ import annotations

import pytest

from migrate.errors import RemoteError
from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.destination import DestinationEvent, DestinationHandoff, DestinationState
from migrate.handoff.ids import Connection
from migrate.handoff.machine import Times
from tests.handoff_play import BATCH, A, B, C, Play

TIMES = Times(ask=1, linger=3)
PREPARE = say.Prepare(batch=BATCH, connections=(A, B), steer="forward", registry="registry", patience=9)
RECORDS = {A.id: b"a", B.id: b"b"}
OFFER = say.Offer(batch=BATCH, connections=(A, B), records=RECORDS)
QUERY = say.Query(batch=BATCH, connections=(A, B))
RELEASED = say.Released(batch=BATCH, kept=(b"packet",))
BOTH = frozenset({A.id, B.id})
KEPT = say.Kept(batch=BATCH, kept=(b"segment",))
COMMIT = (do.Adopt, do.Activate, say.Committed, do.Steer, do.WriteJournal, do.LiftHold)
DROP = (do.Discard, do.Forget)


def absent(*, registry: str = "registry") -> Play:
    return Play(DestinationHandoff(BATCH, "a", journal="mine", registry=registry, times=TIMES))


def prepared(*, registry: str = "registry") -> Play:
    play = absent(registry=registry).gets(PREPARE, "CHECKING", do.Check((A, B)))
    commands = (do.WriteJournal, do.Hold((A, B)), do.Carry((A, B)), say.Prepared, do.StartTimer)
    return play.gets(on.Checked({}), "PREPARED", *commands)


def restoring() -> Play:
    return prepared().gets(OFFER, "RESTORING", do.RestoreSilent((A, B), RECORDS))


def committing() -> Play:
    return restoring().gets(on.Restored({}), "COMMITTING", do.WriteJournal, do.Claim((A, B), True))


def active() -> Play:
    return committing().gets(on.Claimed(frozenset()), "ACTIVE", *COMMIT)


def test_the_usual_run() -> None:
    play = prepared()
    assert play.said() == say.Prepared(batch=BATCH, journal="mine", refused={}, shared=True)
    assert play.wants(do.StartTimer) == do.StartTimer(9, play.machine.serial)
    play.gets(OFFER, "RESTORING", do.RestoreSilent((A, B), RECORDS))
    play.gets(on.Restored({}), "COMMITTING", do.WriteJournal, do.Claim((A, B), True))
    play.gets(KEPT, "COMMITTING", do.Replay((A, B), (b"segment",)))
    play.gets(
        on.Claimed(frozenset()),
        "ACTIVE",
        do.Adopt((A, B)),
        do.Activate((A, B)),
        say.Committed,
        do.Steer((A, B), "forward"),
        do.WriteJournal,
        do.LiftHold((A, B)),
    )
    assert play.said() == say.Committed(batch=BATCH, journal="mine", refused={})
    play.gets(KEPT, "ACTIVE", do.Replay((A, B), (b"segment",)))
    play.gets(
        RELEASED,
        "SERVING",
        do.Replay((A, B), (b"packet",)),
        do.Unclaim((A, B)),
        do.Forget((A, B), BATCH, BOTH),
        say.Activated,
        do.StartTimer(6, play.machine.serial + 2),
    )
    play.gets(KEPT, "SERVING", do.Replay((A, B), (b"segment",)))
    late = say.Released(batch=BATCH, kept=(b"late",))
    play.gets(late, "SERVING", do.Replay((A, B), (b"late",)), say.Activated).time_out("DONE")
    assert play.machine.over


def test_the_records_are_in_the_journal_with_the_row_that_counts_on_them() -> None:
    play = restoring().gets(on.Restored({}), "COMMITTING", do.WriteJournal, do.Claim)
    write = play.wants(do.WriteJournal)
    assert isinstance(write, do.WriteJournal)
    assert (write.row.state, write.records) == ("COMMITTING", RECORDS)
    play.gets(on.Claimed(frozenset()), "ACTIVE", *COMMIT)
    assert play.wants(do.WriteJournal) == do.WriteJournal(play.machine.row(), None)


def test_nobody_hears_that_they_are_here_before_they_run() -> None:
    order = list(DestinationHandoff.TRANSITIONS[DestinationState.COMMITTING][DestinationEvent.WON][1])
    assert order.index(do.Activate) < order.index(say.Committed)


@pytest.mark.parametrize(("theirs", "mine", "shared"), [("r", "r", True), ("r", "s", False), ("", "", False)])
def test_a_registry_is_shared_if_both_name_the_same(theirs: str, mine: str, shared: bool) -> None:
    play = absent(registry=mine)
    play.gets(say.Prepare(batch=BATCH, connections=(A,), registry=theirs), "CHECKING", do.Check)
    play.gets(on.Checked({}), "PREPARED", do.WriteJournal, do.Hold, do.Carry, say.Prepared, do.StartTimer)
    assert play.said() == say.Prepared(batch=BATCH, journal="mine", refused={}, shared=shared)
    play.gets(say.Offer(batch=BATCH, connections=(A,), records={A.id: b""}), "RESTORING", do.RestoreSilent)
    play.gets(on.Restored({}), "COMMITTING", do.WriteJournal, do.Claim((A,), shared))


def test_the_refused_drop_out_one_by_one_and_the_rest_comes() -> None:
    play = absent()
    everyone = tuple(Connection(bytes([n]) * 16, 1, A.four_tuple) for n in range(5))
    unfit, left, broken, lost, well = everyone
    play.gets(say.Prepare(batch=BATCH, connections=everyone, registry="registry"), "CHECKING", do.Check(everyone))
    play.gets(
        on.Checked({unfit.id: "no adopter"}),
        "PREPARED",
        do.WriteJournal,
        do.Hold(everyone[1:]),
        do.Carry(everyone[1:]),
        say.Prepared,
        do.StartTimer,
    )
    offered = say.Offer(batch=BATCH, connections=everyone[2:], records={c.id: b"r" for c in everyone[2:]})
    play.gets(offered, "RESTORING", do.RestoreSilent(everyone[2:], offered.records), do.Discard((left,)))
    play.gets(on.Restored({broken.id: "no memory"}), "COMMITTING", do.WriteJournal, do.Claim((lost, well), True))
    play.gets(
        on.Claimed(frozenset({lost.id})),
        "ACTIVE",
        do.Discard((left, broken, lost)),
        do.Adopt((well,)),
        *COMMIT[1:],
    )
    assert play.said() == say.Committed(
        batch=BATCH,
        journal="mine",
        refused={
            unfit.id: "no adopter",
            left.id: "the source left it out of its offer",
            broken.id: "no memory",
            lost.id: "the registry had given it back to the source",
        },
    )


def test_it_takes_none() -> None:
    why = {A.id: "no adopter", B.id: "no adopter"}
    play = absent().gets(PREPARE, "CHECKING", do.Check).gets(on.Checked(why), "DISCARDED", say.Prepared)
    assert play.said() == say.Prepared(batch=BATCH, journal="mine", refused=why, shared=True)
    play = restoring().gets(on.Restored(why), "DISCARDED", *DROP, say.Discarded)
    assert play.said() == say.Discarded(batch=BATCH, journal="mine", refused=why)


def test_the_hold_fails_and_the_source_hears_why() -> None:
    play = prepared().gets(on.Failed("no nftables"), "DISCARDED", *DROP, say.Prepared)
    why = {A.id: "no nftables", B.id: "no nftables"}
    assert play.said() == say.Prepared(batch=BATCH, journal="mine", refused=why, shared=True)


@pytest.mark.parametrize("play", [restoring, committing])
def test_the_disk_is_full_before_the_claim(play: object) -> None:
    assert callable(play)
    stage: Play = play()
    stage.gets(on.Failed("the disk is full"), "DISCARDED", do.Discard((A, B)), do.Forget, say.Discarded)


@pytest.mark.parametrize("event", [on.LinkLost(), say.Abort(batch=BATCH)])
def test_before_the_offer_it_waits_for_nobody(event: on.Event) -> None:
    absent().gets(PREPARE, "CHECKING", do.Check).gets(event, "DISCARDED")
    prepared().gets(event, "DISCARDED", do.Discard((A, B)), do.Forget((A, B), BATCH, frozenset()))


def test_an_offer_that_does_not_come() -> None:
    prepared().time_out("DISCARDED", *DROP)


def test_asked_before_the_claim_it_discards_and_asked_after_it_it_does_not() -> None:
    why = "the source asked before it was committed"
    for play in (prepared(), restoring()):
        play.gets(QUERY, "DISCARDED", *DROP, say.Discarded)
        assert play.said() == say.Discarded(batch=BATCH, journal="mine", refused={A.id: why, B.id: why})
    committing().gets(QUERY, "COMMITTING").gets(on.Claimed(frozenset()), "ACTIVE", *COMMIT)
    active().gets(QUERY, "ACTIVE", say.Committed)


def test_a_source_that_dies_is_no_reason_to_stop() -> None:
    play = restoring().gets(on.LinkLost(), "RESTORING").gets(on.Restored({}), "COMMITTING", do.WriteJournal, do.Claim)
    play.gets(on.LinkLost(), "COMMITTING").gets(on.Claimed(frozenset()), "ACTIVE", *COMMIT)
    play.gets(on.LinkLost(), "ACTIVE")
    play.gets(RELEASED, "SERVING", do.Replay, do.Unclaim, do.Forget, say.Activated, do.StartTimer)


def test_the_registry_had_given_it_back() -> None:
    committing().gets(on.Claimed(BOTH), "DISCARDED", *DROP, say.Discarded)


def test_a_registry_that_does_not_answer_is_asked_again() -> None:
    play = committing().gets(on.RegistryFailed(), "COMMITTING", do.StartTimer).gets(RELEASED, "COMMITTING")
    play.time_out("COMMITTING", do.Claim((A, B), True))


def test_an_operator_ends_the_wait_for_a_source_that_is_gone() -> None:
    active().gets(on.Resolved(True), "DONE", do.Forget((A, B), BATCH, BOTH))


# ---- a batch that nobody knows


def test_what_it_has_never_heard_of_is_discarded_for_good() -> None:
    forgotten = do.Forget((A, B), BATCH, frozenset())
    play = absent().gets(QUERY, "DISCARDED", forgotten, say.Discarded)
    assert isinstance(play.said(), say.Discarded)
    absent().gets(OFFER, "DISCARDED", forgotten, say.Discarded)


def test_what_it_has_forgotten_is_activated() -> None:
    absent().gets(RELEASED, "DONE", say.Activated)


def test_a_segment_that_comes_too_late_says_nothing_about_its_batch() -> None:
    absent().gets(KEPT, "DISCARDED")


def test_a_segment_that_comes_before_the_offer_is_a_breach() -> None:
    for play in (absent().gets(PREPARE, "CHECKING", do.Check), prepared()):
        with pytest.raises(RemoteError, match="does not expect Kept"):
            play.machine.receive(KEPT)


def test_a_source_that_comes_back_after_an_operator_spoke_for_it_hears_the_truth() -> None:
    machine = DestinationHandoff(BATCH, "a", journal="mine", others=frozenset({B.id}), times=TIMES)
    play = Play(machine).gets(QUERY, "DONE", say.Committed)
    said = play.said()
    assert isinstance(said, say.Committed)
    assert set(said.refused) == {B.id}


def test_an_abort_of_nothing() -> None:
    absent().gets(say.Abort(batch=BATCH), "DISCARDED")


# ---- after a restart


@pytest.mark.parametrize(
    ("state", "then", "commands"),
    [
        ("PREPARED", "DISCARDED", DROP),
        ("COMMITTING", "COMMITTING", (do.Rehold((B,)), do.Claim((B,), True))),
        ("ACTIVE", "ACTIVE", (do.LiftHold((B,)), do.Steer((B,), "vip"))),
    ],
)
def test_it_goes_on_from_its_row(state: str, then: str, commands: tuple[do.Command, ...]) -> None:
    row = do.Row(
        batch=BATCH,
        role="destination",
        state=state,
        peer="a",
        connections=(A, B),
        refused={A.id: "no"},
        steer="vip",
        shared=True,
        journal="mine",
    )
    machine = DestinationHandoff.recover(row, TIMES)
    assert machine.row() == row
    Play(machine).gets(on.Restarted(), then, *commands)


def test_what_was_claimed_before_the_restart_is_rebuilt() -> None:
    play = Play(DestinationHandoff.recover(committing().machine.row(), TIMES))
    play.gets(on.Restarted(), "COMMITTING", do.Rehold, do.Claim)
    play.gets(on.Claimed(frozenset()), "ACTIVE", do.Rebuild((A, B)), *COMMIT)


# ---- who is not believed


@pytest.mark.parametrize(
    "offer",
    [
        say.Offer(batch=BATCH, connections=(A, C), records={A.id: b"", C.id: b""}),
        say.Offer(batch=BATCH, connections=(A, B), records={A.id: b""}),
        say.Offer(batch=BATCH, connections=(A,), records={A.id: b"", C.id: b""}),
        say.Offer(batch=BATCH, connections=(Connection(A.id, 9, A.four_tuple),), records={A.id: b""}),
    ],
    ids=["a stranger", "no record", "a record too many", "another epoch"],
)
def test_an_offer_that_was_not_prepared_is_a_breach(offer: say.Offer) -> None:
    play = prepared()
    with pytest.raises(RemoteError, match="does not fit"):
        play.machine.receive(offer)
    play.gets(OFFER, "RESTORING", do.RestoreSilent)


def test_an_offer_of_what_was_refused_is_a_breach() -> None:
    play = absent().gets(PREPARE, "CHECKING", do.Check)
    play.gets(on.Checked({A.id: "no"}), "PREPARED", do.WriteJournal, do.Hold, do.Carry, say.Prepared, do.StartTimer)
    with pytest.raises(RemoteError, match="does not fit"):
        play.machine.receive(OFFER)


@pytest.mark.parametrize("connections", [(), (A, B, A)], ids=["none", "one twice"])
@pytest.mark.parametrize("kind", [say.Prepare, say.Query])
def test_a_list_that_makes_no_sense_is_a_breach(
    kind: type[say.Prepare] | type[say.Query], connections: tuple[Connection, ...]
) -> None:
    with pytest.raises(RemoteError, match="no connection, or one of them twice"):
        absent().machine.receive(kind(batch=BATCH, connections=connections))


def test_a_second_preparation_is_a_breach() -> None:
    with pytest.raises(RemoteError, match="destination in state PREPARED does not expect Prepare"):
        prepared().machine.receive(PREPARE)


def test_an_operator_has_nothing_to_say_before_it_is_active() -> None:
    with pytest.raises(Exception, match="nothing to decide"):
        committing().machine.receive(on.Resolved(True))
