"""A dump is a handoff whose destination is the caller, a restore one whose source is the caller: the two voices.

So journal, holds, adoption and all that happens after a crash are those of every handoff. Both voices live in the
engine's thread. One that stands for the caller of an earlier agent answers as that caller did last: with silence.

The record of a dump has the epoch of the dump, and restoring it is a handoff of the epoch after that. A record that was
given and not taken is void where it was made: its next epoch counts as seen there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from migrate.agent.logging import get_logger
from migrate.errors import Error
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.journal import Journal
from migrate.handoff.messages import (
    Activated,
    Committed,
    Discarded,
    Message,
    Offer,
    Prepare,
    Prepared,
    Query,
    Released,
)
from migrate.handoff.source import SourceHandoff

__all__ = ["CALLER", "HOLD", "Giver", "Taker"]

CALLER = "caller"
"""Stands in the journal where an agent's address or name would; no agent has such a one."""

HOLD = 60.0
"""Seconds for which connections that were dumped are held, unless the caller says otherwise."""

LATE = "the caller did not say in time that its record is stored"
NOT_STORED = "the caller has not stored its record"

_log = get_logger(__name__)

Say = Callable[[Message], None]


class Taker:
    """Who dumps, in a destination's place. ``say`` answers; ``offered`` is given what is frozen; None: nobody is there.

    With ``copies`` nothing is ever taken.
    """

    peer = CALLER

    def __init__(
        self, journal: Journal, say: Say, offered: Callable[[Offer], None] | None = None, *, copies: bool = False
    ) -> None:
        self.late = False  # the time to store it was over
        self._journal = journal
        self._say = say
        self._offered = offered
        self._copies = copies
        self._offer: Offer | None = None
        self._answer: Committed | Discarded | None = None

    def send(self, message: Message) -> None:
        """What the source says."""
        batch = message.batch
        match message:
            case Prepare():
                self._say(Prepared(batch=batch, journal=self._journal.identity, refused={}))
            case Offer():
                self._offer = message
                if self._offered is not None:
                    self._offered(message)
                if self._copies or self._offered is None:
                    self._decide(batch, message.connections, frozenset(), NOT_STORED)
            case Query():
                self.late = self._answer is None
                self._decide(batch, message.connections, frozenset(), LATE)
            case Released():
                self._say(Activated(batch=batch, journal=self._journal.identity))

    def fail(self, error: Error) -> None:
        """The source did not expect that."""
        _log.warning("a dump's answer was refused", why=str(error))

    def stored(self, ids: frozenset[bytes]) -> None:
        """These records the caller has, and it will have no more: the first word counts."""
        self._offered = None
        if self._offer is not None and self._answer is None:
            self._decide(self._offer.batch, self._offer.connections, ids, NOT_STORED)

    def _decide(self, batch: bytes, connections: Sequence[Connection], ids: frozenset[bytes], why: str) -> None:
        if self._answer is None:
            left = [connection for connection in connections if connection.id not in ids]
            if left and not self._copies:
                void = [Connection(each.id, each.epoch + 1, each.four_tuple) for each in left]
                self._journal.forget(new_id(), SourceHandoff.role, void, frozenset())
            kind = Committed if len(left) < len(connections) else Discarded
            refused = {connection.id: why for connection in left}
            self._answer = kind(batch=batch, journal=self._journal.identity, refused=refused)
        self._say(self._answer)


class Giver:
    """Who restores, in a source's place. ``ended`` is told the ids of those that were refused, and why."""

    peer = CALLER

    def __init__(
        self,
        say: Say,
        offer: Offer | None = None,
        ended: Callable[[Mapping[bytes, str]], None] = lambda _: None,
    ) -> None:
        self._say = say
        self._offer = offer
        self._ended = ended

    def send(self, message: Message) -> None:
        """What the destination says."""
        match message:
            case Prepared(refused=refused) if self._offer is not None:
                taken = tuple(each for each in self._offer.connections if each.id not in refused)
                if taken:
                    records = {each.id: self._offer.records[each.id] for each in taken}
                    self._say(Offer(batch=message.batch, connections=taken, records=records))
                else:
                    self._ended(refused)
            case Committed(refused=refused):
                self._refused = refused
                self._say(Released(batch=message.batch))
            case Discarded(refused=refused):
                self._ended(refused)
            case Activated():
                self._ended(self._refused)

    def fail(self, error: Error) -> None:
        """The destination did not expect that."""
        _log.warning("a restore's message was refused", why=str(error))
        if self._offer is not None:
            self._ended({each.id: error.what for each in self._offer.connections})
