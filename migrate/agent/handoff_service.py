"""The gRPC service Handoff: sources speak to the machines of this host's arrivals."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc.aio

from migrate import errors
from migrate.agent.arrival import Arrivals
from migrate.agent.auth import caller_of
from migrate.agent.link import InLink, hello
from migrate.agent.steering import FOREIGN, address_of
from migrate.agent.v1 import handoff_pb2 as pb
from migrate.agent.v1 import handoff_pb2_grpc
from migrate.agent.wire import Assembler, negotiate, response_of, unpack_tuples
from migrate.handoff.messages import Prepare, Prepared

__all__ = ["HandoffService"]

Context = grpc.aio.ServicerContext[Any, Any]


class HandoffService(handoff_pb2_grpc.HandoffServicer):
    """``host`` is the identity of this agent's journal."""

    def __init__(self, arrivals: Arrivals, host: str, *, insecure: bool) -> None:
        self._arrivals = arrivals
        self._host = host
        self._insecure = insecure
        self._links: set[InLink] = set()

    async def Transfer(
        self, request_iterator: AsyncIterator[pb.TransferRequest], context: Context
    ) -> AsyncIterator[pb.TransferResponse]:
        """See the .proto."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise errors.UsageError("a handoff stream begins with a Hello")
        negotiate(first.hello)
        yield pb.TransferResponse(hello=hello(self._host))
        caller = caller_of(context, insecure=self._insecure)
        # Without a certificate the port is all that the network says, and it changes: the host's own word must do.
        secured = b"ssl" in context.auth_context().get("transport_security_type", ())
        link = InLink(caller.name if secured else f"insecure {first.hello.host}", asyncio.get_running_loop())
        reader = asyncio.create_task(self._read(request_iterator, link, _address(context.peer())))
        self._links.add(link)
        try:
            async for response in link.responses():
                yield response
        finally:
            self._links.discard(link)
            reader.cancel()
            self._arrivals.host.engine.call(partial(self._arrivals.lost, link))
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> pb.ForwardResponse:
        """See the .proto."""
        owner = address_of(_address(context.peer()))
        tuples = unpack_tuples(request.four_tuples, errors.UsageError)
        if any(len(each.local) != len(owner) for each in tuples):
            raise errors.Refused(FOREIGN)
        loop, forwarded = asyncio.get_running_loop(), asyncio.Event()

        def done() -> None:
            loop.call_soon_threadsafe(forwarded.set)

        self._arrivals.host.engine.call(partial(self._arrivals.forward, tuples, owner, done))
        await forwarded.wait()
        return pb.ForwardResponse()

    async def Check(self, request: pb.CheckRequest, context: Context) -> pb.CheckResponse:
        """See the .proto."""
        negotiate(request.hello)
        prepare = Assembler(errors.UsageError).request(pb.TransferRequest(prepare=request.prepare))
        assert isinstance(prepare, Prepare)
        refused = await self._arrivals.host.engine.ask(
            lambda: self._arrivals.refusals(prepare.connections, prepare.steer, _address(context.peer()))
        )
        answer = response_of(Prepared(batch=prepare.batch, journal=self._host, refused=refused))
        return pb.CheckResponse(hello=hello(self._host), prepared=answer.prepared)

    def close(self) -> None:
        """End all streams."""
        for link in self._links:
            link.end()

    async def _read(self, requests: AsyncIterator[pb.TransferRequest], link: InLink, source: str) -> None:
        assembler = Assembler(errors.UsageError)
        try:
            async for request in requests:
                message = assembler.request(request)
                if message is not None:
                    self._arrivals.host.engine.call(partial(self._arrivals.heard, link, source, message))
            link.end()
        except errors.Error as error:
            link.fail(error)
        except Exception:
            link.end()
            raise


def _address(peer: str) -> str:
    """What gRPC calls a peer ("ipv4:10.0.0.1:4711", "ipv6:%5B::1%5D:4711") as HOST:PORT; "unix:…" stays."""
    kind, _, rest = peer.partition(":")
    return urllib.parse.unquote(rest) if kind in ("ipv4", "ipv6") else peer
