"""Carries out what the source's machines want: connections leave this host."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from migrate import quiet
from migrate.agent.applications import Loan
from migrate.agent.caller import CALLER, HOLD, Taker
from migrate.agent.driver import Driver, Host, tuples_of
from migrate.agent.engine import Again, Batch, Later, Stream
from migrate.agent.holds import FromAnotherThread
from migrate.agent.kept import readdressed
from migrate.agent.logging import get_logger
from migrate.agent.outbound import GIVEN, NOT_QUIET, Departure
from migrate.agent.steering import address_of
from migrate.agent.whereabouts import living, taken_again
from migrate.bulk import dump_many, release_many
from migrate.checkpoint import thaw
from migrate.errors import Error, Gone, HostError, RemoteError
from migrate.fourtuple import FourTuple
from migrate.handoff import commands as do
from migrate.handoff.events import Event, Frozen, Restarted, Start
from migrate.handoff.ids import Connection
from migrate.handoff.messages import Committed, Kept, Message, Offer, Released
from migrate.handoff.source import SourceHandoff
from migrate.kernel import sockopt
from migrate.kernel.priority import undisturbed
from migrate.selection import Found

__all__ = ["Departures"]

_GATHER = 0.001  # seconds in which what arrives is gathered, once something was sent on
_SETTLED = ("LINGERING", "MOVED", "SETTLING", "STAYED")  # the connection is not this batch's any more

_log = get_logger(__name__)


class Departures(Driver):
    """All batches on their way out, by id."""

    batches: dict[bytes, Departure]  # type: ignore[assignment]

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._gathering = False
        self._newest: dict[FourTuple, Departure] = {}  # the batch that began last, of each connection
        self.handlers |= {
            do.LiftHold: self._lift_hold,
            do.Freeze: self._freeze,
            do.Thaw: self._thaw,
            do.Release: self._release,
            do.Send: self._send,
            do.SendKept: self._send_kept,
            do.Ask: self._ask,
            do.Steer: self._steer,
            do.Report: self._report,
        }

    def begin(self, batch: Departure) -> None:
        """A new batch."""
        self.batches[batch.machine.batch] = batch
        self._newest.update(dict.fromkeys(tuples_of(batch.machine.connections), batch))
        self.host.metrics.batches("source", 1)
        if batch.stream is None:
            batch.stream = self.host.dial(batch.machine.peer)
        self.host.engine.give(batch, Start())

    def taker(self, offered: Callable[[Offer], None] | None = None, *, copies: bool = False) -> Taker:
        """The destination of a batch that is dumped; `caller.Taker` has the parameters."""

        def say(message: Message) -> None:
            self.host.engine.call(partial(self.answer, taker, CALLER, message))

        taker = Taker(self.host.journal, say, offered, copies=copies)
        return taker

    def free(self, found: Sequence[Found]) -> list[Found]:
        """Those that are not on their way already, for another caller."""
        return [each for each in found if not self._busy(each.connection.four_tuple)]

    def _busy(self, four_tuple: FourTuple) -> bool:
        batch = self._newest.get(four_tuple)
        on_its_way = () if batch is None or batch.machine.state.name in _SETTLED else batch.machine.moving
        return any(connection.four_tuple == four_tuple for connection in on_its_way)

    def dumped(self, id: bytes, epoch: int) -> bool:
        """Whether a dump that is not over has let go of it. Raises RemoteError while that is being decided."""
        for batch in self.batches.values():
            if batch.machine.peer == CALLER and (id, epoch) in {(c.id, c.epoch) for c in batch.machine.connections}:
                if batch.machine.state.name in GIVEN:
                    return id not in batch.machine.refused
                if not batch.machine.over:
                    raise RemoteError("it is being decided at this moment", hint="ask again")
        return False

    def recover(self, row: do.Row) -> None:
        """A batch of an earlier agent."""
        times = self.host.times
        if row.peer == CALLER:
            times = msgspec.structs.replace(times, linger=HOLD)
        batch = self.batches[row.batch] = Departure(SourceHandoff.recover(row, times), self)
        self._newest.update(dict.fromkeys(tuples_of(row.connections), batch))
        if row.peer == CALLER:
            batch.stream = self.taker()
        self.host.metrics.batches("source", 1)
        self.host.holds.claim(row.batch, tuples_of(row.connections))
        if path := self.host.adopters.application(row.connections[0].four_tuple):
            batch.loan = Loan(path, self.host.adopters, {})
        batch.sockets.update(taken_again(tuples_of(row.connections)))
        self.host.engine.give(batch, Restarted())

    def answer(self, stream: object, peer: str, message: Message) -> None:
        """What a destination says."""
        batch = self.batches.get(message.batch)
        if batch is not None and batch.machine.peer == peer:
            batch.stream = stream  # type: ignore[assignment]
            if isinstance(message, Committed) and not batch.active_at:
                batch.active_at = time.monotonic_ns()
            self.host.engine.give(batch, message)

    def kept(self) -> None:
        """Segments may have come for batches that send them on."""
        if not self._gathering:
            for batch in self.batches.values():
                if batch.sending:
                    self._send_on(batch)

    def _gathered(self) -> None:
        self._gathering = False
        self.kept()

    def lost(self, stream: Stream) -> None:
        """That stream has broken."""
        waiting = {batch.turns for batch in self.batches.values() if batch.turns and batch.stream is stream}
        super().lost(stream)
        for turns in waiting:
            turns.look()

    def ended(self, batch: Batch) -> None:
        """See `engine.Performer`."""
        known = self.batches.pop(batch.machine.batch, None)
        if known is not None:
            for each in tuples_of(known.machine.connections):
                if self._newest.get(each) is known:
                    del self._newest[each]
            known.close()
            self.host.metrics.batches("source", -1)
            if not self.batches:
                with contextlib.suppress(Error):
                    self.host.carrier.drop_unused(self.host.holds.addresses())

    def _forget(self, batch: Departure, command: do.Forget) -> Again | None:  # type: ignore[override]
        if batch.machine.peer == CALLER:  # nobody will say where they live now: the kernel ends this hold by itself
            gone = [each.four_tuple for each in command.connections if each.id in command.moved]
            self.host.holds.expire(batch.machine.batch, gone, batch.machine.times.linger)
        return super()._forget(batch, command)

    def _hold(self, batch: Departure, command: do.Hold) -> Again | None:  # type: ignore[override]
        if batch.machine.over:  # before its turn came
            return None
        if batch.turns is not None and not batch.turns.come(batch):
            return Again("others go first", by_itself=False)
        if batch.loan is not None:  # when the application has answered
            return None
        batch.passed("prepare")
        batch.frozen_at = time.monotonic_ns()
        if batch.when_quiet is None:
            super()._hold(batch, command)
        return None

    def _freeze(self, batch: Departure, command: do.Freeze) -> Event | Later | Again | None:
        if batch.machine.over:  # it was stopped meanwhile
            return None
        if batch.loan is not None:
            return self._freeze_lent(batch, batch.loan, command)
        if batch.when_quiet is not None:
            threading.Thread(target=self._freeze_quiet, args=(batch, command), name="quiet", daemon=True).start()
            return Later()
        return self._dumped(batch, command.connections, {})

    def _dumped(self, batch: Departure, connections: Sequence[Connection], refused: dict[bytes, str]) -> Frozen:
        records: dict[bytes, bytes] = {}
        there = [connection for connection in connections if connection.four_tuple in batch.sockets]
        dumped = dump_many([batch.sockets[connection.four_tuple] for connection in there])
        for connection, record in zip(there, dumped, strict=True):
            if isinstance(record, Error):
                refused[connection.id] = record.what
                if isinstance(record, Gone):
                    batch.gone.add(connection.id)
                continue
            record.id, record.epoch = connection.id, connection.epoch
            if connection.there is not None:
                record.local, record.local_port = connection.there.local, connection.there.local_port
            if batch.loan is not None:
                record.app = batch.loan.states[connection.four_tuple]
            records[connection.id] = record.encode()
            batch.frozen[connection.four_tuple] = record
        batch.record_bytes = sum(map(len, records.values()))
        self.host.metrics.record_bytes("source", batch.record_bytes)
        batch.passed("freeze")
        batch.left_out = refused
        return Frozen(records, refused)

    def _freeze_lent(self, batch: Departure, loan: Loan, command: do.Freeze) -> Event | Again | None:
        """The application is asked first, in a thread: so long its connections are in use. Then this comes again."""
        if not loan.asked:

            def ask() -> None:
                loan.ask()
                self.host.engine.call(partial(self.host.engine.resume, batch))

            threading.Thread(target=ask, name="ask", daemon=True).start()
            return Again("its application is asked", by_itself=False)
        given = [each for each in command.connections if each.four_tuple in loan.states]
        batch.passed("prepare")
        batch.frozen_at = time.monotonic_ns()
        self.host.holds.hold(batch.machine.batch, tuples_of(given))
        return self._dumped(
            batch, given, {c.id: why for c in command.connections if (why := loan.refused.get(c.four_tuple))}
        )

    def _freeze_quiet(self, batch: Departure, command: do.Freeze) -> None:
        # In a thread of its own: the first that become quiet are dumped, the others are told to try again.
        engine, sockets = self.host.engine, dict(batch.sockets)
        ready: list[FourTuple] = []
        held = FromAnotherThread(engine, self.host.holds, batch.machine.batch)
        try:
            attempts = quiet.rounds(sockets, held, seconds=batch.when_quiet or 0, thorough=batch.thorough)
            ready = next(attempts, ([], False))[0]
        except Exception:
            _log.exception("waiting for a quiet point failed")
        chosen = [connection for connection in command.connections if connection.four_tuple in set(ready)]
        refused = {c.id: NOT_QUIET for c in command.connections if c not in set(chosen)}

        def go_on() -> None:
            batch.frozen_at = time.monotonic_ns()
            engine.resume(batch, self._dumped(batch, chosen, refused))

        engine.call(go_on)

    def _thaw(self, batch: Departure, command: do.Thaw) -> None:
        tuples = tuples_of(command.connections)
        for each in tuples:
            sock = batch.sockets.pop(each, None)
            if sock is not None:
                with sock, contextlib.suppress(Error, OSError):
                    if sockopt.in_repair(sock):
                        thaw(sock, batch.frozen.pop(each, None))
        self.host.holds.keep(batch.sent.take(set(tuples)))
        self.host.holds.lift(batch.machine.batch, tuples)
        if batch.loan is not None:
            batch.loan.keep(tuples)

    def _release(self, batch: Departure, command: do.Release) -> None:
        batch.passed("transfer")
        sockets = [batch.sockets.pop(each) for each in tuples_of(command.connections) if each in batch.sockets]
        # The owner wakes up at once. If it ran before repair mode is left, it would see EPERM instead of ECONNABORTED.
        with undisturbed():
            release_many(sockets)
        for sock in sockets:
            sock.close()
        batch.frozen.clear()
        if batch.loan is not None:
            batch.loan.gone(tuples_of(command.connections))
        if batch.turns is not None:
            batch.turns.decided(batch)

    def _send(self, batch: Departure, command: do.Send) -> None:  # type: ignore[override]
        super()._send(batch, command)
        if isinstance(command.message, Offer):
            batch.sending = True
            self.host.engine.later(_GATHER, self.kept)  # what came meanwhile; first the offer

    def _send_kept(self, batch: Departure, command: do.SendKept) -> None:
        if not command.dial:
            self._send_on(batch)
            return
        if batch.stream is None:
            batch.stream = self.host.dial(batch.machine.peer)
        batch.stream.send(Released(batch=batch.machine.batch, kept=self._kept(batch, command.connections)))
        batch.sending = True
        batch.sent.clear()
        batch.passed("release")

    def _send_on(self, batch: Departure) -> None:
        released = batch.machine.state.name in GIVEN
        if batch.stream is None or (batch.sent.full and not released):
            return  # it stays in the hold
        kept = self._kept(batch, batch.machine.moving, copy=not released)
        if kept:
            batch.stream.send(Kept(batch=batch.machine.batch, kept=kept))
            self._gathering = True
            self.host.engine.later(_GATHER, self._gathered)

    def _kept(self, batch: Departure, connections: Sequence[Connection], *, copy: bool = False) -> tuple[bytes, ...]:
        packets = self.host.holds.take(batch.machine.batch, tuples_of(connections))
        self.host.metrics.kept_packets("source", len(packets))
        if copy:
            batch.sent.add(packets)
        return readdressed(packets, connections)

    def _lift_hold(self, batch: Batch, command: do.LiftHold) -> None:
        self.host.holds.drop(batch.machine.batch, tuples_of(command.connections))  # they live elsewhere

    def _ask(self, batch: Departure, command: do.Ask) -> None:
        if batch.stream is None:
            batch.stream = self.host.dial(batch.machine.peer)
        batch.stream.send(command.message)

    def _steer(self, batch: Departure, command: do.Steer) -> Again | None:
        if not command.steer:
            return None
        gone = tuples_of(command.connections)
        try:
            owner = address_of(batch.machine.peer)
        except HostError:
            if not command.steer.startswith("vip:"):
                raise
            owner = b""
        if command.steer.startswith("vip:"):
            staying = {each.local for each in living(gone)} if batch.machine.refused else set()
            self.host.carrier.also(staying)
        self.host.steerer.give(command.steer, gone, owner, self.steered(batch))
        return None

    def _report(self, batch: Departure, command: do.Report) -> None:
        batch.active_at = batch.active_at or time.monotonic_ns()
        if command.outcome == "moved":
            for phase, _, length in batch.phases:
                self.host.metrics.phase("source", phase, length / 1e9)
        if command.outcome == "moved" and batch.frozen_at:
            self.host.metrics.frozen((batch.active_at - batch.frozen_at) / 1e9)
        self.host.metrics.connections("source", "stayed", len(command.refused) - len(batch.gone))
        self.host.metrics.connections("source", "gone", len(batch.gone))
        self.host.metrics.connections("source", "moved", len(batch.machine.connections) - len(command.refused))
        if batch.turns is not None:
            batch.turns.over(batch)
        batch.report(batch, command.outcome, command.refused)
