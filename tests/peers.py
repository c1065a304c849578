"""The other end of a tested connection: byte-exact traffic, counted and digested both ways.

    client, server = connect(net.host("client"), net.host("a"), net.vip4)
    peer = Peer(client, send=1 << 20, receive=1 << 20)      # works in threads of its own
    ...                                                     # move `server`, let its owner send and receive
    peer.join()                                             # raises what went wrong
    assert peer.received_digest == digest(noise(seed=7), 1 << 20)

A stream of noise is a function of its seed alone: both ends can compute what the other should have sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tests.fix_netns import Host
from tests.waiting import until

__all__ = ["Peer", "Talk", "connect", "digest", "echo_server", "listen", "noise"]

BLOCK = 1 << 16


def listen(host: Host, address: str = "", port: int = 0, *, backlog: int = 4096) -> socket.socket:
    """A listening socket of ``host``, by default on any address of both families' kind and a free port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        return socket.create_server((address, port), family=family, backlog=backlog)


def connect(
    client: Host, server: Host, address: str | None = None, *, prepare: Callable[[socket.socket], None] | None = None
) -> tuple[socket.socket, socket.socket]:
    """A connection from ``client`` to ``address`` (its IPv4 one) at ``server``: the two sockets.

    ``prepare`` is given the listening socket and the client's before they connect, to set options.
    """
    address = address or server.ip4
    with listen(server, address) as listener:
        if prepare:
            prepare(listener)
        with client.entered():
            here = socket.socket(listener.family)
        try:
            if prepare:
                prepare(here)
            here.settimeout(10)
            here.connect(listener.getsockname()[:2])
            here.settimeout(None)
            return here, listener.accept()[0]
        except BaseException:
            here.close()
            raise


def noise(seed: int = 0) -> Iterator[bytes]:
    """An endless stream of random blocks of 64 KiB, of which no two are equal."""
    block = random.Random(seed).randbytes(BLOCK - 8)
    number = 0
    while True:
        yield number.to_bytes(8) + block
        number += 1


def digest(stream: Iterator[bytes], length: int) -> str:
    """SHA-256 (hexadecimal) of the first ``length`` bytes of a stream."""
    return _hash(_first(stream, length)).hexdigest()


def _first(stream: Iterator[bytes], length: int) -> Iterator[bytes]:
    while length:
        block = next(stream)[:length]
        length -= len(block)
        yield block


def _hash(blocks: Iterator[bytes]) -> hashlib._Hash:
    state = hashlib.sha256()
    for block in blocks:
        state.update(block)
    return state


class Peer:
    """Sends ``send`` bytes of noise of ``seed`` while it receives ``receive`` bytes, or until the end for None.

    It starts at once. ``close_after`` ends its own direction (FIN) after the last byte.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        send: int = 0,
        receive: int | None = None,
        seed: int = 0,
        close_after: bool = False,
    ) -> None:
        self.sent = self.received = 0
        self.sent_digest = self.received_digest = ""
        self.longest_gap = 0.0  # seconds between two arrivals
        self._socket = sock
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._send, send, seed, close_after), daemon=True),
            threading.Thread(target=self._guarded, args=(self._receive, receive), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def join(self, timeout: float = 60) -> None:
        """Wait until both directions are through; raises the first error, or AssertionError after ``timeout``."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise AssertionError(f"the peer hangs: {self.sent} bytes sent, {self.received} received")
        if self._errors:
            raise self._errors[0]

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._errors.append(error)

    def _send(self, length: int, seed: int, close_after: bool) -> None:
        state = hashlib.sha256()
        for block in _first(noise(seed), length):
            self._socket.sendall(block)
            state.update(block)
            self.sent += len(block)
        self.sent_digest = state.hexdigest()
        if close_after:
            self._socket.shutdown(socket.SHUT_WR)

    def _receive(self, length: int | None) -> None:
        state = hashlib.sha256()
        buffer = bytearray(BLOCK)
        last = None
        while length is None or self.received < length:
            want = BLOCK if length is None else min(BLOCK, length - self.received)
            got = self._socket.recv_into(buffer, want)
            now = time.monotonic()
            if not got:
                if length is not None:
                    raise AssertionError(f"the connection ended after {self.received} of {length} bytes")
                break
            if last is not None:
                self.longest_gap = max(self.longest_gap, now - last)
            last = now
            state.update(memoryview(buffer)[:got])
            self.received += got
        self.received_digest = state.hexdigest()


class Talk(threading.Thread):
    """A client of an echo server that says a number, hears it, and says the next, until it is ``over``."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.heard = 0
        self.error: BaseException | None = None
        self.over = False
        sock.settimeout(30)
        self.start()

    def run(self) -> None:
        try:
            while not self.over:
                word = b"%012d" % self.heard
                self.sock.sendall(word)
                got = b""
                while len(got) < len(word):
                    part = self.sock.recv(len(word) - len(got))
                    assert part, "the connection was closed"
                    got += part
                assert got == word, (got, word)
                self.heard += 1
                time.sleep(0.001)
        except BaseException as error:
            self.error = error

    def goes_on(self) -> bool:
        """It heard something since it was asked."""
        before = self.heard
        until(lambda: self.heard > before + 1 or self.error, within=15, what="the client hears its words")
        if self.error:
            raise self.error
        return True


@contextlib.contextmanager
def echo_server(host: Host, address: str = "", port: int = 0) -> Iterator[tuple[str, int]]:
    """A server in ``host`` that gives every connection back what it sends; yields its address and port."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while block := await reader.read(BLOCK):
                writer.write(block)
                await writer.drain()
        except ConnectionError:
            pass  # the test's client will have noticed
        finally:
            writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(echo, sock=listener):
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    with listen(host, address, port) as listener:
        name = listener.getsockname()[:2]
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield name
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
