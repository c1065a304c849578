"""Connections that have no owner yet: handshakes under way, and what waits in a listener's accept queue."""

from __future__ import annotations

import argparse
import select
import socket
import time
from collections.abc import Collection, Iterable, Mapping

from migrate.cli import holds, selector
from migrate.cli.guard import Guard
from migrate.ici import FourTuple, parse_endpoint
from migrate.kernel import sockopt
from migrate.kernel.diag import Extension
from migrate.kernel.nft import RefusalTable
from migrate.tcpstate import TcpState
from migrate.unconnected import HANDSHAKES, settle

__all__ = ["add_arguments", "find", "keep", "listening", "refusals", "take"]

_PAUSE = 0.01  # seconds between two looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to wait for what."""
    parser.add_argument(
        "--wait-handshakes",
        metavar="SECONDS",
        type=holds.seconds,
        help="wait, at most that long, until the owner has accepted what a listener's queue holds; "
        f"without it that is taken, and only handshakes are waited for ({HANDSHAKES:g})",
    )


def find(chosen: selector.Selector, seconds: float | None) -> list[selector.Found]:
    """What the selector means, as soon as no handshake is under way among it, or the time is over."""
    limit = time.monotonic() + (HANDSHAKES if seconds is None else seconds)
    while True:
        found = selector.find(chosen, extensions=Extension.INFO)
        if time.monotonic() > limit or not any(_unfinished(each, owned=seconds is not None) for each in found):
            return found
        time.sleep(_PAUSE)


def _unfinished(found: selector.Found, *, owned: bool) -> bool:
    state = found.connection.state
    return state is TcpState.SYN_RECEIVED or (owned and state is TcpState.ESTABLISHED and not found.owners)


def take(
    sockets: dict[FourTuple, socket.socket], guard: Guard, seconds: float | None
) -> dict[FourTuple, socket.socket]:
    """What waits in the queues of the listeners among them. Raises Refused if a handshake does not end, KernelError."""
    listeners = listening(sockets.values())
    for listener in listeners:
        settle(listener, seconds=HANDSHAKES if seconds is None else seconds, owner_accepts=seconds is not None)
    return {_name(child): child for child in guard.accepted()} if listeners else {}


def listening(sockets: Iterable[socket.socket]) -> list[socket.socket]:
    """Those that listen."""
    return [sock for sock in sockets if sockopt.state(sock) == TcpState.LISTEN]


def keep(taken: Iterable[socket.socket], seconds: float) -> None:
    """Until the time is over, or they are: another dump has taken them."""
    left = {sock.fileno(): sock for sock in taken}
    ends = select.poll()
    for descriptor in left:
        ends.register(descriptor, 0)
    limit = time.monotonic() + seconds
    while left and (now := time.monotonic()) < limit:
        for descriptor, _ in ends.poll((limit - now) * 1000):
            ends.unregister(descriptor)
            left.pop(descriptor).close()


def refusals(sockets: Mapping[FourTuple, socket.socket], listeners: Collection[socket.socket]) -> RefusalTable:
    """While its records travel, nobody is told that a server is not here; what stands as long as a guard has it."""
    ends = set()
    for (local, port, _, _), sock in sockets.items():
        if sock in listeners:
            ends.add((local, port))
            if local == bytes(16) and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                ends.add((bytes(4), port))
    return RefusalTable(ends)


def _name(sock: socket.socket) -> FourTuple:
    ends = []
    for address, port, *_ in (sock.getsockname(), sock.getpeername()):
        packed, _ = parse_endpoint(f"[{address.partition('%')[0]}]" if ":" in address else address)
        ends += [packed, port]
    return FourTuple(*ends)
