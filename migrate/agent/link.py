"""Handoff streams: to destinations (we call) and from sources (we are called). The event loop's side of them.

The engine's thread calls `send` and `fail`; everything else happens in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import grpc.aio

from migrate import __version__, errors
from migrate.agent.errors import from_rpc_error
from migrate.agent.logging import get_logger
from migrate.agent.options import channel_options
from migrate.agent.tls import load_channel_credentials
from migrate.agent.v1 import handoff_pb2 as pb
from migrate.agent.v1 import handoff_pb2_grpc
from migrate.agent.wire import VERSION, Assembler, negotiate, pack_tuples, requests_of, response_of
from migrate.fourtuple import FourTuple
from migrate.handoff.messages import Kept, Message, Prepare, Prepared

__all__ = ["InLink", "Links", "OutLink", "hello", "open_channel"]

_ANSWERED = 5.0  # seconds for an agent to do what it is asked outside of a handoff
_KEPT = "kept"  # the capability of a destination that takes Kept
_PAUSE = 0.5  # seconds between two attempts to reach an agent that could not be reached

_log = get_logger(__name__)

Call = grpc.aio.StreamStreamCall[pb.TransferRequest, pb.TransferResponse]


def hello(host: str) -> pb.Hello:
    """How this agent introduces itself; ``host`` is the identity of its journal."""
    return pb.Hello(
        oldest_version=VERSION, newest_version=VERSION, host=host, software=__version__, capabilities=[_KEPT]
    )


def open_channel(agent: str, tls: Path | None) -> grpc.aio.Channel:
    """A channel to "HOST:PORT" as an agent, or without TLS to "unix:PATH" too. Raises as load_channel_credentials."""
    if tls is None or agent.startswith("unix:"):
        return grpc.aio.insecure_channel(agent, options=channel_options())
    return grpc.aio.secure_channel(agent, load_channel_credentials(tls, "agent"), options=channel_options())


class _Link:
    """What both directions share. ``peer`` names the other agent."""

    def __init__(self, peer: str, loop: asyncio.AbstractEventLoop) -> None:
        self.peer = peer
        self.broken = False
        self._loop = loop
        self._queue: asyncio.Queue[Message | errors.Error | None] = asyncio.Queue()

    def send(self, message: Message) -> None:
        """Queue it; dropped if the stream has ended. From any thread."""
        self._put(message)

    def fail(self, error: errors.Error) -> None:
        """End the stream. From any thread."""
        self._put(error)

    def end(self) -> None:
        """End the stream when what is queued has gone. From any thread."""
        self._put(None)

    def _put(self, item: Message | errors.Error | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def _queued(self) -> AsyncIterator[Message]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, errors.Error):
                raise item
            yield item


class InLink(_Link):
    """From a source. ``peer`` is its authenticated name."""

    async def responses(self) -> AsyncIterator[pb.TransferResponse]:
        """What to answer, until the end."""
        async for message in self._queued():
            yield response_of(message)


class OutLink(_Link):
    """To a destination. ``peer`` is "HOST:PORT" or "unix:PATH"."""

    takes_kept = False  # as far as is known

    async def run(self, channel: grpc.aio.Channel, host: str, answered: Callable[[OutLink, Message], None]) -> None:
        """Speak until the stream ends. Raises Error if that was not by our own will."""
        call: Call = handoff_pb2_grpc.HandoffStub(channel).Transfer()
        writer = asyncio.create_task(self._write(call, host))
        try:
            assembler = Assembler(errors.RemoteError)
            greeted = False
            async for response in call:
                if not greeted:
                    negotiate(response.hello)
                    self.takes_kept = _KEPT in response.hello.capabilities
                    greeted = True
                else:
                    answered(self, assembler.response(response))
            if writer.done():
                writer.result()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.peer) from None
        finally:
            writer.cancel()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await writer

    async def _write(self, call: Call, host: str) -> None:
        try:
            await call.write(pb.TransferRequest(hello=hello(host)))
            async for message in self._queued():
                if isinstance(message, Kept) and not self.takes_kept:
                    continue  # the peer repeats it
                for request in requests_of(message):
                    await call.write(request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader says why
        except errors.Error:
            call.cancel()


class Links:
    """The streams to destinations: one each, opened when it is wanted."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tls: Path | None,
        host: str,
        answered: Callable[[OutLink, Message], None],
        lost: Callable[[OutLink], None],
    ) -> None:
        """``answered`` and ``lost`` are called in the event loop."""
        self._loop, self._tls, self._host = loop, tls, host
        self._answered, self._lost = answered, lost
        self._links: dict[str, OutLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed_at: dict[str, float] = {}
        self.last_error: dict[str, errors.Error] = {}

    def dial(self, agent: str) -> OutLink:
        """The stream to that agent, opened if there is none. From the engine's thread."""
        link = self._links.get(agent)
        if link is None or link.broken:
            link = self._links[agent] = OutLink(agent, self._loop)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._start, link)
        return link

    async def forward(self, agent: str, tuples: Iterable[FourTuple]) -> None:
        """Have that agent's host forward these connections, which live here, to this host. Raises RemoteError."""
        request = pb.ForwardRequest(four_tuples=pack_tuples(tuples))
        async with open_channel(agent, self._tls) as channel:
            try:
                await handoff_pb2_grpc.HandoffStub(channel).Forward(request, timeout=_ANSWERED)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, agent) from None

    async def check(self, agent: str, prepare: Prepare) -> Prepared:
        """What that agent would answer, as things stand; nothing comes of it. Raises Error if it does not."""
        (first,) = requests_of(prepare)
        request = pb.CheckRequest(hello=hello(self._host), prepare=first.prepare)
        async with open_channel(agent, self._tls) as channel:
            try:
                answer = await handoff_pb2_grpc.HandoffStub(channel).Check(request, timeout=_ANSWERED)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, agent) from None
        negotiate(answer.hello)
        prepared = Assembler(errors.RemoteError).response(pb.TransferResponse(prepared=answer.prepared))
        assert isinstance(prepared, Prepared)
        return prepared

    async def close(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, link: OutLink) -> None:
        task = self._loop.create_task(self._run(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, link: OutLink) -> None:
        pause = self._failed_at.get(link.peer, -_PAUSE) + _PAUSE - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        try:
            async with open_channel(link.peer, self._tls) as channel:
                await link.run(channel, self._host, self._answered)
        except errors.Error as error:
            _log.warning("handoff stream broke", agent=link.peer, why=str(error))
            self.last_error[link.peer] = error
        except Exception:
            _log.exception("handoff stream failed", agent=link.peer)
        finally:
            self._failed_at[link.peer] = time.monotonic()
            link.broken = True
            self._lost(link)
