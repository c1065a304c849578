"""The source's side of a handoff: the machine that lets connections go.

Its law is one sentence: from the moment its journal says OFFERED it does not thaw a connection on its own word. It asks
the destination; where the destination cannot be asked and a registry is shared, it asks that.

Only the table, what an event means in it, and how its commands are made may live here. Why: docs/handoff.md.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from migrate.handoff import commands as do
from migrate.handoff import events as on_event
from migrate.handoff import messages as say
from migrate.handoff.events import Event
from migrate.handoff.ids import Connection
from migrate.handoff.machine import DEFAULT_TIMES, Builders, Machine, Table, Times

__all__ = ["SourceEvent", "SourceHandoff", "SourceState"]


class SourceState(enum.Enum):
    """Where a batch stands at the source."""

    NEW = "nothing has been done"
    PREPARING = "the destination is asked whether it can take them"
    FREEZING = "held, and being dumped"
    OFFERED = "frozen, and the records are sent: the destination decides"
    DOUBT = "frozen; the destination is asked again and again what it decided"
    CLAIMING = "frozen; the registry is asked"
    SETTLING = "thawed by the registry's word; the destination has yet to hear it"
    RELEASED = "let go of; the destination has yet to say that it knows"
    LINGERING = "both know; late segments are still sent on"
    MOVED = "over: they live at the destination"
    STAYED = "over: they live here"


class SourceEvent(enum.Enum):
    """What can happen to it."""

    START = "the agent begins"
    RESTARTED = "the agent was restarted and found the row"
    PREPARED = "the destination takes some or all"
    PREPARED_NONE = "the destination takes none"
    FROZEN = "some or all are frozen and dumped"
    FROZEN_NONE = "none could be frozen"
    COMMITTED = "the destination owns some or all"
    DISCARDED = "the destination owns none and never will"
    ACTIVATED = "they run at the destination, which need not hear of them again"
    WON = "the registry gives all to this side"
    LOST = "the registry had given some or all to the destination"
    REGISTRY_FAILED = "the registry does not answer"
    TIMEOUT = "the timer has run down"
    EXHAUSTED = "the timer has run down, asked often enough, and a registry is shared"
    LINK_LOST = "the stream has broken"
    FAILED = "a command could not be carried out"
    CANCEL = "the caller wants it stopped"
    RESOLVED_HERE = "an operator says: the destination is gone and had not committed"
    RESOLVED_THERE = "an operator says: the destination is gone and had committed"


_S = SourceState
_E = SourceEvent

_RELEASE = (_S.RELEASED, (do.WriteJournal, do.Release, do.SendKept, do.Steer, do.Thaw, do.StartTimer))
_STAY = (_S.STAYED, (do.Thaw, do.Forget, do.Report))
_STAY_UNCLAIMED = (_S.STAYED, (do.Thaw, do.Unclaim, do.Forget, do.Report))
_WITHDRAW = (_S.STAYED, (say.Abort, do.Forget, do.Report))
_GIVE_UP = (_S.STAYED, (say.Abort, do.Thaw, do.Forget, do.Report))
_ASK = (_S.DOUBT, (do.Ask, do.StartTimer))

TRANSITIONS: Table = {
    _S.NEW: {
        _E.START: (_S.PREPARING, (do.WriteJournal, say.Prepare, do.StartTimer)),
    },
    _S.PREPARING: {
        _E.PREPARED: (_S.FREEZING, (do.WriteJournal, do.Hold, do.Freeze)),
        _E.PREPARED_NONE: (_S.STAYED, (do.Forget, do.Report)),
        _E.TIMEOUT: _WITHDRAW,
        _E.LINK_LOST: _WITHDRAW,
        _E.CANCEL: _WITHDRAW,
        _E.FAILED: _WITHDRAW,
        _E.RESTARTED: _WITHDRAW,
    },
    _S.FREEZING: {
        _E.FROZEN: (_S.OFFERED, (do.WriteJournal, say.Offer, do.Thaw, do.StartTimer)),
        _E.FROZEN_NONE: _GIVE_UP,
        _E.LINK_LOST: _GIVE_UP,
        _E.CANCEL: _GIVE_UP,
        _E.FAILED: _GIVE_UP,
        # Not offered: or the row would say so. It may have been claimed by one that could not write it.
        _E.RESTARTED: _STAY_UNCLAIMED,
    },
    _S.OFFERED: {
        _E.COMMITTED: _RELEASE,
        _E.DISCARDED: _STAY,
        _E.TIMEOUT: _ASK,
        _E.LINK_LOST: _ASK,
        _E.FAILED: _ASK,
        _E.CANCEL: (_S.OFFERED, (say.Query,)),
        _E.RESTARTED: (_S.DOUBT, (do.Thaw, do.Rehold, do.Ask, do.StartTimer)),  # Thaw: those refused before the offer
    },
    _S.DOUBT: {
        _E.COMMITTED: _RELEASE,
        _E.DISCARDED: _STAY_UNCLAIMED,  # a claim may have been made that was not heard of
        _E.TIMEOUT: _ASK,
        _E.EXHAUSTED: (_S.CLAIMING, (do.Claim,)),
        _E.LINK_LOST: (_S.DOUBT, ()),
        _E.CANCEL: (_S.DOUBT, ()),
        _E.RESOLVED_HERE: _STAY,
        _E.RESOLVED_THERE: _RELEASE,
    },
    _S.CLAIMING: {
        _E.WON: (_S.SETTLING, (do.Thaw, do.WriteJournal, do.Report, do.Ask, do.StartTimer)),
        _E.LOST: _RELEASE,
        _E.REGISTRY_FAILED: _ASK,
        _E.COMMITTED: (_S.CLAIMING, ()),  # the registry says the same in a moment
        _E.DISCARDED: (_S.CLAIMING, ()),
        _E.LINK_LOST: (_S.CLAIMING, ()),
        _E.CANCEL: (_S.CLAIMING, ()),
    },
    _S.SETTLING: {
        _E.DISCARDED: (_S.STAYED, (do.Unclaim, do.Forget)),
        _E.TIMEOUT: (_S.SETTLING, (do.Ask, do.StartTimer)),
        _E.LINK_LOST: (_S.SETTLING, ()),
        _E.CANCEL: (_S.SETTLING, ()),
        _E.RESTARTED: (_S.SETTLING, (do.Ask, do.StartTimer)),
        _E.RESOLVED_HERE: (_S.STAYED, (do.Forget,)),  # the claims stay: they bind a destination that comes back
    },
    _S.RELEASED: {
        _E.ACTIVATED: (_S.LINGERING, (do.Forget, do.Report, do.StartTimer)),
        _E.COMMITTED: (_S.RELEASED, ()),  # asked twice, answered twice
        _E.TIMEOUT: _RELEASE,
        _E.LINK_LOST: (_S.RELEASED, ()),
        _E.FAILED: (_S.RELEASED, (do.StartTimer,)),
        _E.CANCEL: (_S.RELEASED, ()),
        _E.RESTARTED: (_S.RELEASED, (do.Rehold, do.Release, do.SendKept, do.Steer, do.Thaw, do.StartTimer)),
        _E.RESOLVED_THERE: (_S.MOVED, (do.LiftHold, do.Forget, do.Report)),
    },
    _S.LINGERING: {
        _E.TIMEOUT: (_S.MOVED, (do.SendKept, do.LiftHold)),
        _E.ACTIVATED: (_S.LINGERING, ()),  # each Released is answered
        _E.LINK_LOST: (_S.LINGERING, ()),
        _E.CANCEL: (_S.LINGERING, ()),
    },
    _S.MOVED: {},
    _S.STAYED: {},
}

# Why the connections of a batch stay that nobody refused one by one.
_WHY: Mapping[type[Event], str] = {
    on_event.Cancel: "the move was stopped",
    on_event.Claimed: "the destination could not be asked, and the registry gave it back",
    on_event.Frozen: "it could not be frozen",
    on_event.LinkLost: "the stream to the destination broke",
    on_event.Resolved: "an operator gave it back",
    on_event.Restarted: "the agent was restarted",
    on_event.Timeout: "the destination did not answer in time",
    say.Discarded: "the destination discarded it",
}


class SourceHandoff(Machine):
    """One batch of connections on its way out of this host."""

    role = "source"
    TRANSITIONS = TRANSITIONS

    def __init__(
        self,
        batch: bytes,
        peer: str,
        connections: Sequence[Connection] = (),
        *,
        steer: str = "",
        registry: str = "",
        times: Times = DEFAULT_TIMES,
    ) -> None:
        """``peer`` names the destination's agent, ``registry`` is the identity of the registry used here, or empty."""
        super().__init__(batch, peer, times=times)
        self.connections = tuple(connections)
        self.steer = steer
        self.registry = registry
        self.asked = 0

    def _classify(self, event: Event) -> SourceEvent:
        match event:
            case say.Prepared(refused=refused):
                return _E.PREPARED_NONE if self._all_refused(refused) else _E.PREPARED
            case on_event.Frozen(records=records):
                return _E.FROZEN if records else _E.FROZEN_NONE
            case say.Committed(refused=refused):
                return _E.DISCARDED if self._all_refused(refused) else _E.COMMITTED
            case on_event.Claimed(lost=lost):
                return _E.LOST if lost else _E.WON
            case on_event.Timeout():
                exhausted = self.state is _S.DOUBT and self.shared and self.asked >= self.times.asks
                return _E.EXHAUSTED if exhausted else _E.TIMEOUT
            case on_event.Resolved(moved=moved):
                return _E.RESOLVED_THERE if moved else _E.RESOLVED_HERE
        try:
            return _NAMED[type(event)]
        except KeyError:
            raise self._unexpected(event) from None

    def _absorb(self, event: Event) -> None:
        match event:
            case say.Prepared():
                self._refuse(event.refused)
                self.shared = event.shared and bool(self.registry)
                self.journal = event.journal
            case on_event.Frozen():
                missing = {c.id: _WHY[on_event.Frozen] for c in self.moving if c.id not in event.records}
                self._refuse(missing | dict(event.refused))
            case say.Committed() | say.Discarded():
                self._refuse(event.refused)
            case on_event.Claimed():
                self._refuse({c.id: _WHY[on_event.Claimed] for c in self.moving if c.id not in event.lost})

    def _entered(self, event: Event) -> None:
        if self.state in (_S.STAYED, _S.SETTLING):
            self._refuse_all(event.reason if isinstance(event, on_event.Failed) else _WHY.get(type(event), ""))

    def _ask(self, event: Event) -> do.Command:
        self.asked += 1
        return do.Ask(self._query())

    def _query(self) -> say.Query:
        return say.Query(batch=self.batch, connections=_at_destination(self.connections))

    def _prepare(self, event: Event) -> do.Command:
        return do.Send(
            say.Prepare(
                batch=self.batch,
                connections=_at_destination(self.connections),
                steer=self.steer,
                registry=self.registry,
                patience=self.times.patience,
            )
        )

    def _offer(self, event: on_event.Frozen) -> do.Command:
        return do.Send(say.Offer(batch=self.batch, connections=_at_destination(self.moving), records=event.records))

    def _report(self, event: Event) -> do.Command:
        return do.Report("stayed" if self.state in (_S.STAYED, _S.SETTLING) else "moved", self.refused)

    def _start_timer(self, event: Event) -> do.Command:
        seconds: Mapping[enum.Enum, float] = {
            _S.PREPARING: self.times.prepare,
            _S.OFFERED: self.times.answer,
            _S.LINGERING: self.times.linger,
        }
        return self._timer(seconds.get(self.state, self.times.ask))

    BUILDERS: ClassVar[Builders] = {
        do.WriteJournal: lambda self, event: do.WriteJournal(self.row()),
        do.Forget: Machine._forget,
        do.Hold: Machine._hold,
        do.Rehold: lambda self, event: do.Rehold(self.moving),
        do.LiftHold: lambda self, event: do.LiftHold(self._chosen(self.held)),
        do.Freeze: lambda self, event: do.Freeze(self.moving),
        do.Thaw: lambda self, event: do.Thaw(self._not_moving()),
        do.Release: lambda self, event: do.Release(self.moving),
        do.SendKept: lambda self, event: do.SendKept(self.moving, self.batch, self.state is _S.RELEASED),
        do.Steer: lambda self, event: do.Steer(self.moving, self.steer),
        do.Claim: lambda self, event: do.Claim(self.moving, self.shared),
        do.Unclaim: lambda self, event: do.Unclaim(self.connections if self.shared else ()),
        do.Ask: _ask,
        do.StartTimer: _start_timer,
        do.Report: _report,
        say.Prepare: _prepare,
        say.Offer: _offer,
        say.Query: lambda self, event: do.Send(self._query()),
        say.Abort: lambda self, event: do.Send(say.Abort(batch=self.batch)),
    }


def _at_destination(connections: Iterable[Connection]) -> tuple[Connection, ...]:
    return tuple(connection.at_destination() for connection in connections)


_NAMED: Mapping[type[Event], SourceEvent] = {
    on_event.Start: _E.START,
    on_event.Restarted: _E.RESTARTED,
    on_event.RegistryFailed: _E.REGISTRY_FAILED,
    on_event.LinkLost: _E.LINK_LOST,
    on_event.Failed: _E.FAILED,
    on_event.Cancel: _E.CANCEL,
    say.Discarded: _E.DISCARDED,
    say.Activated: _E.ACTIVATED,
}
