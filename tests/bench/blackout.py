"""How long one echoing connection is away when it moves between two hosts through the API of one process."""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from migrate import FourTuple, activate, dump, hold, release, restore
from migrate.kernel import sockopt, tcpinfo
from migrate.steer.vip import Vip
from tests.bench.measure import ROOT, Report, narrate, spread
from tests.fix_netns import Host, Lan

PORT = 7000
MESSAGE = 64  # bytes
PAUSE = 0.1  # seconds of undisturbed echo before and after every move
AFTER = 0.02  # seconds after a move in which its gap may still show


def measure(report: Report) -> None:
    moves = 4 if report.quick else 40
    narrate(f"blackout of {moves} moves")
    lan = Lan(["client", "a", "b"])
    try:
        seen, windows, phases = _run(lan, moves)
    finally:
        lan.close()
    away = [_longest_gap(seen["replies"], start, end + AFTER) for start, end in windows]
    # As long a look at the time before each move shows what the machine does to an echo that nobody moves.
    usual = [_longest_gap(seen["replies"], 2 * start - end - AFTER, start) for start, end in windows]
    net = [1e3 * (gap - other) for gap, other in zip(away, usual, strict=True)]
    report.number("blackout of one echoing connection, median", median(net), 2.0, "ms", spread=spread(net))
    report.number("retransmissions by its peer", seen["retransmissions"], 0, "segments")
    table = {phase: spread(1e3 * each for each in times) for phase, times in phases.items()}
    report.tables["blackout by phases, ms"] = {
        **table,
        "longest gap at the peer": spread(1e3 * gap for gap in away),
        "the same without a move": spread(1e3 * gap for gap in usual),
    }


@dataclass
class Place:
    """One of the two hosts, with all that takes time to make."""

    host: Host
    held: hold
    vip: Vip


class Stopwatch:
    def __init__(self) -> None:
        self.phases: dict[str, list[float]] = {}
        self._last = 0.0

    def start(self) -> float:
        self._last = time.monotonic()
        return self._last

    def lap(self, phase: str) -> float:
        now = time.monotonic()
        self.phases.setdefault(phase, []).append(now - self._last)
        self._last = now
        return now


def _run(lan: Lan, moves: int) -> tuple[dict[str, Any], list[tuple[float, float]], dict[str, list[float]]]:
    """What the client saw, from when to when each move took, and how long its phases."""
    watch, windows = Stopwatch(), []
    # Two moves within the second for which a neighbour entry is locked would leave the client with the old address.
    lan.host("client").sysctl("net.ipv4.neigh.eth0.locktime", 0)
    with ExitStack() as stack:
        here, there = (_place(stack, lan.host(name)) for name in "ab")
        here.vip.announce(socket.inet_aton(lan.vip4))
        with here.host.entered(), socket.create_server((lan.vip4, PORT)) as listener:
            command = [sys.executable, "-m", "tests.bench.blackout", lan.vip4]
            client = lan.host("client").popen(command, stdout=-1, cwd=ROOT)
            sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _echo(sock, PAUSE)
        for _ in range(moves):
            sock, window = _move(sock, here, there, watch)
            windows.append(window)
            here, there = there, here
            _echo(sock, PAUSE)
            there.held.remove([_name(sock)])
            _echo(sock, PAUSE)
        sock.close()
        seen = json.load(client.stdout)
    return seen, windows, watch.phases


def _place(stack: ExitStack, host: Host) -> Place:
    return Place(
        host, stack.enter_context(hold(netns=host.netns)), stack.enter_context(Vip(host.dev, namespace=host.netns))
    )


def _name(sock: socket.socket) -> FourTuple:
    (local, local_port), (remote, remote_port) = sock.getsockname(), sock.getpeername()
    return FourTuple(socket.inet_aton(local), local_port, socket.inet_aton(remote), remote_port)


def _move(
    sock: socket.socket, here: Place, there: Place, watch: Stopwatch
) -> tuple[socket.socket, tuple[float, float]]:
    """The order of a handoff. The source's hold stays, so that nothing that is still under way draws a RST."""
    name = _name(sock)
    there.held.add([name])
    start = watch.start()
    here.held.add([name])
    watch.lap("hold")
    record = dump(sock)
    watch.lap("dump")
    there.vip.announce(name.local)
    watch.lap("steer")
    with there.host.entered():
        moved = restore(record, activate=False)
    watch.lap("restore")
    release(sock)
    sock.close()
    watch.lap("release")
    activate(moved)
    there.held.keep(packet for packets in here.held.take([name]).values() for packet in packets)
    there.held.remove([name])
    end = watch.lap("activate, replay")
    here.vip.withdraw(name.local)
    return moved, (start, end)


def _echo(sock: socket.socket, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([sock], [], [], left)[0]:
            data = sock.recv(MESSAGE)
            if not data:
                raise SystemExit("the client has gone")
            sock.sendall(data)


def _longest_gap(replies: Sequence[float], start: float, end: float) -> float:
    """Seconds between two replies that follow each other, the longest of those that touch the window."""
    first, last = max(bisect_right(replies, start) - 1, 0), min(bisect_left(replies, end) + 1, len(replies))
    return max(later - earlier for earlier, later in zip(replies[first:last], replies[first + 1 : last], strict=False))


def main() -> None:
    """The client: asks, waits for the answer, asks again, until the server is gone; when each answer came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server")
    sock = socket.create_connection((parser.parse_args().server, PORT))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    message, replies = bytes(MESSAGE), []
    while True:
        sock.send(message)
        if not sock.recv(MESSAGE):
            break
        replies.append(time.monotonic())
    retransmissions = tcpinfo.parse(sockopt.tcp_info(sock)).total_retrans
    json.dump({"replies": replies, "retransmissions": retransmissions}, sys.stdout)


if __name__ == "__main__":
    main()
