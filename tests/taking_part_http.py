"""An HTTP/1.1 server that takes part: a connection leaves and goes on in the middle of a body.

    python -m tests.taking_part_http SOCKET ADDRESS PORT GATE [listen]

``GET /item/N`` gives a few bytes, ``PUT /upload/N`` the digest of what came, ``GET /noise/LENGTH`` so many bytes, all
as the functions here say. Each request has ``?after=M&moves=N``: it is of a phase of N moves that begins with move M.
The file GATE says how many moves there have been, and of a phase no more is served than what those and the next two
allow, so that there is traffic whenever the connection moves, however long a move takes. Says "ready" when it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec

from migrate.app.plain import Application

__all__ = ["BLOCK", "ITEMS", "Digest", "block", "item"]

BLOCK = 1 << 16
ITEMS = 300  # of a phase
_TICK = 2  # milliseconds; in each a connection is served a few times
_STEPS = 4
_LONGEST = 1 << 14  # bytes of a request's head
_noise = random.Random(0).randbytes(BLOCK - 8)


def block(number: int) -> bytes:
    """The numberth 64 KiB of the noise."""
    return number.to_bytes(8) + _noise


def item(number: int) -> bytes:
    """The body of an item."""
    return b"item %d\n" % number * (number % 50)


class Digest(msgspec.Struct):
    """A digest that can move: each block is hashed with the digest of those before it."""

    chain: bytes = b""
    rest: bytes = b""

    def update(self, data: bytes) -> None:
        """More bytes."""
        self.rest += data
        while len(self.rest) >= BLOCK:
            self.chain = hashlib.sha256(self.chain + self.rest[:BLOCK]).digest()
            self.rest = self.rest[BLOCK:]

    def hexdigest(self) -> str:
        """Of all so far."""
        return hashlib.sha256(self.chain + self.rest).hexdigest()


class Exchange(msgspec.Struct):
    """All that is known of a connection: its state when it moves."""

    unparsed: bytes = b""
    unsent: bytes = b""
    wants: str = ""  # item, upload or noise; empty between two requests
    position: int = 0
    total: int = 0
    after: int = 0
    moves: int = 1
    digest: Digest = msgspec.field(default_factory=Digest)

    def due(self, moved: int) -> int:
        """How far it may go after so many moves."""
        return min(self.total, self.total * (moved - self.after + 2) // (self.moves + 2))


class Client:
    """A connection."""

    def __init__(self, sock: socket.socket, exchange: Exchange) -> None:
        self.sock, self.exchange = sock, exchange

    def serve(self, moved: int) -> bool:
        """One step: at most half a block is read or one is written. Whether it goes on."""
        now = self.exchange
        if now.unsent:
            now.unsent = now.unsent[self.sock.send(now.unsent, socket.MSG_DONTWAIT) :]
            return True
        match now.wants:
            case "":
                return self._request()
            case "item" if now.position <= now.due(moved):
                self._answer(item(now.position))
            case "upload" if now.position == now.total:
                self._answer(f"{now.digest.hexdigest()}\n".encode())
            case "upload" if wanted := now.due(moved) - now.position:
                return self._upload(wanted)
            case "noise" if now.position == now.total:
                now.wants = ""
            case "noise":
                start = now.position % BLOCK
                data = block(now.position // BLOCK)[start : start + now.due(moved) - now.position]
                now.position += self.sock.send(data, socket.MSG_DONTWAIT) if data else 0
        return True

    def _request(self) -> bool:
        now = self.exchange
        head, end, rest = now.unparsed.partition(b"\r\n\r\n")
        if not end:
            data = self.sock.recv(_LONGEST, socket.MSG_DONTWAIT)
            now.unparsed += data
            return bool(data)
        line, *lines = head.decode().split("\r\n")
        method, target, _ = line.split()
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        url = urlsplit(target)
        query = parse_qs(url.query)
        now.unparsed, now.position = rest, 0
        now.after, now.moves = int(query["after"][0]), int(query["moves"][0])
        _, kind, number = url.path.split("/")
        if method == "PUT":
            now.wants, now.total, now.digest = "upload", int(headers["content-length"]), Digest()
            data, now.unparsed = now.unparsed[: now.total], now.unparsed[now.total :]
            self._uploaded(data)
        elif kind == "item":
            now.wants, now.position, now.total = "item", int(number), ITEMS
        else:
            now.wants, now.total = "noise", int(number)
            now.unsent = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % now.total
        return True

    def _upload(self, wanted: int) -> bool:
        data = self.sock.recv(min(wanted, BLOCK // 2), socket.MSG_DONTWAIT)
        self._uploaded(data)
        return bool(data)

    def _uploaded(self, data: bytes) -> None:
        self.exchange.digest.update(data)
        self.exchange.position += len(data)

    def _answer(self, body: bytes) -> None:
        self.exchange.wants = ""
        self.exchange.unsent = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Server:
    """The loop."""

    def __init__(self, path: str, local: str, gate: Path) -> None:
        self.serving: dict[int, Client] = {}
        self.lent: dict[int, Client] = {}
        self.gate = gate
        self.app = Application(
            path, on_arrival=self.arrived, on_let_go=self.let_go, on_gone=self.gone, on_kept=self.kept
        )
        self.app.register("http", local)

    def arrived(self, sock: socket.socket, state: bytes) -> None:
        self.serving[sock.fileno()] = Client(sock, msgspec.msgpack.decode(state, type=Exchange))

    def let_go(self, _: str, descriptor: int) -> bytes:
        client = self.lent[descriptor] = self.serving.pop(descriptor)
        return msgspec.msgpack.encode(client.exchange)

    def gone(self, _: str, descriptor: int) -> None:
        self.lent.pop(descriptor).sock.close()

    def kept(self, _: str, descriptor: int) -> None:
        self.serving[descriptor] = self.lent.pop(descriptor)

    def run(self, listener: socket.socket | None) -> None:
        poll = select.epoll()
        poll.register(self.app, select.EPOLLIN)
        if listener is not None:
            poll.register(listener, select.EPOLLIN)
        print("ready", flush=True)
        while True:
            for descriptor, _ in poll.poll(_TICK / 1000):
                if listener is not None and descriptor == listener.fileno():
                    sock, _ = listener.accept()
                    self.serving[sock.fileno()] = Client(sock, Exchange())
                else:
                    self.app.process()
            moved = int(self.gate.read_text() or 0)
            for descriptor, client in list(self.serving.items()):
                with contextlib.suppress(BlockingIOError):
                    if not all(client.serve(moved) for _ in range(_STEPS)):
                        self.serving.pop(descriptor).sock.close()


def main() -> None:
    path, address, port, gate, *words = sys.argv[1:]
    server = Server(path, f"{address}:{port}", Path(gate))
    server.run(socket.create_server((address, int(port))) if "listen" in words else None)


if __name__ == "__main__":
    main()
