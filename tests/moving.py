"""Moving one connection between two hosts of a test's LAN through the public API, as an orchestrator would.

with Mover(net.host("a"), net.host("b"), net.vip4) as mover:
    server = mover.move(server)         # a -> b: the socket there
    server = mover.move(server)         # and back
"""

from __future__ import annotations

import contextlib
import socket
from typing import Self

import migrate
from migrate.kernel import netns
from migrate.pathstate import Marks
from migrate.restore import Restored
from migrate.steer.vip import Vip
from tests.fix_netns import Host

__all__ = ["Mover", "four_tuple"]


class Mover:
    """A floating address and its connections on one of two hosts; holds and address moves are made anew each time."""

    def __init__(self, here: Host, there: Host, address: str) -> None:
        self.here, self.there = here, there
        self.address = address
        self._half_way = False
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._address = socket.inet_pton(family, address)
        self._stack = contextlib.ExitStack()
        self._vips = {
            host.name: self._stack.enter_context(Vip(host.dev, namespace=host.netns)) for host in (here, there)
        }
        self._vips[here.name].announce(self._address)
        self.record: migrate.Ici | None = None  # of the last move

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def settle(self) -> None:
        """After a move that failed half-way the address is where ``here`` says."""
        if not self._half_way:
            return
        self._vips[self.there.name].withdraw(self._address)
        self._vips[self.here.name].announce(self._address)

    def move(
        self, sock: socket.socket, name: migrate.FourTuple | None = None, *, marks: Marks | None = None
    ) -> socket.socket:
        """Take the connection of ``sock``, whose host has the address now, to the other host; its ECN by ``marks``.

        The kernel does not tell its ``name``, the four-tuple, in every state.
        """
        name = name or four_tuple(sock)
        self._half_way = True
        with (
            migrate.hold([name], netns=self.here.netns) as before,
            migrate.hold([name], netns=self.there.netns) as after,
        ):
            record = self.record = migrate.Ici.decode(migrate.dump(sock).encode())
            self.move_address()
            with netns.entered(self.here.netns):
                restored = migrate.restore(record, activate=False)
            if marks is not None:
                assert isinstance(restored, Restored)
                marks.carry(restored)
            migrate.release(sock)
            sock.close()
            after.keep(packet for packets in before.take().values() for packet in packets)
            migrate.activate(restored)
        self._half_way = False
        return restored

    def move_address(self) -> None:
        """From one host to the other."""
        self._vips[self.here.name].withdraw(self._address)
        self._vips[self.there.name].announce(self._address)
        self.here, self.there = self.there, self.here


def four_tuple(sock: socket.socket) -> migrate.FourTuple:
    """The connection as its kernel names it, while it has a peer."""
    ends = [
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        for address, port, *_ in (sock.getsockname(), sock.getpeername())
    ]
    return migrate.FourTuple.parse(",".join(ends))
