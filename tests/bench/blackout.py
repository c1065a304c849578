"""How long one echoing connection is away when it moves between two hosts through the API of one process."""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from migrate import FourTuple, activate, dump, hold, release, restore
from migrate.kernel import sockopt, tcpinfo
from migrate.kernel.arp import Announcer
from migrate.kernel.link import Links
from tests.bench.measure import ROOT, Report, narrate, spread
from tests.fix_netns import Host, Lan

PORT = 7000
MESSAGE = 64  # bytes
PAUSE = 0.1  # seconds of undisturbed echo before and after every move
GUARD = 0.01  # seconds before a move that belong to nobody
AFTER = 0.02  # seconds after a move in which its gap may still show


def measure(report: Report) -> None:
    moves = 2 if report.quick else 40
    narrate(f"blackout of {moves} moves")
    found = json.loads(subprocess.check_output([sys.executable, "-m", "tests.bench.blackout", str(moves)], cwd=ROOT))
    seen, windows, phases = found["seen"], found["windows"], found["phases"]
    away = [_longest_gap(seen["replies"], start, end + AFTER) for start, end in windows]
    # As long a look at the time before each move shows what the machine does to an echo that nobody moves.
    usual = [_longest_gap(seen["replies"], 2 * start - end - AFTER - GUARD, start - GUARD) for start, end in windows]
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
    links: Links
    announcer: Announcer


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
    with ExitStack() as stack, ThreadPoolExecutor(1) as aside:
        here, there = (_place(stack, lan.host(name)) for name in "ab")
        here.links.add_address(here.host.dev, socket.inet_aton(lan.vip4))
        with here.host.entered(), socket.create_server((lan.vip4, PORT)) as listener:
            command = [sys.executable, "-m", "tests.bench.blackout", "--client", lan.vip4]
            client = lan.host("client").popen(command, stdout=subprocess.PIPE, cwd=ROOT)
            sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _echo(sock, PAUSE)
        for _ in range(moves):
            name = _name(sock)
            _echo(sock, PAUSE, aside.submit(_prepare, there, name))
            sock, window = _move(sock, name, here, there, watch)
            windows.append(window)
            _echo(sock, PAUSE)
            _echo(sock, PAUSE, aside.submit(_tidy, here, name))
            here, there = there, here
        with sock:
            sock.shutdown(socket.SHUT_WR)  # its last question may be unread: closing now would send a RST
            assert client.stdout
            seen = json.load(client.stdout)
    return seen, windows, watch.phases


def _place(stack: ExitStack, host: Host) -> Place:
    held = stack.enter_context(hold(netns=host.netns))
    links = stack.enter_context(Links(host.netns))
    with host.entered():
        return Place(host, held, links, stack.enter_context(Announcer(host.dev)))


def _prepare(place: Place, name: FourTuple) -> None:
    """The destination holds the connection and has its address, unannounced."""
    place.held.add([name])
    place.links.add_address(place.host.dev, name.local)


def _tidy(place: Place, name: FourTuple) -> None:
    """The source's hold stood until here, so that nothing that was still under way drew a RST."""
    place.links.remove_address(place.host.dev, name.local)
    place.held.remove([name])


def _name(sock: socket.socket) -> FourTuple:
    (local, local_port), (remote, remote_port) = sock.getsockname(), sock.getpeername()
    return FourTuple(socket.inet_aton(local), local_port, socket.inet_aton(remote), remote_port)


def _move(
    sock: socket.socket, name: FourTuple, here: Place, there: Place, watch: Stopwatch
) -> tuple[socket.socket, tuple[float, float]]:
    """The order of a handoff, as quick as one thread can go through it. The destination is prepared."""
    start = watch.start()
    here.held.add([name])
    watch.lap("hold")
    record = dump(sock)
    watch.lap("dump")
    with there.host.entered():
        moved = restore(record, activate=False)
    watch.lap("restore")
    there.announcer.announce(name.local)
    watch.lap("steer")
    release(sock)
    sock.close()
    watch.lap("release")
    activate(moved)
    there.held.keep(packet for packets in here.held.take([name]).values() for packet in packets)
    there.held.remove([name])
    end = watch.lap("activate, replay")
    return moved, (start, end)


def _echo(sock: socket.socket, seconds: float, meanwhile: Future[None] | None = None) -> None:
    """Answer for so long, and until what is done meanwhile is done."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 or (meanwhile and not meanwhile.done()):
        if select.select([sock], [], [], max(left, 0.001))[0]:
            data = sock.recv(MESSAGE)
            if not data:
                raise SystemExit("the client has gone")
            sock.sendall(data)
    if meanwhile:
        meanwhile.result()


def _longest_gap(replies: Sequence[float], start: float, end: float) -> float:
    """Seconds between two replies that follow each other, the longest of those that touch the window."""
    first, last = max(bisect_right(replies, start) - 1, 0), min(bisect_left(replies, end) + 1, len(replies))
    return max(later - earlier for earlier, later in zip(replies[first:last], replies[first + 1 : last], strict=False))


def _ask(server: str) -> dict[str, Any]:
    """The client: asks, waits for the answer, asks again, until the server has gone; when each answer came."""
    sock = socket.create_connection((server, PORT))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    message, replies = bytes(MESSAGE), []
    while True:
        sock.send(message)
        if not sock.recv(MESSAGE):
            break
        replies.append(time.monotonic())
    return {"replies": replies, "retransmissions": tcpinfo.parse(sockopt.tcp_info(sock)).total_retrans}


def main() -> None:
    """One of the two processes; before all others, as their time slices are longer than what is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moves", type=int, nargs="?")
    parser.add_argument("--client", metavar="SERVER")
    arguments = parser.parse_args()
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    if arguments.client:
        json.dump(_ask(arguments.client), sys.stdout)
        return
    lan = Lan(["client", "a", "b"])
    try:
        seen, windows, phases = _run(lan, arguments.moves)
    finally:
        lan.close()
    json.dump({"seen": seen, "windows": windows, "phases": phases}, sys.stdout)


if __name__ == "__main__":
    main()
