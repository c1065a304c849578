"""What a stream at full speed loses when it moves between two agents once a second: the longest stall, the throughput.

A child that each agent starts (bulk.c) goes on with the stream where its predecessor was cut off; the client compares
every byte. The reference is the same connection in the seconds before, in which nobody moves it.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from migrate.agent.client import Client
from tests.bench.measure import Report, narrate, spread
from tests.bench.twoagents import PORT, move, scene

__all__ = ["measure"]

PERIOD = 1 << 16  # bytes after which the stream repeats
BUFFER = 1 << 18  # bytes that the client reads at a time
EVERY = 1.0  # seconds from one move to the next


def measure(report: Report, *, rounds: int, seconds: int) -> None:
    """In turns ``seconds`` in which it stays and ``seconds`` in which it moves."""
    narrate(f"a bulk stream, {rounds} times {seconds} s without moves and with")
    with tempfile.TemporaryDirectory(prefix="tcpmig-bench-") as room, contextlib.ExitStack() as clients:
        pattern, program = Path(room, "pattern"), Path(room, "bulk")
        pattern.write_bytes(random.Random(1).randbytes(PERIOD))
        source = Path(__file__).with_name("bulk.c")
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
        at = clients.enter_context(scene(f"*=child:{program} {pattern}", [program, pattern]))
        with at.net.host("client").entered():
            sock = socket.create_connection((at.net.vip4, PORT), timeout=10)
        callers = {id(each): clients.enter_context(Client(f"unix:{each.socket}")) for each in (at.a, at.b)}
        reader = _Reader(clients.enter_context(sock), pattern.read_bytes())
        pairs = at.pairs()
        still, moving, usual, stalls = [], [], [], []
        time.sleep(EVERY)  # its window grows
        reader.since()
        for _ in range(rounds):
            time.sleep(seconds)
            rate, longest = reader.since()
            still.append(rate)
            usual.append(longest * 1000)
            received, begin = reader.received, time.perf_counter()
            for number in range(round(seconds / EVERY)):
                source_agent, destination = next(pairs)
                move(callers[id(source_agent)], sock, destination)
                time.sleep(max(0.0, begin + (number + 1) * EVERY - time.perf_counter()))
                stalls.append(reader.since()[1] * 1000)
            moving.append((reader.received - received) / (time.perf_counter() - begin))
        reader.stop()
    shares = [one / other for one, other in zip(moving, still, strict=True)]
    report.number("stall of a bulk stream, longest", max(stalls), 60, "ms", spread=spread(stalls))
    report.number("throughput with a move a second", median(shares), 0.9, "", at_least=True, spread=spread(shares))
    report.tables["a bulk stream"] = {
        "unmoved, MB/s": spread(each / 1e6 for each in still),
        "moved, MB/s": spread(each / 1e6 for each in moving),
        "longest gap, unmoved, ms": spread(usual),
        "longest gap, moved, ms": spread(stalls),
    }


class _Reader(threading.Thread):
    """Receives and compares; the first bytes say where in the pattern the stream begins."""

    def __init__(self, sock: socket.socket, pattern: bytes) -> None:
        super().__init__(daemon=True)
        self.received = 0  # bytes
        self._sock = sock
        self._pattern = pattern * (BUFFER // PERIOD + 1)
        self._longest = 0.0
        self._marked = 0, time.perf_counter()
        self._over = False
        self._wrong: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            first = self._sock.recv(8, socket.MSG_WAITALL)
            at = (self._pattern.index(first) + len(first)) % PERIOD
            heard = time.perf_counter()
            while not self._over:
                data = self._sock.recv(BUFFER)
                assert data, "the stream ended"
                assert self._pattern.startswith(data, at), f"after {self.received} bytes the stream is another"
                at = (at + len(data)) % PERIOD
                now = time.perf_counter()
                self._longest = max(self._longest, now - heard)
                self.received, heard = self.received + len(data), now
        except BaseException as error:
            self._wrong = error

    def since(self) -> tuple[float, float]:
        """Since this was asked last: bytes a second, and the longest gap in seconds."""
        if self._wrong is not None:
            raise self._wrong
        received, begin = self._marked
        self._marked = self.received, time.perf_counter()
        longest, self._longest = self._longest, 0.0
        return (self._marked[0] - received) / (self._marked[1] - begin), longest

    def stop(self) -> None:
        """Stop, or raise what went wrong."""
        self._over = True
        self.join(10)
        if self._wrong is not None:
            raise self._wrong
