"""The call Dump: connections become records in the hands of whoever calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from migrate.agent.applications import Lender, by_application, lenders, loan_of
from migrate.agent.caller import CALLER, HOLD, Taker
from migrate.agent.departure import Departures
from migrate.agent.move import choose
from migrate.agent.options import CHUNK_BYTES
from migrate.agent.outbound import BUSY, NOT_QUIET, Departure
from migrate.agent.passage import cut
from migrate.agent.reports import Outcomes, results_of, stayed
from migrate.agent.requests import DAY, seconds_of, selector_of
from migrate.agent.v1 import migration_pb2 as pb
from migrate.agent.v1 import types_pb2
from migrate.errors import Conflict, Error, NotFound, Refused, UsageError
from migrate.fourtuple import FourTuple
from migrate.handoff.events import Cancel
from migrate.handoff.ids import new_id
from migrate.handoff.messages import Offer
from migrate.handoff.source import SourceHandoff
from migrate.selection import Found, Selector, Takers

__all__ = ["dump"]

STORE_WITHIN = 30.0  # seconds that connections stand still at most before the caller has said that it has their records
QUIET = 1.0  # seconds in one attempt to find a quiet point: so soon a caller that has gone away is noticed

T = TypeVar("T")
Responses = AsyncGenerator[pb.DumpResponse, None]


@dataclass(frozen=True)
class _Wish:
    """What is asked for; times in seconds."""

    selector: Selector
    leave_running: bool
    hold: float
    when_quiet: float | None
    store_within: float


async def dump(departures: Departures, requests: AsyncIterator[pb.DumpRequest]) -> Responses:
    """The answer to ``requests``, a batch at a time. What is not stored when it ends, or is closed, lives on.

    Raises UsageError, NotFound, and Refused if the caller is too slow.
    """
    first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("step") != "start":
        raise UsageError("a dump begins with a DumpStart")
    wish = _wish(first.start)
    found, refused = await choose(wish.selector)
    if not (found or refused):
        raise NotFound("no connection here matches", hint="ListConnections shows them")
    lent, unknown = await asyncio.to_thread(lenders, departures.host.adopters, found)
    refused = unknown | refused
    movable = [each for each in found if each.connection.four_tuple not in refused]
    if refused:
        yield _results({each: (types_pb2.OUTCOME_STAYED, why) for each, why in refused.items()})
    deadline = time.monotonic() + (wish.when_quiet or 0)
    waiting = deque(batch for group in by_application(movable, lent) for batch in cut(group))
    stored = _Stored()
    reader = asyncio.create_task(stored.read(requests))
    try:
        while waiting and (wish.leave_running or not stored.over):
            batch = _Batch(departures, wish, waiting.popleft(), lent, deadline)
            try:
                async for response in batch.responses(stored):
                    yield response
            finally:
                batch.close()
            if batch.taker is not None and batch.taker.late:
                raise Refused(
                    f"the caller did not store the records within {wish.store_within:g} s",
                    hint="say DumpStored of each chunk as soon as it is stored, or set store_within",
                )
            waiting.extend(cut(batch.again))
        if stored.error is not None:
            raise stored.error
        if waiting:
            left = [each.connection.four_tuple for batch_left in waiting for each in batch_left]
            yield _results(stayed(left, Refused("the caller ended its stream")))
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class _Stored:
    """How far the caller says that it has stored what was ``sent``, in numbers of chunks."""

    def __init__(self) -> None:
        self.sent = self.chunk = 0
        self.over = False  # it will say no more
        self.error: Error | None = None
        self._changed = asyncio.Event()

    async def read(self, requests: AsyncIterator[pb.DumpRequest]) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("step") != "stored":
                    raise UsageError("after its DumpStart a dump takes nothing but DumpStored")
                if not 0 < request.stored.chunk <= self.sent:
                    raise UsageError(f"chunk {request.stored.chunk} was not sent, and cannot be stored")
                self.chunk = max(self.chunk, request.stored.chunk)
                self._changed.set()
        except Error as error:
            self.error = error
        finally:
            self.over = True
            self._changed.set()

    async def until(self, chunk: int) -> None:
        """Until that is stored, or the caller says no more."""
        while self.chunk < chunk and not self.over:
            await self._changed.wait()
            self._changed.clear()


class _Batch:
    """Some connections on their way to the caller. ``again``: those that were not quiet, and may be tried again."""

    def __init__(
        self,
        departures: Departures,
        wish: _Wish,
        found: Sequence[Found],
        lent: Mapping[FourTuple, Lender],
        deadline: float,
    ) -> None:
        self.again: list[Found] = []
        self.taker: Taker | None = None
        self._departures = departures
        self._wish = wish
        self._found = found
        self._lent = lent
        at_once = wish.when_quiet is None or found[0].connection.four_tuple in lent  # its application says when
        self._quiet = None if at_once else max(0.05, min(deadline - time.monotonic(), QUIET))
        self._last = time.monotonic() + (self._quiet or 0) >= deadline
        self._batch: Departure | None = None
        self._loop = asyncio.get_running_loop()
        self._offered: asyncio.Future[Offer] = self._loop.create_future()
        self._ended: asyncio.Future[tuple[str, Mapping[bytes, str]]] = self._loop.create_future()
        self._chunks: list[tuple[int, list[bytes]]] = []  # number, and ids of those whose records end in it
        self._stored: frozenset[bytes] = frozenset()

    async def responses(self, stored: _Stored) -> Responses:
        """Records, and when it is decided what became of them."""
        self._departures.host.engine.call(self._start)
        await _either(self._offered, self._ended)
        if self._offered.done():
            offer = self._offered.result()
            for piece, ids in _pieces([(each.id, offer.records[each.id]) for each in offer.connections]):
                stored.sent += 1
                self._chunks.append((stored.sent, ids))
                yield pb.DumpResponse(records=pb.RecordChunk(chunk=stored.sent, records=piece))
            if not self._wish.leave_running:
                await self._until_stored(stored)
        try:
            outcome, refused = await self._ended
        except Error as error:
            outcomes: Outcomes = stayed([each.connection.four_tuple for each in self._found], error)
        else:
            outcomes = self._outcomes(outcome, refused)
        if outcomes:
            yield _results(outcomes, self._frozen_us())

    def close(self) -> None:
        """Nobody listens any more: what is not stored lives on."""
        if not self._ended.done():
            self._departures.host.engine.call(self._give_up)

    async def _until_stored(self, stored: _Stored) -> None:
        told = asyncio.create_task(stored.until(stored.sent))
        try:
            await _either(told, self._ended)
        finally:
            told.cancel()
            self._stored = frozenset(id for number, ids in self._chunks if number <= stored.chunk for id in ids)
            self._departures.host.engine.call(self._decide)

    def _start(self) -> None:
        # In the engine's thread, as what follows.
        try:
            host = self._departures.host
            free = self._departures.free(self._found)
            if not free:
                raise Conflict(BUSY)
            with Takers() as takers:
                sockets, _ = takers.take({each.connection.four_tuple: each.owners for each in free})
            named = host.journal.name((each.connection.four_tuple, each.connection.cookie) for each in free)
            cookies = [each.connection.cookie for each in free]
            host.journal.remember({cookie: each.id for cookie, each in zip(cookies, named, strict=True)})
            times = msgspec.structs.replace(host.times, answer=self._wish.store_within, linger=self._wish.hold)
            self.taker = self._departures.taker(self._on_offer, copies=self._wish.leave_running)
            self._batch = Departure(
                SourceHandoff(new_id(), CALLER, named, times=times),
                self._departures,
                sockets,
                when_quiet=self._quiet,
                loan=loan_of(host.adopters, sockets, self._lent),
                report=self._on_end,
            )
            self._batch.stream = self.taker
            self._departures.begin(self._batch)
        except Error as error:
            self._tell(self._ended.set_exception, error)

    def _decide(self) -> None:
        if self.taker is not None:
            self.taker.stored(self._stored)

    def _give_up(self) -> None:
        self._decide()
        if self._batch is not None:
            with contextlib.suppress(UsageError):  # it is decided
                self._departures.host.engine.give(self._batch, Cancel())

    def _on_offer(self, offer: Offer) -> None:
        self._tell(self._offered.set_result, offer)

    def _on_end(self, _: Departure, outcome: str, refused: Mapping[bytes, str]) -> None:
        self._tell(self._ended.set_result, (outcome, refused))

    def _tell(self, call: Callable[[T], None], what: T) -> None:
        # What nobody waits for any more goes nowhere.
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(lambda: None if self._ended.done() else call(what))

    def _outcomes(self, outcome: str, refused: Mapping[bytes, str]) -> Outcomes:
        assert self._batch is not None
        batch, by_tuple = self._batch, {each.connection.four_tuple: each for each in self._found}
        copied = {id for _, ids in self._chunks for id in ids} if self._wish.leave_running else set()
        outcomes: dict[FourTuple, tuple[int, Error | None]] = dict(stayed(by_tuple, Conflict(BUSY)))
        for connection in batch.machine.connections:
            del outcomes[connection.four_tuple]
            why = batch.left_out.get(connection.id) or refused.get(connection.id)
            if connection.id in batch.gone:
                outcomes[connection.four_tuple] = types_pb2.OUTCOME_GONE, Refused(why or "it ended")
            elif connection.id in copied or (why is None and outcome == "moved"):
                outcomes[connection.four_tuple] = types_pb2.OUTCOME_DONE, None
            elif why == NOT_QUIET and not self._last:
                self.again.append(by_tuple[connection.four_tuple])
            else:
                outcomes[connection.four_tuple] = types_pb2.OUTCOME_STAYED, Refused(_because(why))
        return outcomes

    def _frozen_us(self) -> int:
        batch = self._batch
        return 0 if batch is None or not batch.frozen_at else (batch.active_at - batch.frozen_at) // 1000


async def _either(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _because(why: str | None) -> str:
    return "it was never quiet" if why == NOT_QUIET else why or "it was not dumped"


def _wish(start: pb.DumpStart) -> _Wish:
    selector = selector_of(start.selector)
    if selector.empty:
        raise UsageError("which connections?", hint="an empty selector means all; name what you want")
    hold = seconds_of(start, "hold", most=DAY)
    return _Wish(
        selector,
        start.leave_running,
        HOLD if hold is None else hold,
        seconds_of(start, "when_quiet", most=DAY),
        seconds_of(start, "store_within", most=3600) or STORE_WITHIN,
    )


def _results(outcomes: Outcomes, frozen_us: int = 0) -> pb.DumpResponse:
    return pb.DumpResponse(results=results_of(outcomes, frozen_us))


def _pieces(records: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, list[bytes]]]:
    """The stream of these records in chunks, and the ids of those that end in each."""
    parts: list[memoryview] = []
    ended: list[bytes] = []
    room = CHUNK_BYTES
    for id, record in records:
        view = memoryview(record)
        while len(view) > room:
            yield b"".join([*parts, view[:room]]), ended
            parts, ended, view, room = [], [], view[room:], CHUNK_BYTES
        parts.append(view)
        ended.append(id)
        room -= len(view)
    yield b"".join(parts), ended
