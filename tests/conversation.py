"""One connection with everything in it that a handoff can lose or double, and what both ends must have seen in the end.

The client has sent what nobody reads yet, and says more all the time. The server has sent more than the client's window
takes, so a part is sent and a part is not. Its owner sleeps; at the end whoever owns it echoes what the client said.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading

from migrate.fourtuple import FourTuple
from tests.fix_netns import Host
from tests.peers import noise

UNREAD = 5_000  # bytes
BUFFER = 16_384  # of the server's socket for sending and of the client's for receiving
LONGEST = 20_000  # bytes that the client says: all fits into the window of a server that sleeps


class Conversation:
    """From ``client`` to the address of ``listener``."""

    def __init__(self, client: Host, listener: socket.socket) -> None:
        with client.entered():
            self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.client.settimeout(10)
        self.client.connect(listener.getsockname())
        self.server = listener.accept()[0]
        self.four_tuple = FourTuple.parse("{}:{},{}:{}".format(*self.server.getsockname(), *self.server.getpeername()))
        self._said = hashlib.sha256()
        self._count = 0
        self._answer = hashlib.sha256()
        self._fill()
        self.client.setblocking(False)
        self.say(next(noise(1))[:UNREAD])

    def _fill(self) -> None:
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for block in noise(2):
                self._answer.update(block[: self.server.send(block)])
        self.server.setblocking(True)

    def say(self, words: bytes = b"still there? ") -> None:
        """The client sends this, or as much as there is room for."""
        if self._count + len(words) <= LONGEST:
            with contextlib.suppress(BlockingIOError):
                sent = self.client.send(words)
                self._said.update(words[:sent])
                self._count += sent

    def finish(self, *, moved: bool) -> None:
        """Both ends say all and close. Raises AssertionError, OSError."""
        echo = threading.Thread(target=self._lost if moved else self._echo)
        echo.start()
        self.say(b"the end")
        self.client.settimeout(40)
        heard = bytearray()
        self.client.shutdown(socket.SHUT_WR)
        while block := self.client.recv(1 << 16):
            heard += block
        echo.join(10)
        assert not echo.is_alive(), "the owner hangs"
        first, echoed = heard[: len(heard) - self._count], heard[len(heard) - self._count :]
        assert hashlib.sha256(first).digest() == self._answer.digest(), "what the server had sent is not what came"
        assert hashlib.sha256(echoed).digest() == self._said.digest(), "the echo is not what the client said"

    def _echo(self) -> None:
        while block := self.server.recv(1 << 16):
            self.server.sendall(block)
        self.server.close()

    def _lost(self) -> None:
        with contextlib.suppress(ConnectionAbortedError):
            self.server.settimeout(1)
            assert not self.server.recv(1), "the owner it was taken from still hears of it"
        self.server.close()

    def close(self) -> None:
        """Whatever became of it."""
        self.client.close()
        self.server.close()
