"""What a program asks of an agent: the calls behind `tcpmig migrate`, `drain` and `watch`; dumps and restores.

::

    with Client("unix:/run/tcpmig/agent.sock") as agent:
        for report in agent.migrate(Selector(local=parse_endpoint("10.0.0.100:80")), "10.0.0.2:7420", steer="vip:eth0"):
            ...
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from migrate.agent.errors import from_rpc_error
from migrate.agent.options import CHUNK_BYTES, channel_options
from migrate.agent.tls import load_channel_credentials
from migrate.agent.v1 import migration_pb2 as pb
from migrate.agent.v1 import migration_pb2_grpc, types_pb2
from migrate.errors import UsageError
from migrate.fourtuple import endpoint_text
from migrate.relocate import LocalMap
from migrate.selection import Selector

__all__ = ["Client"]


class Client:
    """A channel to one agent: "HOST:PORT" with the client certificate in ``tls``, or "unix:PATH". A context manager.

    Every call raises the error that the agent met, or RemoteError if it cannot be reached.
    """

    def __init__(self, agent: str, *, tls: Path | None = None) -> None:
        self._agent = agent
        if tls is None:
            self._channel = grpc.insecure_channel(agent, options=channel_options())
        else:
            credentials = load_channel_credentials(tls, "client")
            self._channel = grpc.secure_channel(agent, credentials, options=channel_options())
        # The generated stub is typed for grpc.aio; it serves both.
        self._stub: Any = migration_pb2_grpc.MigrationStub(cast(Any, self._channel))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs and close the channel."""
        self._channel.close()

    def migrate(
        self,
        selector: Selector,
        destination: str,
        *,
        steer: str = "",
        maps: Sequence[LocalMap] = (),
        when_quiet: float | None = None,
        dry_run: bool = False,
    ) -> Iterator[pb.MoveReport]:
        """Move what the selector means to the agent at ``destination``; ``when_quiet`` in seconds.

        ``maps`` give connections other local ends there, and exclude ``steer``.
        """
        request = pb.MigrateRequest(
            selector=_selector(selector),
            destination=destination,
            steering=_steering(steer),
            when_quiet=_duration(when_quiet),
            dry_run=dry_run,
            maps=_maps(maps),
        )
        for response in self._stream(self._stub.Migrate, request):
            yield response.report

    def drain(
        self,
        destinations: Sequence[str],
        *,
        steer: str = "",
        maps: Sequence[LocalMap] = (),
        when_quiet: float | None = None,
        dry_run: bool = False,
    ) -> Iterator[pb.MoveReport]:
        """Move everything, to the first of these agents that takes it. With ``maps`` there is only one."""
        request = pb.DrainRequest(
            destinations=destinations,
            steering=_steering(steer),
            when_quiet=_duration(when_quiet),
            dry_run=dry_run,
            maps=_maps(maps),
        )
        for response in self._stream(self._stub.Drain, request):
            yield response.report

    def connections(self, selector: Selector | None = None) -> Iterator[pb.Connection]:
        """The connections of the agent's host."""
        request = pb.ListConnectionsRequest(selector=_selector(selector or Selector()))
        for response in self._stream(self._stub.ListConnections, request):
            yield from response.connections

    def watch(self, kinds: Iterable[int] = ()) -> Iterator[pb.WatchResponse]:
        """What the agent does, from now on, without end."""
        return self._stream(self._stub.Watch, pb.WatchRequest(kinds=cast(Any, kinds)))

    def dump(
        self,
        selector: Selector,
        store: Callable[[bytes], object],
        *,
        leave_running: bool = False,
        hold: float | None = None,
        when_quiet: float | None = None,
        store_within: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[types_pb2.Results]:
        """Take the connections away, or copy them with ``leave_running``; yields what became of them, some at a time.

        ``store`` gets the stream of records in pieces, and returns when a piece is where it survives. What is not
        stored when it raises, the loop is left, or after ``timeout``, lives on where it is. Times are in seconds.
        """
        said: queue.SimpleQueue[pb.DumpRequest | None] = queue.SimpleQueue()
        start = pb.DumpStart(
            selector=_selector(selector),
            leave_running=leave_running,
            hold=_duration(hold),
            when_quiet=_duration(when_quiet),
            store_within=_duration(store_within),
        )
        said.put(pb.DumpRequest(start=start))
        try:
            for response in self._stream(self._stub.Dump, iter(said.get, None), timeout):
                if response.WhichOneof("part") == "results":
                    yield response.results
                else:
                    store(response.records.records)
                    said.put(pb.DumpRequest(stored=pb.DumpStored(chunk=response.records.chunk)))
        finally:
            said.put(None)

    def restore(self, records: Iterable[bytes], *, timeout: float | None = None) -> Iterator[types_pb2.Results]:
        """Rebuild connections from a stream of records, cut anywhere; yields what became of them, some at a time."""
        pieces = (piece[at : at + CHUNK_BYTES] for piece in records for at in range(0, len(piece), CHUNK_BYTES))
        requests = (
            pb.RestoreRequest(records=pb.RecordChunk(chunk=number, records=piece))
            for number, piece in enumerate(pieces, 1)
        )
        for response in self._stream(self._stub.Restore, requests, timeout):
            yield response.results

    def abort(self, move_id: str) -> tuple[int, int]:
        """Stop a move; how many connections stayed and how many had moved."""
        response = self._call(self._stub.Abort, pb.AbortRequest(move_id=move_id))
        return response.stayed, response.committed

    def settle(self, batch: str, *, committed: bool) -> None:
        """Decide a batch in place of its other side, which is gone for good; a destination takes only ``committed``."""
        verdict = pb.VERDICT_COMMITTED if committed else pb.VERDICT_DISCARDED
        settle = pb.SettleBatch(batch=batch, verdict=verdict)
        self._call(self._stub.Resolve, pb.ResolveRequest(settle=settle))

    def verdicts(self, connections: Iterable[tuple[bytes, int]]) -> list[bool]:
        """Whether the connections of these ids and epochs have changed hands here; what has not never will."""
        asked = [pb.ConnectionEpoch(id=id, epoch=epoch) for id, epoch in connections]
        response = self._call(self._stub.Resolve, pb.ResolveRequest(ask=pb.AskVerdicts(connections=asked)))
        return [verdict == pb.VERDICT_COMMITTED for verdict in response.verdicts]

    def _stream(self, method: Callable[..., Any], request: Any, timeout: float | None = None) -> Iterator[Any]:
        call = method(request, timeout=timeout)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(cast(grpc.aio.AioRpcError, error), self._agent) from None
        finally:
            call.cancel()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        try:
            return method(request)
        except grpc.RpcError as error:
            raise from_rpc_error(cast(grpc.aio.AioRpcError, error), self._agent) from None


def _selector(selector: Selector) -> types_pb2.Selector:
    return types_pb2.Selector(
        connection=str(selector.connection) if selector.connection else "",
        local=endpoint_text(selector.local) if selector.local else "",
        remote=endpoint_text(selector.remote) if selector.remote else "",
        states=[cast(Any, int(state)) for state in selector.states or ()],
        pid=selector.pid or 0,
        fd=selector.descriptor,
    )


def _maps(maps: Sequence[LocalMap]) -> list[types_pb2.LocalMap]:
    return [types_pb2.LocalMap(old=endpoint_text(each.old), new=endpoint_text(each.new)) for each in maps]


def _steering(words: str) -> types_pb2.Steering | None:
    way, _, rest = words.partition(":")
    match way:
        case "":
            return None
        case "vip" if rest:
            return types_pb2.Steering(vip=types_pb2.SteerVip(device=rest))
        case "forward" if not rest:
            return types_pb2.Steering(forward=types_pb2.SteerForward())
        case "follow" if not rest:
            return types_pb2.Steering(follow=types_pb2.SteerFollow())
        case "director" if rest:
            return types_pb2.Steering(director=types_pb2.SteerDirector(agent=rest))
        case "script" if rest:
            return types_pb2.Steering(script=types_pb2.SteerScript(path=rest))
    raise UsageError(f"{words!r} is no way to steer", hint="write vip:DEV, as in vip:eth0, or forward")


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
