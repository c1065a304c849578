"""Many connections at once, each of which echoes: a server, an adopter, and their clients.

python tests/crowd.py serve ADDRESS PORT        # an echo server, one of several there may be; says "ready"
python tests/crowd.py adopted                   # the same for the sockets of LISTEN_FDS

with Crowd(net.host("client"), address, port, 10000) as crowd:
    crowd.echo()                                # everyone says something of its own and hears it
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.fix_netns import Host

__all__ = ["ADOPTED", "SERVE", "Crowd"]

SERVE = [sys.executable, os.path.abspath(__file__), "serve"]
ADOPTED = [sys.executable, os.path.abspath(__file__), "adopted"]


class Crowd:
    """``count`` connections of ``host`` to a server that echoes; a context manager."""

    def __init__(self, host: Host, address: str, port: int, count: int) -> None:
        raise_limit()
        self._opened = contextlib.ExitStack()
        self._said = 0
        self.sockets: list[socket.socket] = []
        self.waited: list[float] = []  # seconds that each has waited at most for its word
        try:
            with host.entered():
                for _ in range(count):
                    sock = self._opened.enter_context(socket.create_connection((address, port), timeout=10))
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.sockets.append(sock)
                    self.waited.append(0.0)
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def echo(self, *, seconds: float = 30) -> float:
        """Everyone says a word of its own and must hear it; the longest wait, in seconds."""
        self._said += 1
        with select.epoll() as poll:
            waiting: dict[int, tuple[socket.socket, bytes, float]] = {}
            numbers = {sock.fileno(): number for number, sock in enumerate(self.sockets)}
            for number, sock in enumerate(self.sockets):
                word = b"%08d:%08d;" % (self._said, number)
                poll.register(sock, select.EPOLLIN)
                sock.sendall(word)
                waiting[sock.fileno()] = sock, word, time.monotonic()
            longest, limit = 0.0, time.monotonic() + seconds
            while waiting:
                ready = poll.poll(1.0, maxevents=1024)
                if time.monotonic() > limit:
                    names = [sock.getsockname() for sock, _, _ in waiting.values()]
                    raise AssertionError(f"{len(waiting)} did not echo, such as {names[:5]}")
                for descriptor, _ in ready:
                    sock, word, since = waiting[descriptor]
                    heard = sock.recv(len(word))
                    if heard == word:
                        number, waited = numbers[descriptor], time.monotonic() - since
                        self.waited[number] = max(self.waited[number], waited)
                        longest = max(longest, waited)
                        poll.unregister(descriptor)
                        del waiting[descriptor]
                    else:
                        assert heard, f"{sock.getsockname()} was closed"
                        assert word.startswith(heard), f"{sock.getsockname()} heard {heard!r}"
                        waiting[descriptor] = sock, word[len(heard) :], since
        return longest


def raise_limit() -> None:
    """As many descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def echo(sockets: Iterable[socket.socket], listener: socket.socket | None = None) -> None:
    """Echo until all have closed; with a listener for ever."""
    poll = select.epoll()
    open_: dict[int, socket.socket] = {}

    def add(sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        open_[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)

    for sock in sockets:
        add(sock)
    if listener is not None:
        listener.setblocking(False)
        poll.register(listener, select.EPOLLIN)
    while open_ or listener is not None:
        for descriptor, _ in poll.poll():
            if listener is not None and descriptor == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        add(listener.accept()[0])
                continue
            sock = open_[descriptor]
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""  # ECONNABORTED: it moved away
            if data:
                try:
                    sock.send(data)
                    continue
                except OSError as error:
                    print(f"read but not answered: {error}", file=sys.stderr, flush=True)
            poll.unregister(descriptor)
            open_.pop(descriptor).close()


def main() -> None:
    raise_limit()
    if sys.argv[1] == "serve":
        address = sys.argv[2]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        end = address, int(sys.argv[3])
        with socket.create_server(end, family=family, backlog=4096, reuse_port=True) as listener:
            print("ready", flush=True)
            echo([], listener)
    else:
        count = int(os.environ["LISTEN_FDS"])
        echo([socket.socket(fileno=3 + position) for position in range(count)])


if __name__ == "__main__":
    main()
