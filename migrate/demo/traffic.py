"""The clients: a process of their own with many HTTP connections, which check every byte and note when it came.

Each connection asks at fixed intervals, so that its answers come at fixed intervals too and a gap shows. With the name
of a file it sends random characters, which the server repeats in its answer: that checks the other direction.

The process reads one line of JSON (`Plan`) and writes one (`Ready`) when all connections are there. Told to end by an
empty line, it waits for the last answers, writes a third (`Report`), and closes when its standard input does.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
import time
from functools import partial

import msgspec

from migrate.demo.network import Host
from migrate.errors import HostError

__all__ = ["Answer", "Plan", "Ready", "Report", "Traffic"]

_LONGEST_ECHO = 512  # random bytes in a request, sent as twice as many hexadecimal digits: one segment
_PATIENCE = 10.0  # seconds for the last answers to come


class Plan(msgspec.Struct):
    """What the clients shall do."""

    address: str
    port: int
    connections: int
    interval: float  # seconds between a connection's requests
    digests: dict[str, str]  # SHA-256 (hexadecimal) by the file's name


class Ready(msgspec.Struct):
    """The local port of each connection."""

    ports: list[int]


class Answer(msgspec.Struct, array_like=True):
    """One answer: which connection, when its last byte came (seconds of CLOCK_MONOTONIC), and from which host."""

    connection: int
    time: float
    host: str


class Report(msgspec.Struct):
    """What the clients saw."""

    answers: list[Answer]
    arrivals: list[list[float]]  # by connection: when something of an answer came, seconds of CLOCK_MONOTONIC
    sent: int  # bytes that the server repeated rightly
    received: int  # bytes of files with the right digest
    failures: dict[int, str]  # by connection: what was wrong, at first


class Traffic:
    """The clients' process, as who started it sees it."""

    def __init__(self, host: Host, plan: Plan) -> None:
        command = [sys.executable, "-m", "migrate.demo.traffic"]
        self._process = host.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._say(msgspec.json.encode(plan))
        self.ready = msgspec.json.decode(self._hear(), type=Ready)

    def end(self) -> Report:
        """No more questions; what was seen. The connections stay open until `close`."""
        self._say(b"")
        return msgspec.json.decode(self._hear(), type=Report)

    def close(self) -> None:
        """Close the connections and wait for the process to end."""
        self._process.communicate()

    def _say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HostError("the demo's clients ended before their time")
        return line


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, number: int, clients: _Clients) -> None:
        self.number = number
        self._clients = clients
        self.arrivals: list[float] = []
        self.waits = False  # for an answer
        self._due = 0.0
        self._transport: asyncio.Transport | None = None
        self._name, self._echo = "", ""
        self._data = bytearray()
        self._size = -1  # of the whole answer, once its header is here
        self._body = 0

    def start(self, due: float) -> None:
        self._due = due
        asyncio.get_running_loop().call_at(due, self._ask)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._clients.failed(self, f"the connection ended: {error or 'the server closed it'}")
        self.waits = False

    def data_received(self, data: bytes) -> None:
        self.arrivals.append(time.monotonic())
        self._data += data
        if self._size < 0 and (end := self._data.find(b"\r\n\r\n")) >= 0:
            self._body = end + 4
            header = self._header()
            self._size = self._body + int(header.get("content-length", 0))
        if 0 <= self._size <= len(self._data):
            self._check()

    def _header(self) -> dict[str, str]:
        lines = self._data[: self._body].decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:])
        return {"status": lines[0], **{name.lower(): value for name, _, value in pairs}}

    def _ask(self) -> None:
        clients = self._clients
        if clients.ending or self._transport is None or self._transport.is_closing():
            return
        self._name = random.choice(clients.names)
        self._echo = random.randbytes(random.randint(1, _LONGEST_ECHO)).hex()
        self._transport.write(f"GET /{self._name}?echo={self._echo} HTTP/1.1\r\nHost: demo\r\n\r\n".encode())
        self.waits = True

    def _check(self) -> None:
        """An answer is complete: compare all of it, then ask again when it is time."""
        header, body = self._header(), self._data[self._body :]
        if not header["status"].endswith(" 200 OK"):
            self._clients.failed(self, f"the server said {header['status']!r}")
        elif hashlib.sha256(body).hexdigest() != self._clients.plan.digests[self._name]:
            self._clients.failed(self, f"file {self._name} has the wrong digest")
        elif header.get("x-echo") != self._echo:
            self._clients.failed(self, "the server did not get what was sent")
        else:
            self._clients.answered(self, header["x-host"], len(self._echo), len(body))
        self._data.clear()
        self._size = -1
        self.waits = False
        self._due += self._clients.plan.interval
        asyncio.get_running_loop().call_at(self._due, self._ask)


class _Clients:
    """All of them, and what they saw."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = list(plan.digests)
        self.ending = False
        self._all = [_Client(number, self) for number in range(plan.connections)]
        self._report = Report([], [client.arrivals for client in self._all], 0, 0, {})

    async def connect(self) -> list[int]:
        """The local ports."""
        loop = asyncio.get_running_loop()
        ports = []
        for client in self._all:
            transport, _ = await loop.create_connection(partial(_same, client), self.plan.address, self.plan.port)
            ports.append(transport.get_extra_info("sockname")[1])
            client.start(loop.time() + random.random() * self.plan.interval)
        return ports

    def answered(self, client: _Client, host: str, sent: int, received: int) -> None:
        self._report.answers.append(Answer(client.number, client.arrivals[-1], host))
        self._report.sent += sent
        self._report.received += received

    def failed(self, client: _Client, why: str) -> None:
        self._report.failures.setdefault(client.number, why)

    async def end(self) -> Report:
        """Wait for what was asked for."""
        self.ending = True
        limit = time.monotonic() + _PATIENCE
        while any(client.waits for client in self._all) and time.monotonic() < limit:
            await asyncio.sleep(0.01)
        for client in self._all:
            if client.waits:
                self.failed(client, "an answer did not come")
        return self._report


def _same(client: _Client) -> _Client:
    return client


async def _main() -> None:
    loop = asyncio.get_running_loop()
    clients = _Clients(msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan))
    _write(Ready(await clients.connect()))
    if await loop.run_in_executor(None, sys.stdin.buffer.readline):
        _write(await clients.end())
        await loop.run_in_executor(None, sys.stdin.buffer.read)


def _write(message: Ready | Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(_main())
