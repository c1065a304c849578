"""Who owns the connections on their new host: a relay that runs beforehand and is given sockets (SCM_RIGHTS).

A relay that were started for each batch would take the time of an interpreter's start, and the peers would wait.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence

from migrate.adopt.relay import relay
from migrate.demo.network import Host
from migrate.errors import HostError

__all__ = ["MOST", "Owner"]

MOST = 253  # descriptors a message can carry (SCM_MAX_FD in include/net/scm.h)


class Owner:
    """The relay's process in front of ``server``, as who started it sees it."""

    def __init__(self, host: Host, port: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "migrate.demo.owner", str(port)]
            self._process = host.start(command, stdin=theirs.fileno())
        if not self._channel.recv(1):
            raise HostError("the demo's relay does not start")

    def give(self, sockets: Sequence[socket.socket]) -> None:
        """These active connections are its own from now on; at most `MOST`. The caller closes its descriptors."""
        socket.send_fds(self._channel, [b"."], [sock.fileno() for sock in sockets])

    def close(self) -> None:
        """End it with all its connections."""
        self._channel.close()
        self._process.wait()


async def _main(port: int) -> None:
    loop = asyncio.get_running_loop()
    carried: set[asyncio.Task[None]] = set()
    over = asyncio.Event()

    def take() -> None:
        data, descriptors, _, _ = socket.recv_fds(channel, 1, MOST)
        if not data:
            over.set()
        for descriptor in descriptors:
            task = loop.create_task(relay(socket.socket(fileno=descriptor), ("127.0.0.1", port)))
            carried.add(task)
            task.add_done_callback(carried.discard)

    with socket.socket(fileno=0) as channel:
        channel.send(b".")
        loop.add_reader(channel, take)
        await over.wait()
        loop.remove_reader(channel)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
