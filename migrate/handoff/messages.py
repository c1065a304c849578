"""What the two sides of a handoff tell each other.

Every message names its ``batch`` (16 bytes); several batches share a stream. ``refused`` maps the id of each connection
that is out to the reason, one sentence without a full stop; who is not in it is in. How a message is laid out on the
wire, and into how many pieces an Offer is cut, is the stream's affair: a machine sees whole messages.

``journal`` is the identity of the destination's journal. Only the journal that prepared a batch can say what became of
it: the source ignores the word of any other, such as an agent that answers under the same name on another host.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from migrate.handoff.ids import Connection

__all__ = [
    "Abort",
    "Activated",
    "Committed",
    "Discarded",
    "Kept",
    "Message",
    "Offer",
    "Prepare",
    "Prepared",
    "Query",
    "Released",
]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What is common to all messages."""

    batch: bytes


# ---- source to destination


class Prepare(Message, frozen=True, kw_only=True):
    """Can you take these? ``patience``: seconds until an Offer or Abort; ``registry``: identity of mine, or empty."""

    connections: tuple[Connection, ...]
    steer: str = ""
    registry: str = ""
    patience: float = 60.0


class Offer(Message, frozen=True, kw_only=True):
    """These are frozen, here is everything. From here on the source asks before it thaws.

    ``records``: one encoded ICI record a connection, by id.
    """

    connections: tuple[Connection, ...]
    records: Mapping[bytes, bytes]


class Abort(Message, frozen=True, kw_only=True):
    """I have offered nothing of this batch and never shall. Not answered."""


class Query(Message, frozen=True, kw_only=True):
    """What became of the batch? Undecided, it is discarded. Always answered, by Committed or Discarded."""

    connections: tuple[Connection, ...]


class Kept(Message, frozen=True, kw_only=True):
    """My hold has kept these since the Offer: whole IP packets, each sent once. Not answered; decides nothing."""

    kept: tuple[bytes, ...]


class Released(Message, frozen=True, kw_only=True):
    """I have let go of what you committed, and shall not ask again. ``kept``: what my hold had not yet sent on by then.

    May come any number of times; answered by Activated each time.
    """

    kept: tuple[bytes, ...] = ()


# ---- destination to source


class Answer(Message, frozen=True, kw_only=True):
    """What is common to the answers."""

    journal: str


class Prepared(Answer, frozen=True, kw_only=True):
    """I hold all but the refused. ``shared``: my registry is the one that you named."""

    refused: Mapping[bytes, str]
    shared: bool = False


class Committed(Answer, frozen=True, kw_only=True):
    """I own all but the refused, which are yours, finally. What I own runs here."""

    refused: Mapping[bytes, str]


class Discarded(Answer, frozen=True, kw_only=True):
    """I own none of the batch and never shall in this epoch."""

    refused: Mapping[bytes, str]


class Activated(Answer, frozen=True, kw_only=True):
    """Nothing of the batch is left in my journal: I need not hear of it again."""
