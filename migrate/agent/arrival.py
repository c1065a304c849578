"""Carries out what the destination's machines want: connections come to this host."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec

from migrate.adopt.spawner import Gate
from migrate.adopt.unix import AppAdoption
from migrate.agent import admission
from migrate.agent.adoption import Rule, open_gate, speaks
from migrate.agent.applications import offer
from migrate.agent.caller import CALLER, Giver
from migrate.agent.driver import Driver, Handoff, Host, tuples_of
from migrate.agent.engine import Again, Batch, Later, Stream
from migrate.agent.kept import EARLY
from migrate.agent.logging import get_logger
from migrate.agent.steering import address_of
from migrate.errors import Conflict, Error, HostError, RecordError, RemoteError
from migrate.fourtuple import FourTuple
from migrate.handoff import commands as do
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.events import Checked, Event, Restarted
from migrate.handoff.events import Restored as Built
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.messages import Message, Offer, Prepare, Query
from migrate.ici import Ici
from migrate.kernel import uapi
from migrate.kernel.diag import SockDiag
from migrate.kernel.segment import four_tuple
from migrate.rebuild import activate_many, restore_many
from migrate.restore import Restored, discard
from migrate.tcpstate import TcpState

__all__ = ["Arrival", "Arrivals"]

_STATE = "its application's state needs an application at the destination (--adopt LOCAL=unix:PATH)"
_OFFER_AGAIN = 1.0  # seconds until an application is offered again what it did not take

_log = get_logger(__name__)


class Arrival(Handoff):
    """One batch on its way here. ``source`` is where its agent speaks from, "HOST:PORT" or "unix:…"."""

    machine: DestinationHandoff

    def __init__(self, machine: DestinationHandoff, driver: Arrivals) -> None:
        super().__init__(machine, driver)
        self.source = ""
        self.gates: list[Gate] = []
        self.offers: dict[FourTuple, AppAdoption] = {}  # what applications took
        self.offering = False  # beside the commands, after a restart
        self.kept: list[bytes] = []  # by the source's hold, for sockets that are not active yet
        self.room = EARLY
        self.active = False


class Arrivals(Driver):
    """All batches on their way here, by the authenticated name of the source, and id."""

    batches: dict[tuple[str, bytes], Arrival]  # type: ignore[assignment]

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._checking: dict[bytes, Arrival] = {}
        self._diag = SockDiag()
        self.handlers |= {
            do.Check: self._check,
            do.WriteJournal: self._write_journal,
            do.Carry: self._carry,
            do.RestoreSilent: self._restore,
            do.Rebuild: self._rebuild,
            do.Discard: self._discard,
            do.Replay: self._replay,
            do.Adopt: self._adopt,
            do.Activate: self._activate,
            do.Steer: self._steer,
        }

    def close(self) -> None:
        """Close what is open, without a word to any peer."""
        self._diag.close()
        for batch in self.batches.values():
            for sock in batch.sockets.values():
                discard(sock)

    def recover(self, row: do.Row) -> None:
        """A batch of an earlier agent."""
        batch = self.batches[row.peer, row.batch] = Arrival(DestinationHandoff.recover(row, self.host.times), self)
        batch.source = row.source
        batch.active = row.state == "ACTIVE"
        self.host.metrics.batches("destination", 1)
        self.host.holds.claim(row.batch, tuples_of(row.connections))
        if row.peer == CALLER:
            batch.stream = self._giver()
        self.host.engine.give(batch, Restarted())
        if row.peer == CALLER:
            self.host.engine.give(batch, Query(batch=row.batch, connections=row.connections))

    def restore(self, offer: Offer, ended: Callable[[Mapping[bytes, str]], None]) -> None:
        """A batch that a caller brings; ``ended`` is told the ids of those that were refused, and why."""
        prepare = Prepare(batch=offer.batch, connections=offer.connections)
        self.heard(self._giver(offer, ended), "", prepare)

    def _giver(
        self, offer: Offer | None = None, ended: Callable[[Mapping[bytes, str]], None] = lambda _: None
    ) -> Giver:
        def say(message: Message) -> None:
            self.host.engine.call(partial(self.heard, giver, "", message))

        giver = Giver(say, offer, ended)
        return giver

    def heard(self, stream: Stream, source: str, message: Message) -> None:
        """What a source says, on ``stream`` from the address ``source``."""
        key = stream.peer, message.batch
        batch = self.batches.get(key)
        if batch is None:
            host = self.host
            registry = host.registry.identity if host.registry is not None else ""
            machine = DestinationHandoff(
                message.batch,
                stream.peer,
                journal=host.journal.identity,
                registry=registry,
                others=host.journal.others(message.batch) if isinstance(message, Query) else None,
                times=host.times,
            )
            batch = self.batches[key] = Arrival(machine, self)
            host.metrics.batches("destination", 1)
        batch.stream, batch.source = stream, source
        self.host.engine.give(batch, message)

    def forward(self, tuples: Sequence[FourTuple], owner: bytes, done: Callable[[], None]) -> None:
        """The host with that packed address owns these, this one has their address. ``done`` is called in the end."""
        ours = {each.four_tuple for each in self._diag.list_connections()}
        self.host.steerer.give("forward", [each for each in tuples if each not in ours], owner, done)

    def verdict(self, id_: bytes, epoch: int) -> bool:
        """Whether that epoch of that connection was committed here. If not, it never will be after this question.

        Raises RemoteError while it is being decided.
        """
        for batch in list(self.batches.values()):
            machine = batch.machine
            if not any((each.id, each.epoch) == (id_, epoch) for each in machine.connections):
                continue
            if machine.state.name == "COMMITTING":
                raise RemoteError("it is being decided at this moment", hint="ask again")
            if machine.state.name in ("ACTIVE", "SERVING", "DONE"):
                return id_ not in machine.refused
            self.host.engine.give(batch, Query(batch=machine.batch, connections=machine.connections))
            return False
        asked = Connection(id_, epoch, FourTuple(b"", 0, b"", 0))
        if self.host.journal.committed(asked):
            return True
        self.host.journal.forget(new_id(), DestinationHandoff.role, [asked], frozenset())
        return False

    def ended(self, batch: Batch) -> None:
        """See `engine.Performer`."""
        key = batch.machine.peer, batch.machine.batch
        known = self.batches.pop(key, None)
        if known is not None:
            for sock in known.sockets.values():
                discard(sock)
            self.host.metrics.batches("destination", -1)
            if not self.batches:
                with contextlib.suppress(Error):
                    self.host.carrier.drop_unused()

    def _write_journal(self, batch: Arrival, command: do.WriteJournal) -> None:  # type: ignore[override]
        # What stays at the source is forwarded there also by an agent that was restarted and has not heard from it.
        self.host.journal.write(msgspec.structs.replace(command.row, source=batch.source), command.records)

    def _check(self, batch: Arrival, command: do.Check) -> Checked:
        if batch.machine.steer:
            self.host.steerer.warm(batch.machine.steer)
        return Checked(self.refusals(command.connections, batch.machine.steer, batch.source))

    def refusals(self, connections: Sequence[Connection], steer: str, source: str) -> dict[bytes, str]:
        """See `admission.refusals`."""
        return admission.refusals(self.host, self._diag, connections, steer, source)

    def _hold(self, batch: Batch, command: do.Hold) -> None:
        # What arrives. Nothing departs before a socket is there, and of those that are built few could say anything.
        self.host.holds.hold(batch.machine.batch, tuples_of(command.connections), outgoing=False)

    def _carry(self, batch: Arrival, command: do.Carry) -> None:
        self.host.carrier.carry({each.local for each in tuples_of(command.connections)})

    def _restore(self, batch: Arrival, command: do.RestoreSilent) -> Event | Later:
        self.host.metrics.record_bytes("destination", sum(map(len, command.records.values())))
        refused = self._build(batch, command.connections, command.records)
        ids = {connection.four_tuple: connection.id for connection in command.connections}
        for each, sock in batch.sockets.items():
            has_state = isinstance(sock, Restored) and sock.record is not None and sock.record.app
            if has_state and self.host.adopters.application(each) is None:
                refused[ids[each]] = _STATE
        # Before the commit: what an application does not take can still stay where it is.
        offered = self._not_offered(batch, [each for each in ids if ids[each] not in refused])
        if not offered:
            return Built(refused)

        def answered(taken: Mapping[FourTuple, AppAdoption], why: Mapping[FourTuple, str]) -> None:
            batch.offers |= taken
            self.host.engine.resume(batch, Built(refused | {ids[each]: what for each, what in why.items()}))

        offer(self.host.engine, self.host.adopters, offered, answered)
        return Later()

    def _not_offered(self, batch: Arrival, connections: Iterable[FourTuple]) -> dict[FourTuple, socket.socket]:
        """The silent sockets among these that are for an application which has not taken them."""
        return {
            each: batch.sockets[each]
            for each in connections
            if each in batch.sockets and each not in batch.offers and self.host.adopters.application(each) is not None
        }

    def _build(
        self, batch: Arrival, connections: Sequence[Connection], records: Mapping[bytes, bytes]
    ) -> dict[bytes, str]:
        refused: dict[bytes, str] = {}
        good: list[tuple[Connection, Ici]] = []
        for connection in connections:
            try:
                record = Ici.decode(records[connection.id])
                said = record.id, record.epoch, (record.local, record.local_port, record.remote, record.remote_port)
                if said != (connection.id, connection.epoch, connection.four_tuple):
                    raise Conflict("its record is of another connection")
            except Error as error:
                refused[connection.id] = error.what
            else:
                good.append((connection, record))
        if timed := [connection.four_tuple for connection, record in good if _has_timers(record)]:
            self.host.holds.hold(batch.machine.batch, timed)
        built = restore_many([record for _, record in good], activate=False)
        for (connection, record), sock in zip(good, built, strict=True):
            if isinstance(sock, Error):
                refused[connection.id] = sock.what
            else:
                batch.sockets[connection.four_tuple] = sock
                if self.host.paths is not None:
                    # What was learnt grows old from the dump on. A transfer takes next to no time, a restart does not.
                    age = time.time() - record.origin_time / 1e9 if batch.machine.rebuilt else 0.0
                    self.host.paths.carry(sock, age=max(age, 0.0))
        return refused

    def _rebuild(self, batch: Arrival, command: do.Rebuild) -> Again | None:
        try:
            records = self.host.journal.records(batch.machine.batch)
        except RecordError as error:
            # The key was lost: the host was rebooted. Those that are not with an adopter are nowhere, for good.
            lost = [each for each in tuples_of(command.connections) if not self._diag.exists(each)]
            _log.error("connections are lost: their records cannot be read", why=str(error), connections=lost)
            return None
        try:
            self.host.carrier.carry({each.local for each in tuples_of(command.connections)})
        except Error as error:
            return Again(str(error))
        missing = []
        waiting = False
        for connection in command.connections:
            if connection.four_tuple in batch.sockets:
                continue
            found = self._diag.exists(connection.four_tuple)
            if not found:
                missing.append(connection)
            elif not speaks(connection.four_tuple):
                waiting = True  # an adopter that is just closing its gate
        refused = self._build(batch, missing, records)
        if refused or waiting:
            return Again(next(iter(refused.values()), "an adopter still has a silent socket"))
        return None

    def _discard(self, batch: Arrival, command: do.Discard) -> None:
        for each in tuples_of(command.connections):
            sock = batch.sockets.pop(each, None)
            if adoption := batch.offers.pop(each, None):
                adoption.abort()
            if sock is not None:
                discard(sock)
        self.host.holds.drop(batch.machine.batch, tuples_of(command.connections))

    def _adopt(self, batch: Arrival, command: do.Adopt) -> Again | None:
        rebuilt = self._not_offered(batch, tuples_of(command.connections))
        if rebuilt:  # after a restart. There is no way back: it is offered until it is taken
            if not batch.offering:
                batch.offering = True
                offer(self.host.engine, self.host.adopters, rebuilt, partial(self._offered_again, batch))
            return Again("offered to its application", by_itself=False)
        groups: dict[Rule, list[socket.socket]] = {}
        for connection in command.connections:
            sock = batch.sockets.get(connection.four_tuple)
            rule = self.host.adopters.rule_for(connection.four_tuple)
            if sock is None or rule is None:
                continue
            batch.cookies[_cookie(sock)] = connection.id
            if connection.four_tuple not in batch.offers:
                groups.setdefault(rule, []).append(sock)
        for rule, sockets in groups.items():
            batch.gates.append(self.host.adopters.adopt(rule, sockets))
        return None

    def _offered_again(
        self, batch: Arrival, taken: Mapping[FourTuple, AppAdoption], refused: Mapping[FourTuple, str]
    ) -> None:
        batch.offering = False
        batch.offers |= taken
        if refused:
            _log.warning("not taken yet", batch=batch.machine.batch.hex(), why=next(iter(refused.values())))
            self.host.engine.later(_OFFER_AGAIN, partial(self.host.engine.resume, batch))
        else:
            self.host.engine.resume(batch)

    def _replay(self, batch: Arrival, command: do.Replay) -> None:
        theirs = set(tuples_of(command.connections))
        packets = [packet for packet in command.kept if _about(packet) in theirs]
        self.host.metrics.kept_packets("destination", len(packets))
        if batch.active:
            self.host.holds.keep(packets)
            self.host.holds.replay(batch.machine.batch, list(theirs))
            return
        # A socket that is not active yet would acknowledge what a crash makes it forget: they wait for Activate.
        batch.room -= sum(map(len, packets))
        if batch.room >= 0:
            batch.kept += packets

    def _activate(self, batch: Arrival, command: do.Activate) -> None:
        tuples = tuples_of(command.connections)
        self.host.holds.open(batch.machine.batch, tuples)
        there = [each for each in tuples if each in batch.sockets]
        for each, error in zip(there, activate_many([batch.sockets[each] for each in there]), strict=True):
            if error is not None:
                _log.warning("activation failed", connection=each, why=str(error))
        batch.active = True
        self.host.holds.keep(batch.kept)
        batch.kept.clear()
        try:
            self.host.holds.replay(batch.machine.batch, tuples)
        except HostError as error:
            _log.warning("replay failed", why=str(error))
        for gate in batch.gates:
            open_gate(self.host.engine, gate)
        batch.gates.clear()
        for adoption in batch.offers.values():
            try:
                adoption.go()
            except HostError as error:
                _log.error("adoption failed", why=str(error))
        batch.offers.clear()
        batch.close()

    def _forget(self, batch: Arrival, command: do.Forget) -> Again | None:  # type: ignore[override]
        again = super()._forget(batch, command)
        if batch.cookies and again is None:
            self.host.metrics.connections("destination", "moved", len(command.moved))
            batch.cookies = {}
        return again

    def _steer(self, batch: Arrival, command: do.Steer) -> None:
        if not command.steer:
            return
        mine = tuples_of(command.connections)
        refused = [c.four_tuple for c in batch.machine.connections if c.id in batch.machine.refused]
        try:
            owner = address_of(batch.source)
        except HostError:
            refused, owner = [], b""
        self.host.steerer.take(command.steer, mine, refused, owner, self.steered(batch))


def _has_timers(record: Ici) -> bool:
    """Whether a silent socket of it might send something by itself, if it is silent for long."""
    idle = record.state == TcpState.ESTABLISHED and not (record.sent or record.unsent)
    return not idle or "SO_KEEPALIVE" in record.options


def _about(packet: bytes) -> FourTuple | None:
    try:
        return four_tuple(packet)
    except Error:
        return None


def _cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, uapi.SO_COOKIE, 8), "little")
