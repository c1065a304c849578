"""What of a move goes to one destination: cut into batches, prepared well ahead, frozen a few batches at a time.

Belongs to the event loop, which decides what is begun; whose turn it is to stand still is decided in the engine's
thread (`turns`), so that no batch waits for the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from migrate.agent.admission import descriptors_left
from migrate.agent.applications import Lender, by_application, loan_of
from migrate.agent.departure import Departures
from migrate.agent.outbound import BUSY, NOT_QUIET, Departure
from migrate.agent.reports import Reporter, stayed
from migrate.agent.steering import FOREIGN, foreign
from migrate.agent.turns import Turns
from migrate.agent.v1 import types_pb2
from migrate.agent.whereabouts import others_at
from migrate.agent.wish import Wish
from migrate.errors import Conflict, Error, HostError, Refused, UsageError
from migrate.fourtuple import FourTuple
from migrate.handoff.events import Cancel
from migrate.handoff.ids import new_id
from migrate.handoff.machine import Times
from migrate.handoff.source import SourceHandoff
from migrate.selection import Found, Takers

__all__ = ["BATCH", "WINDOW", "Passage", "cut"]

BATCH = 128  # connections
BATCH_BYTES = 4 << 20  # of their queues
WINDOW = 2  # batches that stand still at a time
AHEAD, AHEAD_BYTES = 12_288, 256 << 20  # connections, and bytes of their queues, that are prepared or moving at a time
_ASKED = 4  # batches at a time about which the destination is asked: it has others to serve
_SHARE = 0.75  # of the descriptors that are left, at most, for connections that are prepared
_THOROUGH = 0.8  # of the time for quiet points: from then on it is looked longer, which holds connections for longer
PATIENCE = 30.0  # seconds until a batch that is not decided is reported as in doubt
_LOOK = 1.0  # seconds between two looks for such batches
_TOLD = 1.0  # seconds until the caller hears of what has moved: what stands still comes first


@dataclass(eq=False)
class _Part:
    """A batch from its beginning to its result."""

    found: Sequence[Found]
    size: int  # bytes of their queues
    asking: bool = True  # the destination has not answered
    batch: Departure | None = None
    quiet: float = 0.0


class Passage:
    """To ``destination``, the ``final`` one of the move or not. What it cannot move it reports, or gives back."""

    def __init__(
        self,
        departures: Departures,
        wish: Wish,
        destination: str,
        reporter: Reporter,
        *,
        takers: Takers,
        lenders: Mapping[FourTuple, Lender],
        final: bool,
    ) -> None:
        self._departures = departures
        self._engine = departures.host.engine
        self._wish = wish
        self._destination = destination
        self._final = final
        self._reporter = reporter
        self._takers = takers
        self._lenders = lenders
        self._by_vip = wish.steer.startswith("vip:")
        # Who waits for quiet points or for an application takes so long that what is prepared would grow old.
        self._slow = wish.when_quiet is not None or bool(lenders)
        self._ahead = max(WINDOW * BATCH, min(AHEAD, int(descriptors_left() * _SHARE)))
        self._deadline = time.monotonic() + (wish.when_quiet or 0)
        self._aborted = False
        self._came_back = False
        self._opened = False
        self._waiting: deque[Sequence[Found]] = deque()
        self._begun: set[_Part] = set()
        self._again: list[Found] = []
        self._moved: deque[tuple[_Part, Departure]] = deque()  # of which the caller has not heard
        self._told_at = time.monotonic()  # or since when the oldest of these has waited
        self._loop = asyncio.get_running_loop()
        self._news: deque[Callable[[], None]] = deque()
        self._changed = asyncio.Event()
        self._turns = Turns(self._engine, WINDOW, self._on_prepared)
        if wish.steer:
            departures.host.steerer.warm(wish.steer)

    async def run(self, found: Sequence[Found]) -> list[Found]:
        """Move these. Those that stayed, unless it is the final destination, may be tried elsewhere."""
        looking = self._loop.create_task(self._look())
        try:
            for group in _by_address(found) if self._by_vip else [found]:
                self._waiting.extend(self._cut(group))
                await self._move_waiting()
        finally:
            looking.cancel()
        return self._again

    async def _move_waiting(self) -> None:
        self._begin_more()
        while self._begun:
            await self._changed.wait()
            self._changed.clear()
            while self._news:
                self._news.popleft()()
            self._begin_more()
            while self._moved and not self._begun:
                self._report_oldest()
            if self._moved and time.monotonic() > self._told_at + _TOLD:
                self._report_oldest()  # no more at once: each takes a millisecond

    def abort(self) -> None:
        """Start nothing more; what is not offered stays."""
        self._aborted = True
        self._engine.call(partial(self._cancel, [part.batch for part in self._begun if part.batch is not None]))

    def _cancel(self, batches: Iterable[Departure]) -> None:
        for batch in batches:
            with contextlib.suppress(UsageError):  # it is over
                self._engine.give(batch, Cancel())
        self._turns.look()

    def _begin_more(self) -> None:
        while self._waiting and not self._aborted and self._room():
            last = self._by_vip and len(self._waiting) == 1
            if last and self._begun and (self._slow or self._came_back):
                break  # who else has the address is known when the others have left
            part = _Part(found := self._waiting.popleft(), sum(map(_queued, found)))
            last_of_others = last and bool(self._begun)
            self._begun.add(part)
            self._engine.call(partial(self._start, part, last, last_of_others))
        if self._aborted and self._waiting:
            self._leave([each for found in self._waiting for each in found], Refused("the move was stopped"))
            self._waiting.clear()
        if not self._opened and not any(part.asking for part in self._begun):
            self._opened = True
            self._engine.call(self._turns.open)

    def _room(self) -> bool:
        if self._slow:
            return len(self._begun) < WINDOW
        return (
            sum(part.asking for part in self._begun) < _ASKED
            and sum(len(part.found) for part in self._begun) + BATCH <= self._ahead
            and sum(part.size for part in self._begun) < AHEAD_BYTES
        )

    async def _look(self) -> None:
        """For batches that were not decided in time."""
        while True:
            await asyncio.sleep(_LOOK)
            for part in list(self._begun):
                batch = part.batch
                if batch is not None and batch.turn_at and time.monotonic() > batch.turn_at + PATIENCE + part.quiet:
                    self._ended(part, batch, "doubt", batch.machine.refused)
                    self._engine.call(partial(self._turns.over, batch))
            self._changed.set()

    def _tell(self, news: Callable[[], None]) -> None:
        # From the engine's thread, as what follows.
        self._news.append(news)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._changed.set)

    def _on_end(self, part: _Part, batch: Departure, outcome: str, refused: Mapping[bytes, str]) -> None:
        ended = partial(self._ended, part, batch, outcome, refused)
        soon = self._waiting or self._turns.idle or time.monotonic() > self._told_at + _TOLD
        if soon or refused or outcome != "moved":
            self._tell(ended)
        else:  # nobody waits for it, and to wake the loop up costs those time that stand still
            self._news.append(ended)

    def _on_prepared(self, batch: Departure) -> None:
        def prepared() -> None:
            for part in self._begun:
                if part.batch is batch:
                    part.asking = False

        self._tell(prepared)

    def _cut(self, found: Sequence[Found]) -> list[list[Found]]:
        """Batches, each of one application's connections, or of those that no application lends."""
        return [batch for group in by_application(found, self._lenders) for batch in cut(group)]

    def _start(self, part: _Part, last: bool, others: bool) -> None:
        # ``last``: nobody waits who could be begun; ``others`` are on their way.
        try:
            batch = self._departure(part, last, others)
        except Error as error:
            self._tell(partial(self._failed, part, error))
            return
        self._tell(partial(self._started, part, batch))
        self._turns.begin(batch)
        self._departures.begin(batch)

    def _departure(self, part: _Part, last: bool, others: bool) -> Departure:
        host = self._departures.host
        found = self._departures.free(part.found)
        if not found:
            raise Conflict(BUSY)
        steer = self._steering(found, last, others)
        going = steer.startswith("vip:") and others
        sockets, _ = self._takers.take({each.connection.four_tuple: each.owners for each in found})
        named = host.journal.name((each.connection.four_tuple, each.connection.cookie) for each in found)
        if self._wish.maps:
            named = tuple(msgspec.structs.replace(each, there=self._wish.maps.there(each.four_tuple)) for each in named)
        lent = found[0].connection.four_tuple in self._lenders  # its application says when
        quiet = None
        if self._wish.when_quiet is not None and not lent:
            quiet = part.quiet = max(0.05, self._deadline - time.monotonic())
        machine = SourceHandoff(
            new_id(),
            self._destination,
            named,
            steer=steer,
            registry=host.registry.identity if host.registry is not None else "",
            times=_times(host.times, quiet),
        )
        return Departure(
            machine,
            self._departures,
            sockets,
            when_quiet=quiet,
            thorough=quiet is not None and quiet < _THOROUGH * (self._wish.when_quiet or 0),
            loan=loan_of(host.adopters, sockets, self._lenders),
            report=partial(self._on_end, part),
            turns=self._turns,
            last=going,
        )

    def _steering(self, found: Sequence[Found], last: bool, others: bool) -> str:
        """An address can move only with all its connections; before that, and without that, each is forwarded.

        Where ``others`` are still on their way, it is looked once more when they have gone.
        """
        words = self._wish.steer
        if not self._by_vip or (last and (others or not others_at({each.connection.four_tuple for each in found}))):
            return words
        try:
            odd = foreign([each.connection.four_tuple for each in found], self._destination)
        except HostError:
            return ""
        if odd:
            raise Refused(f"its address does not leave with it, and {FOREIGN}", hint="name agents by its IP version")
        return "forward"

    def _failed(self, part: _Part, error: Error) -> None:
        self._begun.discard(part)
        self._leave(part.found, error)

    def _started(self, part: _Part, batch: Departure) -> None:
        part.batch = batch
        going = {connection.four_tuple for connection in batch.machine.connections}
        self._leave([each for each in part.found if each.connection.four_tuple not in going], Conflict(BUSY))
        if self._aborted:
            self._engine.call(partial(self._cancel, [batch]))

    def _ended(self, part: _Part, batch: Departure, outcome: str, refused: Mapping[bytes, str]) -> None:
        if part not in self._begun:  # it was given up
            return
        self._begun.discard(part)
        if outcome == "moved" and not refused:
            self._moved.append((part, batch))
            self._told_at = self._moved[0][1].active_at / 1e9
        else:
            self._report(part, batch, outcome, refused)

    def _report_oldest(self) -> None:
        part, batch = self._moved.popleft()
        self._report(part, batch, "moved", {})
        if self._moved:
            self._told_at = self._moved[0][1].active_at / 1e9

    def _report(self, part: _Part, batch: Departure, outcome: str, refused: Mapping[bytes, str]) -> None:
        by_tuple = {each.connection.four_tuple: each for each in part.found}
        results: dict[FourTuple, tuple[int, Error | None]] = {}
        again: list[Found] = []
        for connection in batch.machine.connections:
            why = batch.left_out.get(connection.id) or refused.get(connection.id)
            if connection.id in batch.gone:
                results[connection.four_tuple] = types_pb2.OUTCOME_GONE, Refused(why or "it ended")
            elif why is None:
                one = types_pb2.OUTCOME_DONE if outcome == "moved" else types_pb2.OUTCOME_IN_DOUBT
                results[connection.four_tuple] = one, None
            elif (batch.withdrawn or why == NOT_QUIET or not self._final) and not self._aborted:
                again.append(by_tuple[connection.four_tuple])
            else:
                why = why or f"agent {self._destination} did not take it"
                results[connection.four_tuple] = types_pb2.OUTCOME_STAYED, Refused(why)
        frozen = (batch.active_at - batch.frozen_at) // 1000 if outcome == "moved" else 0
        self._reporter.bytes += batch.record_bytes
        self._reporter.result(
            results,
            destination=self._destination,
            batch=batch.machine.batch,
            frozen_us=frozen,
            phases=batch.phases,
        )
        self._retry(again, withdrawn=batch.withdrawn)
        self._reporter.progress(sum(len(each.found) for each in self._begun))

    def _retry(self, again: list[Found], *, withdrawn: bool) -> None:
        if again and (withdrawn or time.monotonic() < self._deadline):
            self._came_back = self._came_back or withdrawn
            self._waiting.extend(self._cut(again))
        elif again and self._wish.when_quiet is not None:
            self._leave(again, Refused("it was never quiet", hint="give --when-quiet more seconds"))
        else:
            self._again += again

    def _leave(self, found: Sequence[Found], why: Error) -> None:
        self._reporter.result(stayed([each.connection.four_tuple for each in found], why))


def _times(times: Times, quiet: float | None) -> Times:
    return times if quiet is None else msgspec.structs.replace(times, patience=times.patience + quiet)


def _by_address(found: Sequence[Found]) -> list[list[Found]]:
    groups: dict[bytes, list[Found]] = {}
    for each in found:
        groups.setdefault(each.connection.four_tuple.local, []).append(each)
    return list(groups.values())


def cut(found: Sequence[Found]) -> list[list[Found]]:
    """Batches of so many connections and so many bytes at most."""
    batches: list[list[Found]] = []
    size = BATCH_BYTES
    for each in found:
        length = _queued(each)
        if not batches or len(batches[-1]) >= BATCH or size + length > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(each)
        size += length
    return batches


def _queued(each: Found) -> int:
    """Bytes."""
    return each.connection.recv_queue + each.connection.send_queue
