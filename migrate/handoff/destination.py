"""The destination's side of a handoff: the machine that takes connections in, and decides.

Its law: COMMITTING stands in the journal, with the records, before it claims; what it has claimed it lets run, come
what may, and rebuilds it for that; what it has not claimed it never will, once it has said Discarded.

Only the table, what an event means in it, and how its commands are made may live here. Why: docs/handoff.md.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar

from migrate.errors import RemoteError
from migrate.handoff import commands as do
from migrate.handoff import events as on_event
from migrate.handoff import messages as say
from migrate.handoff.events import Event
from migrate.handoff.machine import DEFAULT_TIMES, Builders, Machine, Table, Times

__all__ = ["DestinationEvent", "DestinationHandoff", "DestinationState"]


class DestinationState(enum.Enum):
    """Where a batch stands at the destination."""

    ABSENT = "never heard of, or forgotten"
    CHECKING = "could they live here?"
    PREPARED = "held, waiting for the records"
    RESTORING = "silent sockets are being built"
    COMMITTING = "silent sockets stand; the claim is being made"
    ACTIVE = "owned, and made to run; the source has yet to say that it let go"
    SERVING = "they run here and the source knows; late segments are still taken"
    DONE = "over: they live here"
    DISCARDED = "over: they do not, and never will in this epoch"


class DestinationEvent(enum.Enum):
    """What can happen to it."""

    PREPARE = "the source asks for room"
    OFFER = "the source sends the records"
    ABORT = "the source gives up before it has offered"
    QUERY = "the source asks what became of it"
    QUERY_AGAIN = "the source asks what became of it, and it came here long ago"
    KEPT = "the source sends on what it keeps"
    RELEASED = "the source has let go, and sends what it kept"
    CHECKED = "some or all could live here"
    CHECKED_NONE = "none could"
    RESTORED = "some or all stand silent"
    RESTORED_NONE = "none does"
    WON = "the claim holds for some or all"
    LOST = "the registry had given all to the source"
    REGISTRY_FAILED = "the registry does not answer"
    TIMEOUT = "the timer has run down"
    LINK_LOST = "the stream has broken"
    FAILED = "a command could not be carried out"
    RESTARTED = "the agent was restarted and found the row"
    RESOLVED = "an operator says: the source is gone"


_D = DestinationState
_E = DestinationEvent

_REFUSE = (_D.DISCARDED, (do.Discard, do.Forget, say.Prepared))
_DROP = (_D.DISCARDED, (do.Discard, do.Forget))
_DISCARD = (_D.DISCARDED, (do.Discard, do.Forget, say.Discarded))
_UNHEARD = (_D.DISCARDED, (do.Forget, say.Discarded))
# Nothing can be heard of the source any more: what it has is frozen, and held. So nobody waits for its word.
_GO = (do.Discard, do.Rebuild, do.Adopt, do.Activate, say.Committed, do.Steer, do.WriteJournal, do.LiftHold)

TRANSITIONS: Table = {
    _D.ABSENT: {
        _E.PREPARE: (_D.CHECKING, (do.Check,)),
        _E.OFFER: _UNHEARD,  # a query has overtaken it, or the agent was restarted
        _E.ABORT: (_D.DISCARDED, ()),
        _E.QUERY: _UNHEARD,
        _E.QUERY_AGAIN: (_D.DONE, (say.Committed,)),  # an operator had spoken for the source
        _E.RELEASED: (_D.DONE, (say.Activated,)),
        _E.KEPT: (_D.DISCARDED, ()),  # it came too late
    },
    _D.CHECKING: {
        _E.CHECKED: (_D.PREPARED, (do.WriteJournal, do.Hold, do.Carry, say.Prepared, do.StartTimer)),
        _E.CHECKED_NONE: (_D.DISCARDED, (say.Prepared,)),
        _E.ABORT: (_D.DISCARDED, ()),
        _E.LINK_LOST: (_D.DISCARDED, ()),
    },
    _D.PREPARED: {
        _E.OFFER: (_D.RESTORING, (do.RestoreSilent, do.Discard)),
        _E.ABORT: _DROP,
        _E.QUERY: _DISCARD,
        _E.TIMEOUT: _DROP,
        _E.LINK_LOST: _DROP,
        _E.FAILED: _REFUSE,
        _E.RESTARTED: _DROP,
    },
    _D.RESTORING: {
        _E.RESTORED: (_D.COMMITTING, (do.WriteJournal, do.Claim)),
        _E.RESTORED_NONE: _DISCARD,
        _E.QUERY: _DISCARD,
        _E.KEPT: (_D.RESTORING, (do.Replay,)),
        _E.LINK_LOST: (_D.RESTORING, ()),  # the source may be dead: the more reason to go on
        _E.FAILED: _DISCARD,
    },
    _D.COMMITTING: {
        _E.WON: (_D.ACTIVE, _GO),
        _E.LOST: _DISCARD,
        _E.REGISTRY_FAILED: (_D.COMMITTING, (do.StartTimer,)),
        _E.TIMEOUT: (_D.COMMITTING, (do.Claim,)),
        _E.QUERY: (_D.COMMITTING, ()),  # the answer comes with the claim's
        _E.KEPT: (_D.COMMITTING, (do.Replay,)),
        _E.RELEASED: (_D.COMMITTING, ()),  # the registry told the source first; it will say so again
        _E.LINK_LOST: (_D.COMMITTING, ()),
        _E.FAILED: _DISCARD,  # the journal did not take it, so the claim was not made
        _E.RESTARTED: (_D.COMMITTING, (do.Rehold, do.Claim)),
    },
    _D.ACTIVE: {
        _E.RELEASED: (_D.SERVING, (do.Replay, do.Unclaim, do.Forget, say.Activated, do.StartTimer)),
        _E.QUERY: (_D.ACTIVE, (say.Committed,)),
        _E.KEPT: (_D.ACTIVE, (do.Replay,)),
        _E.LINK_LOST: (_D.ACTIVE, ()),
        _E.RESTARTED: (_D.ACTIVE, (do.LiftHold, do.Steer)),
        _E.RESOLVED: (_D.DONE, (do.Forget,)),  # the claims stay: they bind a source that comes back
    },
    _D.SERVING: {
        _E.RELEASED: (_D.SERVING, (do.Replay, say.Activated)),
        _E.KEPT: (_D.SERVING, (do.Replay,)),
        _E.QUERY: (_D.SERVING, ()),  # an old one, overtaken: the source knows
        _E.LINK_LOST: (_D.SERVING, ()),
        _E.TIMEOUT: (_D.DONE, ()),
    },
    _D.DONE: {},
    _D.DISCARDED: {},
}

_STAYED = "it had stayed at the source"
_WHY: Mapping[type[Event], str] = {
    on_event.Claimed: "the registry had given it back to the source",
    on_event.LinkLost: "the stream to the source broke",
    on_event.Restarted: "the agent was restarted",
    on_event.Timeout: "no record came in time",
    say.Abort: "the source gave up",
    say.Offer: "the source left it out of its offer",
    say.Query: "the source asked before it was committed",
}


class DestinationHandoff(Machine):
    """One batch of connections on its way to this host. Its first event is Prepare, or what the source still asks."""

    role = "destination"
    TRANSITIONS = TRANSITIONS

    def __init__(
        self,
        batch: bytes,
        peer: str,
        *,
        journal: str = "",
        registry: str = "",
        others: frozenset[bytes] | None = None,
        times: Times = DEFAULT_TIMES,
    ) -> None:
        """``journal``: identity of this agent's journal; ``registry``: that of the registry used here, or empty.

        ``others``: the journal remembers that the batch came here and is over, all but these; None: it does not.
        """
        super().__init__(batch, peer, times=times)
        self.journal = journal
        self.others = others
        self.registry = registry
        self.patience = 0.0
        self.records: Mapping[bytes, bytes] | None = None  # offered, and not yet in the journal
        self.rebuilt = False

    def _check(self, message: say.Message) -> None:
        super()._check(message)
        if isinstance(message, say.Prepare | say.Offer | say.Query):
            ids = {connection.id for connection in message.connections}
            if not ids or len(ids) != len(message.connections):
                raise RemoteError("the message names no connection, or one of them twice")
            if isinstance(message, say.Offer):
                known = self.moving if self.connections else message.connections
                if ids != set(message.records) or not set(known).issuperset(message.connections):
                    raise RemoteError("the offer does not fit what was prepared")

    def _classify(self, event: Event) -> DestinationEvent:
        match event:
            case say.Query() if self.state is _D.ABSENT and self.others is not None:
                return _E.QUERY_AGAIN
            case on_event.Checked(refused=refused):
                return _E.CHECKED_NONE if self._all_refused(refused) else _E.CHECKED
            case on_event.Restored(refused=refused):
                return _E.RESTORED_NONE if self._all_refused(refused) else _E.RESTORED
            case on_event.Claimed(lost=lost):
                return _E.LOST if all(connection.id in lost for connection in self.moving) else _E.WON
        try:
            return _NAMED[type(event)]
        except KeyError:
            raise self._unexpected(event) from None

    def _absorb(self, event: Event) -> None:
        match event:
            case say.Prepare():
                self.connections = event.connections
                self.steer = event.steer
                self.patience = event.patience
                self.shared = bool(event.registry) and event.registry == self.registry
            case say.Offer() | say.Query() if self.state is _D.ABSENT:
                self.connections = event.connections
                self._refuse(dict.fromkeys(self.others or (), _STAYED))
            case say.Offer():
                self.records = event.records
                offered = {connection.id for connection in event.connections}
                self._refuse({c.id: _WHY[say.Offer] for c in self.moving if c.id not in offered})
            case on_event.Checked() | on_event.Restored():
                self._refuse(event.refused)
            case on_event.Claimed():
                self._refuse(dict.fromkeys(event.lost, _WHY[on_event.Claimed]))
            case on_event.Restarted():
                self.rebuilt = True

    def _entered(self, event: Event) -> None:
        if self.state is _D.DISCARDED:
            self._refuse_all(event.reason if isinstance(event, on_event.Failed) else _WHY.get(type(event), ""))

    def _write_journal(self, event: Event) -> do.Command:
        records, self.records = self.records, None
        return do.WriteJournal(self.row(), records)

    def _replay(self, event: say.Kept | say.Released) -> do.Command:
        return do.Replay(self.moving, event.kept)

    def _start_timer(self, event: Event) -> do.Command:
        seconds: Mapping[enum.Enum, float] = {
            _D.PREPARED: self.patience,
            _D.COMMITTING: self.times.ask,
            _D.SERVING: 2 * self.times.linger,
        }
        return self._timer(seconds[self.state])

    def _prepared(self, event: Event) -> do.Command:
        answer = say.Prepared(batch=self.batch, journal=self.journal, refused=self.refused, shared=self.shared)
        return do.Send(answer)

    def _committed(self, event: Event) -> do.Command:
        return do.Send(say.Committed(batch=self.batch, journal=self.journal, refused=self.refused))

    def _discarded(self, event: Event) -> do.Command:
        return do.Send(say.Discarded(batch=self.batch, journal=self.journal, refused=self.refused))

    BUILDERS: ClassVar[Builders] = {
        do.WriteJournal: _write_journal,
        do.Forget: Machine._forget,
        do.Check: lambda self, event: do.Check(self.connections),
        do.Hold: Machine._hold,
        do.Rehold: lambda self, event: do.Rehold(self.moving),
        do.LiftHold: lambda self, event: do.LiftHold(self.moving),
        do.Carry: lambda self, event: do.Carry(self.moving),
        do.RestoreSilent: lambda self, event: do.RestoreSilent(self.moving, event.records),
        do.Rebuild: lambda self, event: do.Rebuild(self.moving if self.rebuilt else ()),
        do.Discard: lambda self, event: do.Discard(self._not_moving()),
        do.Claim: lambda self, event: do.Claim(self.moving, self.shared),
        do.Unclaim: lambda self, event: do.Unclaim(self.connections if self.shared else ()),
        do.Steer: lambda self, event: do.Steer(self.moving, self.steer),
        do.Replay: _replay,
        do.Adopt: lambda self, event: do.Adopt(self.moving),
        do.Activate: lambda self, event: do.Activate(self.moving),
        do.StartTimer: _start_timer,
        say.Prepared: _prepared,
        say.Committed: _committed,
        say.Discarded: _discarded,
        say.Activated: lambda self, event: do.Send(say.Activated(batch=self.batch, journal=self.journal)),
    }


_NAMED: Mapping[type[Event], DestinationEvent] = {
    say.Prepare: _E.PREPARE,
    say.Offer: _E.OFFER,
    say.Abort: _E.ABORT,
    say.Query: _E.QUERY,
    say.Kept: _E.KEPT,
    say.Released: _E.RELEASED,
    on_event.RegistryFailed: _E.REGISTRY_FAILED,
    on_event.Timeout: _E.TIMEOUT,
    on_event.LinkLost: _E.LINK_LOST,
    on_event.Failed: _E.FAILED,
    on_event.Restarted: _E.RESTARTED,
    on_event.Resolved: _E.RESOLVED,
}
