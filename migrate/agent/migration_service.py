"""The gRPC service Migration: what orchestration asks of the agent on one host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from migrate.agent.arrival import Arrivals
from migrate.agent.departure import Departures
from migrate.agent.dumping import dump
from migrate.agent.events import Events
from migrate.agent.logging import get_logger
from migrate.agent.move import Move
from migrate.agent.requests import DAY, seconds_of, selector_of
from migrate.agent.restoring import restore
from migrate.agent.v1 import migration_pb2 as pb
from migrate.agent.v1 import migration_pb2_grpc, types_pb2
from migrate.agent.wish import Wish
from migrate.errors import NotFound, UsageError
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.events import Resolved
from migrate.handoff.ids import ID_BYTES
from migrate.kernel import tcpinfo
from migrate.kernel.diag import Extension
from migrate.relocate import LocalMap, LocalMaps
from migrate.selection import Found, Selector, find

__all__ = ["MigrationService"]

_LIST_CHUNK = 1000  # connections in a message

_notsent = tcpinfo.reader("notsent_bytes")

_log = get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Dumped = AsyncIterator[pb.DumpResponse]
Restored = AsyncIterator[pb.RestoreResponse]


class MigrationService(migration_pb2_grpc.MigrationServicer):
    """See the .proto."""

    def __init__(self, departures: Departures, arrivals: Arrivals, events: Events) -> None:
        self._departures = departures
        self._arrivals = arrivals
        self._events = events
        self._moves: dict[str, Move] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop the moves: what is not offered stays."""
        for move in self._moves.values():
            move.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def ListConnections(
        self, request: pb.ListConnectionsRequest, context: Context
    ) -> AsyncIterator[pb.ListConnectionsResponse]:
        """See the .proto."""
        found = await asyncio.to_thread(find, selector_of(request.selector), extensions=Extension.INFO)
        for start in range(0, len(found), _LIST_CHUNK):
            yield pb.ListConnectionsResponse(connections=map(_connection, found[start : start + _LIST_CHUNK]))

    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> AsyncIterator[pb.MigrateResponse]:
        """See the .proto."""
        selector = selector_of(request.selector)
        if selector.empty:
            raise UsageError("which connections?", hint="an empty selector means all, and Drain moves all")
        destinations = [_agent(request.destination)]
        wish = Wish(selector, destinations, _steer(request.steering), _quiet(request), _maps(request))
        async for report in self._reports(wish, dry_run=request.dry_run):
            yield pb.MigrateResponse(report=report)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> AsyncIterator[pb.DrainResponse]:
        """See the .proto."""
        if not request.destinations:
            raise UsageError("where to?", hint="name at least one agent")
        destinations = [_agent(each) for each in request.destinations]
        wish = Wish(Selector(), destinations, _steer(request.steering), _quiet(request), _maps(request))
        async for report in self._reports(wish, dry_run=request.dry_run):
            yield pb.DrainResponse(report=report)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """See the .proto."""
        move = self._moves.get(request.move_id)
        if move is None:
            raise NotFound(f"there is no move {request.move_id!r}", hint="it may be over; Watch shows moves")
        move.abort()
        stayed, committed = await move.ended()
        return pb.AbortResponse(stayed=stayed, committed=committed)

    async def Resolve(self, request: pb.ResolveRequest, context: Context) -> pb.ResolveResponse:
        """See the .proto."""
        match request.WhichOneof("way"):
            case "settle":
                return await self._settle(request.settle)
            case "ask":
                return await self._ask(request.ask)
        raise UsageError("ask, or settle?")

    async def Dump(self, request_iterator: AsyncIterator[pb.DumpRequest], context: Context) -> Dumped:
        """See the .proto."""
        async with contextlib.aclosing(dump(self._departures, request_iterator)) as responses:
            async for response in responses:
                yield response

    async def Restore(self, request_iterator: AsyncIterator[pb.RestoreRequest], context: Context) -> Restored:
        """See the .proto."""
        async with contextlib.aclosing(restore(self._arrivals, request_iterator)) as responses:
            async for response in responses:
                yield response

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """See the .proto."""
        async with contextlib.aclosing(self._events.watch(frozenset(request.kinds))) as events:
            async for event in events:
                yield event

    async def _reports(self, wish: Wish, *, dry_run: bool) -> AsyncIterator[pb.MoveReport]:
        reports = _Reports()
        move = Move(self._departures, wish, reports.put)
        self._moves[move.id] = move
        task = asyncio.create_task(self._run(move, dry_run, wish))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: reports.end())
        # A caller that goes away ends this generator, not the move.
        async for report in reports:
            yield report

    async def _run(self, move: Move, dry_run: bool, wish: Wish) -> None:
        try:
            if dry_run:
                await move.dry_run()
                return
            _log.info("move started", move=move.id, agents=",".join(wish.destinations))
            self._events.tell(pb.EVENT_KIND_MOVE_STARTED, move_id=move.id, agent=wish.destinations[0])
            summary = await move.run()
            self._events.tell(
                pb.EVENT_KIND_MOVE_ENDED,
                move_id=move.id,
                count=summary.done,
                problem=summary.problem if summary.HasField("problem") else None,
            )
        finally:
            del self._moves[move.id]

    async def _settle(self, settle: pb.SettleBatch) -> pb.ResolveResponse:
        if settle.verdict == pb.VERDICT_UNSPECIFIED:
            raise UsageError("settle it how?", hint="VERDICT_COMMITTED or VERDICT_DISCARDED")
        try:
            key = bytes.fromhex(settle.batch)
        except ValueError:
            raise UsageError(f"{settle.batch!r} is no batch", hint="32 hexadecimal digits") from None

        def decide() -> int:
            arriving = (each for (_, batch), each in self._arrivals.batches.items() if batch == key)
            batch = self._departures.batches.get(key) or next(arriving, None)
            if batch is None:
                raise NotFound(f"there is no batch {settle.batch} on its way here or out of here")
            committed = settle.verdict == pb.VERDICT_COMMITTED
            if batch.machine.role == DestinationHandoff.role and not committed:
                raise UsageError("what this host has committed to stays here", hint="VERDICT_COMMITTED")
            self._departures.host.engine.give(batch, Resolved(committed))
            return len(batch.machine.connections)

        return pb.ResolveResponse(verdicts=[settle.verdict] * await self._departures.host.engine.ask(decide))

    async def _ask(self, ask: pb.AskVerdicts) -> pb.ResolveResponse:
        if any(len(each.id) != ID_BYTES or each.epoch == 0 for each in ask.connections):
            raise UsageError(f"a connection is named by an id of {ID_BYTES} bytes and an epoch from 1")

        def decide() -> list[bool]:
            return [
                self._departures.dumped(each.id, each.epoch) or self._arrivals.verdict(each.id, each.epoch)
                for each in ask.connections
            ]

        words = {True: pb.VERDICT_COMMITTED, False: pb.VERDICT_DISCARDED}
        return pb.ResolveResponse(verdicts=[words[each] for each in await self._departures.host.engine.ask(decide)])


class _Reports:
    """What a move says, for one caller: a new progress replaces the one that was not fetched."""

    def __init__(self) -> None:
        self._results: list[pb.MoveReport] = []
        self._progress: pb.MoveReport | None = None
        self._over = False
        self._changed = asyncio.Event()

    def put(self, report: pb.MoveReport) -> None:
        if report.WhichOneof("report") == "progress":
            self._progress = report
        else:
            self._results.append(report)
        self._changed.set()

    def end(self) -> None:
        self._over = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[pb.MoveReport]:
        while not (self._over and not self._results):
            await self._changed.wait()
            self._changed.clear()
            results, self._results = self._results, []
            progress, self._progress = self._progress, None
            over = self._over
            for report in [progress, *results] if progress is not None else results:
                yield report
            if over and not self._results:
                return


def _agent(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not text.startswith("unix:") and not (host and port.isdecimal()):
        raise UsageError(f"{text!r} names no agent", hint="write HOST:PORT or unix:PATH")
    return text


def _steer(steering: types_pb2.Steering) -> str:
    match steering.WhichOneof("how"):
        case None:
            return ""
        case "vip":
            return f"vip:{steering.vip.device}"
        case "forward" | "follow" as how:
            return how
        case how:
            raise UsageError(f"this agent cannot steer by {how} yet", hint="vip or forward")


def _quiet(request: pb.MigrateRequest | pb.DrainRequest) -> float | None:
    return seconds_of(request, "when_quiet", most=DAY)


def _maps(request: pb.MigrateRequest | pb.DrainRequest) -> LocalMaps:
    return LocalMaps(LocalMap.parse(each.old, each.new) for each in request.maps)


def _connection(found: Found) -> pb.Connection:
    connection = found.connection
    local, _, remote = str(connection.four_tuple).partition(",")
    info = connection.info
    why = found.obstacle
    return pb.Connection(
        local=local,
        remote=remote,
        state=int(connection.state),  # type: ignore[arg-type]
        recv_queue=connection.recv_queue,
        send_queue=connection.send_queue,
        unsent=_notsent(info)[0] if len(info) >= 148 else 0,
        owners=[pb.Owner(pid=each.pid, fd=each.fd, comm=each.comm) for each in found.owners],
        migratable=why is None,
        reason="" if why is None else str(why),
    )
