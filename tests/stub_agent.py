"""A gRPC server with everything of an agent around it but the agent itself: credentials, policy, errors, options."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from migrate.agent.auth import Authorizer
from migrate.agent.intercept import ErrorReporter
from migrate.agent.listen import listen_tcp, listen_unix
from migrate.agent.options import channel_options, server_options
from migrate.agent.tls import Identity, load_channel_credentials
from migrate.agent.v1 import handoff_pb2, handoff_pb2_grpc, migration_pb2, migration_pb2_grpc

__all__ = ["Context", "HandoffServicer", "MigrationServicer", "StubMigration", "abort", "calling", "serving"]

Context = grpc.aio.ServicerContext[Any, Any]


# The type stubs call the generated classes abstract. They are not: a call that is left out fails.
MigrationServicer: Any = migration_pb2_grpc.MigrationServicer
HandoffServicer: Any = handoff_pb2_grpc.HandoffServicer


class StubMigration(MigrationServicer):  # type: ignore[misc]
    """Answers Abort after ``answer(move_id, context)``; the other calls are not implemented."""

    def __init__(self, answer: Callable[[str, Context], Any] | None = None) -> None:
        self.answer = answer
        self.contexts: list[Context] = []

    async def Abort(self, request: migration_pb2.AbortRequest, context: Context) -> migration_pb2.AbortResponse:
        self.contexts.append(context)
        if self.answer is not None:
            result = self.answer(request.move_id, context)
            if asyncio.iscoroutine(result):
                await result
        return migration_pb2.AbortResponse(stayed=7)


class StubHandoff(HandoffServicer):  # type: ignore[misc]
    """Says Hello for every message, as soon as it comes."""

    async def Transfer(
        self, request_iterator: AsyncIterator[handoff_pb2.TransferRequest], context: Context
    ) -> AsyncIterator[handoff_pb2.TransferResponse]:
        async for request in request_iterator:
            yield handoff_pb2.TransferResponse(hello=request.hello)


@contextlib.asynccontextmanager
async def serving(
    tls: Path | None = None,
    *,
    migration: Any = None,
    unix: Path | None = None,
    insecure: bool = False,
    refused: Callable[[], None] | None = None,
) -> AsyncIterator[str]:
    """Serve meanwhile; gives "127.0.0.1:PORT", on the terms of ``tls``, or with ``unix`` the socket's target."""
    interceptors = [ErrorReporter(), Authorizer(insecure=insecure, refused=refused)]
    server = grpc.aio.server(interceptors=interceptors, options=server_options())
    migration_pb2_grpc.add_MigrationServicer_to_server(migration or StubMigration(), server)
    handoff_pb2_grpc.add_HandoffServicer_to_server(StubHandoff(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    reflection.enable_server_reflection(["tcpmig.v1.Migration"], server)
    if unix is None:
        target = f"127.0.0.1:{listen_tcp(server, '127.0.0.1:0', tls=tls)}"
    else:
        listen_unix(server, unix)
        target = f"unix:{unix}"
    await server.start()
    try:
        yield target
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def calling(
    target: str,
    tls: Path | None = None,
    identity: Identity = "client",
    *,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to ``target``: with the certificates in ``tls``, or these ``credentials``, or none."""
    if tls is not None:
        credentials = load_channel_credentials(tls, identity)
    if credentials is None:
        channel = grpc.aio.insecure_channel(target, options=channel_options())
    else:
        channel = grpc.aio.secure_channel(target, credentials, options=channel_options())
    async with channel:
        yield channel


async def abort(channel: grpc.aio.Channel, what: str = "", *, seconds: float = 10) -> migration_pb2.AbortResponse:
    """Call Migration.Abort, the call that StubMigration answers."""
    stub = migration_pb2_grpc.MigrationStub(channel)
    return await stub.Abort(migration_pb2.AbortRequest(move_id=what), timeout=seconds)
