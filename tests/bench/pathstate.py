"""What path state is worth: a bulk stream over a long path moves with it and without, and a picture is drawn.

``python -m tests.bench.pathstate FILE.svg``; best through scripts/plot-pathstate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import migrate
from migrate.checkpoint import release
from migrate.pathstate import PathState
from migrate.restore import Restored
from migrate.steer.vip import Vip
from tests.bench.longpath import Line, long_path
from tests.bench.pathplot import draw
from tests.fix_netns import Host, Lan
from tests.kernel.pairs import unacknowledged
from tests.moving import four_tuple
from tests.peers import connect
from tests.waiting import until

RATE, DELAY = 40e6 / 8, 0.020  # bytes a second; seconds each way
QUEUE = RATE * 2 * DELAY  # bytes: as much as is under way
BEFORE, AFTER = 3.0, 2.0  # seconds
WARM_UP, ANSWER = 4_000_000, 250_000  # bytes
WINDOWS = 0.3, 1.0  # seconds after the move that the numbers speak of


class Run(NamedTuple):
    """One stream; times in seconds from the move's begin, on the client's side."""

    carried: bool
    arrivals: list[tuple[float, int]]  # when, how many bytes
    record: dict[str, int]  # what the dump found
    took: float  # seconds

    def received(self, begin: float, end: float) -> int:
        """Bytes that arrived between those moments."""
        return sum(size for when, size in self.arrivals if begin <= when < end)

    def longest(self) -> float:
        """The longest gap after the move, in seconds."""
        times = [when for when, _ in self.arrivals if when > -DELAY]
        return max(after - before for before, after in itertools.pairwise(times))

    def share(self, seconds: float) -> float:
        """Of what the path could carry in the first seconds after the move, what arrived, in percent."""
        return 100 * self.received(0, seconds) / (RATE * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="plot-pathstate", description=__doc__)
    parser.add_argument("picture", type=Path, metavar="FILE.svg")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each kind (5)")
    arguments = parser.parse_args()
    # Whatever else this machine does: it must not look like a slow path.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    runs = [run(carried) for _ in range(arguments.runs) for carried in (False, True)]
    for each in runs:
        print(json.dumps(summary([each])), flush=True)
    for carried in (False, True):
        milliseconds = [round(answer(carried) * 1e3) for _ in range(arguments.runs)]
        report = {"path_state": carried, "answer_bytes": ANSWER, "milliseconds": milliseconds}
        print(json.dumps({"median": True, **report, "answer_ms": statistics.median(milliseconds)}), flush=True)
    groups = [[each for each in runs if each.carried is carried] for carried in (False, True)]
    for group in groups:
        print(json.dumps({"median": True, **summary(group)}))
    # Means: a run now and then meets one of the losses by which cubic finds the path's limit.
    streams = [[(when, size / len(group)) for each in group for when, size in each.arrivals] for group in groups]
    shares = [statistics.mean(each.share(WINDOWS[0]) for each in group) for group in groups]
    arguments.picture.write_text(draw(streams, shares, runs=arguments.runs, rate=RATE, seconds=WINDOWS[0]))


def summary(runs: Sequence[Run]) -> dict[str, object]:
    """Medians."""
    return {
        "path_state": runs[0].carried,
        "cwnd": statistics.median(each.record["cwnd"] for each in runs),
        **{
            f"first_{seconds * 1000:.0f}_ms_percent": round(statistics.median(each.share(seconds) for each in runs), 1)
            for seconds in WINDOWS
        },
        "longest_gap_ms": round(statistics.median(each.longest() for each in runs) * 1e3, 1),
        "move_ms": round(statistics.median(each.took for each in runs) * 1e3, 1),
    }


def run(carried: bool) -> Run:
    """A bulk download that moves from a to b while it is at full speed."""
    with ExitStack() as stack:
        scene = _scene(stack, carried)
        here, there = scene.here, scene.there
        arrivals: list[tuple[float, int]] = []
        threads = [_thread(_receive, here, arrivals), _thread(_send, there)]
        time.sleep(BEFORE)
        begin = time.monotonic()
        moved, record, took = scene.move()
        threads[1].join()
        there.close()
        threads.append(_thread(_send, moved))
        time.sleep(AFTER)
        here.shutdown(socket.SHUT_RDWR)
        here.close()
        threads[0].join()
        moved.shutdown(socket.SHUT_RDWR)
        threads[2].join()
        moved.close()
    numbers = {name: getattr(record, name) for name in ("cwnd", "ssthresh", "srtt_us")}
    return Run(carried, [(when - begin, size) for when, size in arrivals], numbers, took)


def answer(carried: bool) -> float:
    """Seconds that an answer takes which is given as soon as an idle connection has moved."""
    with ExitStack() as stack:
        scene = _scene(stack, carried)
        here, there = scene.here, scene.there
        _timed(here, there, WARM_UP)
        until(lambda: not unacknowledged(there))
        moved, _, _ = scene.move()
        there.close()
        took = _timed(here, moved, ANSWER)
        here.close()
        moved.close()
    return took


def _timed(here: socket.socket, there: socket.socket, size: int) -> float:
    begin = time.monotonic()
    sending = _thread(there.sendall, bytes(size))
    with here.makefile("rb") as stream:
        stream.read(size)
    took = time.monotonic() - begin
    sending.join()
    return took


class _Scene(NamedTuple):
    """A connection over the long path; its server's end is at a, and can move to b."""

    a: Host
    b: Host
    vips: Sequence[Vip]
    address: bytes
    paths: PathState | None
    here: socket.socket
    there: socket.socket

    def move(self) -> tuple[socket.socket, migrate.Ici, float]:
        """The socket at b, what went there, and how many seconds that took."""
        name = four_tuple(self.there)
        with migrate.hold(netns=self.a.netns) as before, migrate.hold(netns=self.b.netns) as after:
            begin = time.monotonic()
            after.add([name])
            before.add([name])
            record = migrate.dump(self.there)
            self.vips[0].withdraw(self.address)
            self.vips[1].announce(self.address)
            with self.b.entered():
                restored = migrate.restore(record, activate=False)
            assert isinstance(restored, Restored)
            if self.paths is not None:
                self.paths.carry(restored)
            release(self.there)
            after.keep(packet for packets in before.take().values() for packet in packets)
            after.replay()
            migrate.activate(restored)
            after.remove([name])
            took = time.monotonic() - begin
        return restored, record, took


def _scene(stack: ExitStack, carried: bool) -> _Scene:
    net = Lan(["client", "a", "b"])
    stack.callback(net.close)
    client, a, b = (net.host(name) for name in ("client", "a", "b"))
    for host in (a, b):
        host.run(["ip", "link", "set", "dev", host.dev, "gso_max_size", "16384"])
    stack.enter_context(long_path(net, Line(DELAY, RATE, QUEUE), Line(DELAY)))
    vips = [stack.enter_context(Vip(host.dev, namespace=host.netns)) for host in (a, b)]
    address = socket.inet_aton(net.vip4)
    vips[0].announce(address)
    paths = stack.enter_context(PathState()) if carried else None
    return _Scene(a, b, vips, address, paths, *connect(client, a, net.vip4, prepare=_cubic))


def _cubic(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def _thread(work: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
    thread.start()
    return thread


def _receive(sock: socket.socket, arrivals: list[tuple[float, int]]) -> None:
    buffer = bytearray(1 << 18)
    while True:
        try:
            size = sock.recv_into(buffer)
        except OSError:
            return
        if not size:
            return
        arrivals.append((time.monotonic(), size))


def _send(sock: socket.socket) -> None:
    block = bytes(1 << 16)
    while True:
        try:
            sock.sendall(block)
        except OSError:  # it was released, or the stream is over
            return


if __name__ == "__main__":
    main()
