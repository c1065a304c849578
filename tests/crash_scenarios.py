"""What can go wrong in a handoff, so that both machines pass every transition of their tables: see `crash_bench`."""

from __future__ import annotations

from collections.abc import Mapping

from tests.crash_bench import REFUSED, Scenario

__all__ = ["SCENARIOS", "UNREACHABLE"]

# Where a script takes hold: an agent stands still before, or has failed to do, this.
CHECK = "destination:ABSENT:PREPARE:Check"
FREEZE = "source:PREPARING:PREPARED:Freeze"
OFFER = "source:FREEZING:FROZEN:Offer"
RESTORE = "destination:PREPARED:OFFER:RestoreSilent"
CLAIM = "destination:RESTORING:RESTORED:Claim"
CLAIMED = "destination:COMMITTING:WON:Committed"
RELEASE = "source:OFFERED:COMMITTED:WriteJournal"
ACTIVE = "destination:COMMITTING:WON"
HEARD = "destination:ACTIVE:RELEASED:Replay"
FORGET = "source:RELEASED:ACTIVATED:Forget"
LINGER = "source:RELEASED:ACTIVATED:StartTimer"

SCENARIOS = [
    Scenario("nothing goes wrong"),
    # Before anything stands still.
    Scenario("nobody there takes them", port=REFUSED),
    Scenario("slow to check", {CHECK: "until source:PREPARING:TIMEOUT, go"}),
    Scenario("dies while it checks", {CHECK: "kill, start"}),
    Scenario("stopped while it checks", {CHECK: "abort, until source:PREPARING:CANCEL, go"}),
    Scenario("PREPARING cannot be written", {"source:NEW:START:WriteJournal": "fail"}),
    Scenario("dies PREPARING", {"source:NEW:START": "kill, start"}),
    Scenario("cannot hold there", {"destination:CHECKING:CHECKED:Hold": "fail"}),
    Scenario("dies PREPARED there", {"destination:CHECKING:CHECKED": "kill, start"}),
    # While they are frozen.
    Scenario("never quiet", quiet=0.5),
    Scenario("dies there before they are quiet", {FREEZE: "kill other, start other, go"}, quiet=3),
    Scenario("stopped before they are quiet", {FREEZE: "abort, go"}, quiet=3),
    Scenario("quiet too late", {FREEZE: "until destination:PREPARED:TIMEOUT, go"}, quiet=0.5),
    Scenario("cannot hold", {"source:PREPARING:PREPARED:Hold": "fail"}),
    Scenario("dies FREEZING", {"source:PREPARING:PREPARED": "kill, start"}),
    Scenario("OFFERED cannot be written", {"source:FREEZING:FROZEN:WriteJournal": "fail"}),
    Scenario("offered too late", {OFFER: "until destination:PREPARED:TIMEOUT, go"}),
    Scenario("dies OFFERED", {"source:FREEZING:FROZEN": "kill, start"}),
    # The destination has the records.
    Scenario("stopped too late", {RESTORE: "abort, until source:OFFERED:CANCEL, go"}),
    Scenario("slow to restore", {RESTORE: "until source:DOUBT:TIMEOUT, go"}),
    Scenario("stopped in doubt", {RESTORE: "until source:OFFERED:TIMEOUT, abort, until source:DOUBT:CANCEL, go"}),
    Scenario(
        "dies there in doubt", {RESTORE: "until source:OFFERED:TIMEOUT, kill, until source:DOUBT:LINK_LOST, start"}
    ),
    Scenario("cannot rebuild there", {RESTORE: "fail"}),
    Scenario("none can be rebuilt", {RESTORE: "occupy all, go, until destination:RESTORING:RESTORED_NONE, vacate"}),
    Scenario("one cannot be rebuilt", {RESTORE: "occupy one, go, until destination:RESTORING:RESTORED, vacate"}),
    Scenario("dies RESTORING", {"destination:PREPARED:OFFER": "kill, start"}),
    Scenario(
        "gone before it commits",
        {RESTORE: "kill, until source:OFFERED:LINK_LOST, settle here, until source:DOUBT:RESOLVED_HERE, start"},
    ),
    # It decides.
    Scenario("slow to claim", {CLAIM: "until source:OFFERED:TIMEOUT, go"}),
    Scenario("segments come while it claims", {CLAIM: "pause 0.5, go"}),
    Scenario("COMMITTING cannot be written", {"destination:RESTORING:RESTORED:WriteJournal": "fail"}),
    Scenario("dies COMMITTING", {CLAIM: "kill, start, until source:DOUBT:COMMITTED"}),
    Scenario("dies when it has claimed", {"destination:RESTORING:RESTORED": "kill, start"}, registry=True),
    Scenario(
        "gone when it has claimed",
        {CLAIMED: "kill, until source:OFFERED:LINK_LOST, settle there, until source:DOUBT:RESOLVED_THERE, start"},
    ),
    Scenario(
        "dies before it adopts",
        {"destination:COMMITTING:WON:Adopt": "kill, start, until destination:COMMITTING:RESTARTED"},
    ),
    Scenario("dies before it activates", {"destination:COMMITTING:WON:Activate": "kill, start"}),
    Scenario("dies before it writes that they are active", {"destination:COMMITTING:WON:WriteJournal": "kill, start"}),
    Scenario(
        "the source claims", {CLAIM: "until source:DOUBT:EXHAUSTED, until source:CLAIMING:WON, go"}, registry=True
    ),
    Scenario("the source claims too late", {CLAIMED: "until source:CLAIMING:LOST, go"}, registry=True),
    Scenario(
        "the source cannot claim",
        {CLAIM: "lock registry, until source:CLAIMING:REGISTRY_FAILED, unlock, go"},
        registry=True,
    ),
    Scenario(
        "the destination cannot claim",
        {CLAIM: "lock registry, go, until destination:COMMITTING:QUERY, unlock"},
        registry=True,
    ),
    Scenario(
        "cannot claim, and the source dies",
        {
            CLAIM: "lock registry, go, until destination:COMMITTING:REGISTRY_FAILED, kill other, "
            "until destination:COMMITTING:LINK_LOST, unlock, start other"
        },
        registry=True,
    ),
    Scenario(
        "released before it knows",
        {
            "destination:RESTORING:RESTORED": "kill, until source:CLAIMING:LOST, lock registry, start, "
            "until destination:COMMITTING:RELEASED, unlock"
        },
        registry=True,
    ),
    # The source has claimed: they run here.
    Scenario("SETTLING takes long", {CLAIM: "until source:SETTLING:TIMEOUT, go"}, registry=True),
    Scenario(
        "SETTLING, and it dies there",
        {CLAIM: "until source:CLAIMING:WON, kill, until source:SETTLING:LINK_LOST, start"},
        registry=True,
    ),
    Scenario(
        "dies SETTLING",
        {CLAIM: "until source:SETTLING:RESTARTED, go", "source:CLAIMING:WON": "kill, start"},
        registry=True,
    ),
    Scenario(
        "stopped SETTLING",
        {
            CLAIM: "until source:SETTLING:CANCEL, go",
            "source:CLAIMING:WON:WriteJournal": "lock journal, abort, go, pause 1, unlock",
        },
        registry=True,
    ),
    Scenario(
        "gone, and settled here",
        {CLAIM: "kill, until source:CLAIMING:WON, settle here, until source:SETTLING:RESOLVED_HERE, start"},
        registry=True,
        claims_stay=True,
    ),
    # The destination has committed.
    Scenario("slow to release", {RELEASE: "pause 1, go"}),
    Scenario(
        "dies before it releases",
        {RELEASE: "kill, until destination:ACTIVE:LINK_LOST, start, until destination:ACTIVE:QUERY"},
    ),
    Scenario("dies ACTIVE there", {RELEASE: "until destination:ACTIVE:RESTARTED, go", ACTIVE: "kill, start"}),
    Scenario("RELEASED cannot be written", {RELEASE: "fail"}),
    Scenario("dies RELEASED", {"source:OFFERED:COMMITTED": "kill, start, until source:RELEASED:RESTARTED"}),
    Scenario(
        "gone RELEASED",
        {
            "source:OFFERED:COMMITTED:SendKept": "kill, until destination:ACTIVE:LINK_LOST, "
            "settle there destination, until destination:ACTIVE:RESOLVED, start"
        },
    ),
    Scenario(
        "gone before it releases, and settled there",
        {
            RELEASE: "kill, until destination:ACTIVE:LINK_LOST, settle there destination, "
            "until destination:ACTIVE:RESOLVED, start, until destination:ABSENT:QUERY_AGAIN"
        },
    ),
    Scenario("slow to forget", {HEARD: "until source:RELEASED:TIMEOUT, go"}),
    Scenario("stopped RELEASED", {HEARD: "abort, until source:RELEASED:CANCEL, go"}),
    Scenario("dies before it has forgotten", {HEARD: "kill, start"}),
    Scenario(
        "gone before it says that it has forgotten",
        {
            "destination:ACTIVE:RELEASED:Activated": "kill, until source:RELEASED:LINK_LOST, settle there, "
            "until source:RELEASED:RESOLVED_THERE, start"
        },
    ),
    # They run there.
    Scenario(
        "late segments",
        {RELEASE: "pin, go, until destination:SERVING:KEPT, unpin"},
    ),
    Scenario("dies LINGERING", {"source:RELEASED:ACTIVATED": "kill, until destination:SERVING:LINK_LOST, start"}),
    Scenario(
        "dies before it forgets",
        {FORGET: "kill, until destination:SERVING:TIMEOUT, start, until destination:ABSENT:RELEASED"},
    ),
    Scenario("LINGERING, and it dies there", {LINGER: "kill other, go, until source:LINGERING:LINK_LOST, start other"}),
    Scenario("stopped LINGERING", {FORGET: "lock journal, abort, go, pause 1, unlock"}),
]

_AT_ONCE = "what it waits for ends before the agent's one thread takes up another event"
UNREACHABLE: Mapping[str, str] = {
    **dict.fromkeys(
        [
            "source:CLAIMING:COMMITTED",
            "source:CLAIMING:DISCARDED",
            "source:CLAIMING:LINK_LOST",
            "source:CLAIMING:CANCEL",
            "destination:CHECKING:ABORT",
            "destination:CHECKING:LINK_LOST",
            "destination:RESTORING:QUERY",
            "destination:RESTORING:KEPT",
            "destination:RESTORING:LINK_LOST",
        ],
        _AT_ONCE,
    ),
    "destination:SERVING:QUERY": "a question on an older stream must be slower than a new stream's handshake",
}
"""Transitions that these agents cannot make, and why. The model of tests/unit/test_handoff_model.py makes them all."""
