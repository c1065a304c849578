"""What both sides agree on: pings that nobody minds, and a cut link that shows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from migrate.agent import options
from migrate.agent.v1 import handoff_pb2, handoff_pb2_grpc
from tests.stub_agent import calling, serving

PING = 1.0  # seconds; gRPC pings no more often
HELLO = handoff_pb2.TransferRequest(hello=handoff_pb2.Hello(host="a"))


@pytest.fixture(autouse=True)
def frequent_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "KEEPALIVE_SECONDS", PING)


class Cable:
    """A TCP relay that can be pulled: what arrives afterwards goes nowhere, and nobody is told."""

    def __init__(self, target: str) -> None:
        self.host, port = target.split(":")
        self.port = int(port)
        self.whole = True
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
        self.writers += [writer, far_writer]
        await asyncio.gather(self.copy(reader, far_writer), self.copy(far_reader, writer))

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.whole:
                    writer.write(data)


async def echo(call: Any) -> None:
    """The stream is alive: what is written comes back."""
    await call.write(HELLO)
    assert (await call.read()).hello == HELLO.hello


@contextlib.asynccontextmanager
async def cable_to(target: str) -> AsyncIterator[tuple[Cable, str]]:
    cable = Cable(target)
    server = await asyncio.start_server(cable.connect, "127.0.0.1", 0)
    try:
        yield cable, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        for writer in cable.writers:
            writer.close()
        server.close()
        await server.wait_closed()


def test_an_idle_stream_outlives_many_pings() -> None:
    """gRPC's server hangs up ("Too many pings") on the third that comes sooner than it allows."""

    async def scenario() -> None:
        async with serving(insecure=True) as target, calling(target) as channel:
            call = handoff_pb2_grpc.HandoffStub(channel).Transfer()
            await echo(call)
            await asyncio.sleep(PING * 5.5)  # the silence is what is tested
            await echo(call)
            await call.done_writing()
            assert await call.code() is grpc.StatusCode.OK

    asyncio.run(scenario())


def test_a_cut_link_shows_in_two_intervals() -> None:
    async def scenario() -> float:
        async with (
            serving(insecure=True) as target,
            cable_to(target) as (cable, through),
            calling(through) as channel,
        ):
            call = handoff_pb2_grpc.HandoffStub(channel).Transfer()
            await echo(call)
            cable.whole = False
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call.read(), 20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            return time.monotonic() - began

    assert asyncio.run(scenario()) < PING * 2 + 2  # and two seconds for a busy machine


def test_both_sides_have_the_same_limits() -> None:
    server, channel = dict(options.server_options()), dict(options.channel_options())
    assert server["grpc.so_reuseport"] == 0
    for name in ("grpc.max_receive_message_length", "grpc.max_send_message_length"):
        assert server[name] == channel[name] == options.MAX_MESSAGE_BYTES
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < channel["grpc.keepalive_time_ms"]
