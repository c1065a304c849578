"""Carries out what both sides' machines want alike; `departure` and `arrival` do the rest.

Everything here runs in the engine's thread.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from migrate.agent.adoption import Adopters
from migrate.agent.caller import CALLER
from migrate.agent.carry import Carrier
from migrate.agent.engine import Again, Batch, Engine, Later, Performer, Stream
from migrate.agent.events import Events
from migrate.agent.holds import Holds
from migrate.agent.logging import get_logger
from migrate.agent.metrics import Metrics
from migrate.agent.steering import Steerer
from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.handoff import commands as do
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.events import Claimed, Event, LinkLost, RegistryFailed
from migrate.handoff.ids import Connection
from migrate.handoff.journal import Journal
from migrate.handoff.machine import DEFAULT_TIMES, Machine, Times
from migrate.handoff.messages import Prepare, Prepared
from migrate.handoff.registry import OwnershipRegistry
from migrate.pathstate import PathState

__all__ = ["Driver", "Handler", "Handoff", "Host", "tuples_of"]

_log = get_logger(__name__)


@dataclass
class Host:
    """What an agent has: the engine's thread owns it."""

    engine: Engine
    journal: Journal
    holds: Holds
    carrier: Carrier
    steerer: Steerer
    adopters: Adopters
    metrics: Metrics
    dial: Callable[[str], Stream]
    forward: Callable[[str, Iterable[FourTuple]], Awaitable[None]]  # as `link.Links.forward`, in the event loop
    check: Callable[[str, Prepare], Awaitable[Prepared]]  # as `link.Links.check`, there too
    events: Events
    paths: PathState | None = None
    registry: OwnershipRegistry | None = None
    times: Times = DEFAULT_TIMES


class Handoff(Batch):
    """A batch and the sockets that its commands act on."""

    def __init__(self, machine: Machine, driver: Performer) -> None:
        super().__init__(machine, driver)
        self.sockets: dict[FourTuple, socket.socket] = {}
        self.cookies: dict[int, bytes] = {}  # of sockets that came here, and their connections' ids
        self.steering = False  # beside the commands

    def close(self) -> None:
        """Close our descriptors: only where others have them too, or they are silent."""
        for sock in self.sockets.values():
            sock.close()
        self.sockets.clear()


Handler = Callable[[Any, Any], Event | Later | Again | None]


def tuples_of(connections: Iterable[Connection]) -> list[FourTuple]:
    """Their four-tuples."""
    return [connection.four_tuple for connection in connections]


class Driver:
    """Common to both sides. ``handlers`` maps each kind of command to what carries it out."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.batches: dict[Any, Handoff] = {}
        self.handlers: dict[type[do.Command], Handler] = {
            do.WriteJournal: self._write_journal,
            do.Forget: self._forget,
            do.Hold: self._hold,
            do.Rehold: self._rehold,
            do.LiftHold: self._lift_hold,
            do.Claim: self._claim,
            do.Unclaim: self._unclaim,
            do.Send: self._send,
            do.StartTimer: self._start_timer,
        }

    def perform(self, batch: Batch, command: do.Command) -> Event | Later | Again | None:
        """See `engine.Performer`."""
        return self.handlers[type(command)](batch, command)

    def lost(self, stream: Stream) -> None:
        """That stream has broken."""
        for batch in list(self.batches.values()):
            if batch.stream is stream:
                batch.stream = None
                self.host.engine.give(batch, LinkLost())

    def _write_journal(self, batch: Batch, command: do.WriteJournal) -> None:
        self.host.journal.write(command.row, command.records)

    def _forget(self, batch: Handoff, command: do.Forget) -> Again | None:
        if batch.steering:
            return Again("steering", by_itself=False)
        machine = batch.machine
        # A record that a caller could not restore is as good as before: only handoffs take a new epoch each time.
        again = machine.peer == CALLER and machine.role == DestinationHandoff.role
        self.host.journal.forget(
            command.batch, machine.role, command.connections, command.moved, sockets=batch.cookies, again=again
        )
        return None

    def _hold(self, batch: Batch, command: do.Hold) -> None:
        self.host.holds.hold(batch.machine.batch, tuples_of(command.connections))

    def _rehold(self, batch: Batch, command: do.Rehold) -> Again | None:
        try:
            self.host.holds.rehold(batch.machine.batch, tuples_of(command.connections))
        except Error as error:
            return Again(str(error))
        return None

    def _lift_hold(self, batch: Batch, command: do.LiftHold) -> None:
        self.host.holds.lift(batch.machine.batch, tuples_of(command.connections))

    def _claim(self, batch: Batch, command: do.Claim) -> Event:
        if not command.shared:
            return Claimed(frozenset())
        try:
            assert self.host.registry is not None
            return Claimed(self.host.registry.claim(command.connections, self.host.journal.identity))
        except Error as error:
            _log.warning("the registry does not answer", why=str(error))
            return RegistryFailed()

    def _unclaim(self, batch: Batch, command: do.Unclaim) -> None:
        if self.host.registry is not None:
            self.host.registry.unclaim(command.connections)

    def _send(self, batch: Batch, command: do.Send) -> None:
        if batch.stream is not None:
            batch.stream.send(command.message)

    def _start_timer(self, batch: Batch, command: do.StartTimer) -> None:
        self.host.engine.start_timer(batch, command.seconds, command.serial)

    def steered(self, batch: Handoff) -> Callable[[], None]:
        """Steering begins beside the batch's commands; what to call, from any thread, when it has ended."""
        batch.steering = True

        def ended() -> None:
            batch.steering = False
            self.host.engine.resume(batch)

        return lambda: self.host.engine.call(ended)

    def ended(self, batch: Batch) -> None:
        """See `engine.Performer`."""
        raise NotImplementedError
