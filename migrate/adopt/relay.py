"""Adoption by a relay: the connection moved here, the server behind it is wherever it is.

One child process for all connections. It opens a connection to the server for each and carries bytes both ways, with
half-closes; when either end breaks, both are closed. It suits servers without state in the connection, such as
an HTTP server between two requests: the server sees a new connection, the client none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys

from migrate.adopt.child import LISTEN_FDS_START, SystemdAdopter
from migrate.errors import UsageError

__all__ = ["RelayAdopter", "main", "relay"]

_CHUNK = 65536  # bytes; also what is in this process at most, for each direction of each connection


class RelayAdopter(SystemdAdopter):
    """Hands every connection to one relay in front of ``server``, written HOST:PORT or [ADDR6]:PORT."""

    def __init__(self, server: str, *, session: bool = False) -> None:
        _endpoint(server)
        super().__init__([sys.executable, "-m", "migrate.adopt.relay", server], session=session)


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"{text!r} is no server to relay to", hint="write HOST:PORT, as in 127.0.0.1:80")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def relay(client: socket.socket, server: tuple[str, int]) -> None:
    """Connect to ``server`` and carry bytes both ways until both ends have closed or one broke; closes ``client``."""
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    with client, socket.socket(_family(server), socket.SOCK_STREAM) as backend:
        backend.setblocking(False)
        with contextlib.suppress(OSError):
            await loop.sock_connect(backend, server)
            pumps = [asyncio.create_task(_pump(client, backend)), asyncio.create_task(_pump(backend, client))]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()


async def _pump(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(sink, data)
    sink.shutdown(socket.SHUT_WR)


def _family(server: tuple[str, int]) -> socket.AddressFamily:
    return socket.getaddrinfo(*server, type=socket.SOCK_STREAM)[0][0]


async def _relay_all(clients: list[socket.socket], server: tuple[str, int]) -> None:
    await asyncio.gather(*(relay(client, server) for client in clients))


def main() -> None:
    """``python -m migrate.adopt.relay HOST:PORT`` with connections as sd_listen_fds(3) passes them."""
    count = int(os.environ["LISTEN_FDS"])
    clients = [socket.socket(fileno=LISTEN_FDS_START + position) for position in range(count)]
    asyncio.run(_relay_all(clients, _endpoint(sys.argv[1])))


if __name__ == "__main__":
    main()
