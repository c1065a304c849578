"""An application that takes part: a server with a loop of its own and state in every connection.

    python tests/taking_part.py SOCKET ADDRESS PORT [listen] [refuse]

It answers each line with how many it has had on this connection and the CRC of all of them. What it knows of a
connection, with the part of a line that it has read already, is its state. Says "ready" when it is.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import zlib

from migrate.app.plain import Application


class Client:
    """One connection and what is known of it."""

    def __init__(self, sock: socket.socket, state: bytes = b'[0, 0, ""]') -> None:
        self.sock = sock
        self.count, self.crc, self.rest = json.loads(state)
        self.lent = False

    def state(self) -> bytes:
        return json.dumps([self.count, self.crc, self.rest]).encode()

    def serve(self) -> bool:
        """Whether it goes on."""
        data = self.sock.recv(65536).decode()
        *lines, self.rest = (self.rest + data).split("\n")
        for line in lines:
            self.count += 1
            self.crc = zlib.crc32(line.encode(), self.crc)
            self.sock.sendall(b"%d %d\n" % (self.count, self.crc))
        return bool(data)


class Server:
    """The loop."""

    def __init__(self, path: str, local: str, *, refuses: bool) -> None:
        self.clients: dict[int, Client] = {}
        self.poll = select.epoll()
        self.refuses = refuses
        self.app = Application(
            path, on_arrival=self.arrived, on_let_go=self.let_go, on_gone=self.gone, on_kept=self.kept
        )
        self.app.register("lines", local)
        self.poll.register(self.app, select.EPOLLIN)

    def arrived(self, sock: socket.socket, state: bytes = b'[0, 0, ""]') -> None:
        self.clients[sock.fileno()] = Client(sock, state)
        self.poll.register(sock, select.EPOLLIN)

    def let_go(self, _: str, descriptor: int) -> bytes | None:
        if self.refuses:
            return None
        self.poll.unregister(descriptor)
        self.clients[descriptor].lent = True  # what poll() has said about it already no longer counts
        return self.clients[descriptor].state()

    def gone(self, _: str, descriptor: int) -> None:
        self.clients.pop(descriptor).sock.close()

    def kept(self, _: str, descriptor: int) -> None:
        self.clients[descriptor].lent = False
        self.poll.register(descriptor, select.EPOLLIN)

    def run(self, listener: socket.socket | None) -> None:
        if listener is not None:
            self.poll.register(listener, select.EPOLLIN)
        print("ready", flush=True)
        while True:
            for descriptor, _ in self.poll.poll():
                if descriptor == self.app.fileno():
                    self.app.process()
                elif listener is not None and descriptor == listener.fileno():
                    self.arrived(listener.accept()[0])
                elif (client := self.clients.get(descriptor)) and not client.lent and not client.serve():
                    self.clients.pop(descriptor).sock.close()


def main() -> None:
    path, address, port, *words = sys.argv[1:]
    server = Server(path, f"{address}:{port}", refuses="refuse" in words)
    server.run(socket.create_server((address, int(port))) if "listen" in words else None)


if __name__ == "__main__":
    main()
