"""Connections that have no owner yet: handshakes under way, and what waits in a listener's accept queue."""

from __future__ import annotations

import argparse
import socket
import time
from contextlib import ExitStack

from migrate.cli import holds, selector
from migrate.ici import FourTuple, parse_endpoint
from migrate.kernel import sockopt
from migrate.kernel.diag import Extension
from migrate.tcpstate import TcpState
from migrate.unconnected import HANDSHAKES, settle

__all__ = ["add_arguments", "find", "take"]

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


def take(sockets: dict[FourTuple, socket.socket], opened: ExitStack, seconds: float | None) -> None:
    """Add what waits in the queues of the listeners among them. Raises Refused if a handshake does not end."""
    for sock in list(sockets.values()):
        if sockopt.state(sock) != TcpState.LISTEN:
            continue
        limit = HANDSHAKES if seconds is None else seconds
        for child in settle(sock, seconds=limit, owner_accepts=seconds is not None):
            opened.enter_context(child)
            sockets[_name(child)] = child


def _name(sock: socket.socket) -> FourTuple:
    ends = []
    for address, port, *_ in (sock.getsockname(), sock.getpeername()):
        packed, _ = parse_endpoint(f"[{address.partition('%')[0]}]" if ":" in address else address)
        ends += [packed, port]
    return FourTuple(*ends)
