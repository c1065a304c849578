"""What a machine wants done. docs/handoff.md says how, one by one.

Commands of one machine are carried out in order, one after another. Each can be carried out twice with the same
outcome: after a crash they are. ``connections`` are those that it concerns, never none.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from migrate.handoff.ids import Connection
from migrate.handoff.messages import Message

__all__ = [
    "FALLIBLE",
    "Activate",
    "Adopt",
    "Ask",
    "Carry",
    "Check",
    "Claim",
    "Command",
    "Discard",
    "Forget",
    "Freeze",
    "Hold",
    "LiftHold",
    "Rebuild",
    "Rehold",
    "Release",
    "Replay",
    "Report",
    "RestoreSilent",
    "Row",
    "Send",
    "SendKept",
    "StartTimer",
    "Steer",
    "Thaw",
    "Unclaim",
    "WriteJournal",
]


class Command(msgspec.Struct, frozen=True):
    """What is common to all of them."""


class OnConnections(Command, frozen=True):
    """A command about connections."""

    connections: tuple[Connection, ...]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as the journal has it: enough to rebuild the machine. ``peer`` is the other agent, as ours names it.

    ``source`` is for the driver at the destination: the address from which the source's agent spoke.
    """

    batch: bytes
    role: str
    state: str
    peer: str
    connections: tuple[Connection, ...]
    refused: Mapping[bytes, str]
    steer: str = ""
    shared: bool = False
    journal: str = ""
    source: str = ""


# ---- both sides


class WriteJournal(Command, frozen=True):
    """Make the row durable against the death of this process; with ``records``, those too. May fail."""

    row: Row
    records: Mapping[bytes, bytes] | None = None


class Forget(OnConnections, frozen=True):
    """The batch is over here: remove row and records; the epochs stay seen. ``moved``: ids that changed hands."""

    batch: bytes
    moved: frozenset[bytes]


class Hold(OnConnections, frozen=True):
    """Let no segment of them in or out, and keep what arrives. May fail."""


class Rehold(OnConnections, frozen=True):
    """Take over the hold that stands since before the restart; where it does not, hold anew. Goes on until done."""


class LiftHold(OnConnections, frozen=True):
    """Give what is still kept to the sockets here, if they live here, and end the hold."""


class Claim(OnConnections, frozen=True):
    """Ask the registry for each (id, epoch). Answered by Claimed or RegistryFailed.

    Not ``shared``: there is no registry that both reach, nobody else can claim, and Claimed(none lost) comes at once.
    """

    shared: bool


class Unclaim(OnConnections, frozen=True):
    """Both sides know the outcome: remove the claims, whoever won them. What cannot be removed now grows old there."""


class Steer(OnConnections, frozen=True):
    """Make the network agree that the destination owns them. Goes on beside what follows, until done."""

    steer: str


class Send(Command, frozen=True):
    """Send on the batch's stream; without one, drop it. After an Offer send on what the hold keeps, as it comes."""

    message: Message


class StartTimer(Command, frozen=True):
    """Timeout(serial) after ``seconds``, in place of any earlier timer of this machine."""

    seconds: float
    serial: int


class Report(Command, frozen=True):
    """Tell the caller. ``outcome``: "moved", "stayed" or "doubt"; ``refused``: id to reason of those that stay."""

    outcome: str
    refused: Mapping[bytes, str]


# ---- source


class Freeze(OnConnections, frozen=True):
    """Dump each and leave it frozen; refused ones run on, still held. Answered by Frozen. May fail."""


class Ask(Command, frozen=True):
    """Send, over a new stream if there is none. If there can be none, drop it: the timer asks again."""

    message: Message


class Thaw(OnConnections, frozen=True):
    """Let each run on here: leave repair mode, replay what was kept, sent on or not, end the hold. Frozen or not."""


class Release(OnConnections, frozen=True):
    """Let go of each without a packet, under the hold. Released or not."""


class SendKept(OnConnections, frozen=True):
    """Send Released with what the hold still keeps; until LiftHold send on what else it keeps, as it comes."""

    batch: bytes
    dial: bool


# ---- destination


class Check(OnConnections, frozen=True):
    """Could each live here? Changes nothing. Answered by Checked."""


class Carry(OnConnections, frozen=True):
    """Make their local addresses ones that a socket here can be bound to, without a word to the network. May fail."""


class RestoreSilent(OnConnections, frozen=True):
    """Build silent sockets, under the hold. Answered by Restored. May fail."""

    records: Mapping[bytes, bytes]


class Rebuild(OnConnections, frozen=True):
    """The same from the journal's records, for those that are neither silent nor adopted here. Goes on until done."""


class Discard(OnConnections, frozen=True):
    """Undo all: close silent sockets, end the hold, carry the addresses no longer. Whatever of it was done."""


class Replay(OnConnections, frozen=True):
    """Give these packets to the sockets here, through the hold, as soon as they may speak."""

    kept: tuple[bytes, ...]


class Adopt(OnConnections, frozen=True):
    """Give each silent socket to an adopter, which waits at the gate."""


class Activate(OnConnections, frozen=True):
    """Let each speak, and open its gate."""


FALLIBLE = (WriteJournal, Hold, Carry, Freeze, RestoreSilent)
"""Those that may fail as a whole, where the step allows it. The others are tried again, or logged and passed over."""
