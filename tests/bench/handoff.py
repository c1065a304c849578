"""scripts/bench handoff: two agents on one machine, mutual TLS: how many connections a second, and how long each waits.

The reference is the C program of `scripts/bench core`, which does the kernel's share of the work without any agent.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from migrate.agent.client import Client
from migrate.agent.v1 import types_pb2
from tests.bench import stream
from tests.bench.measure import Contest, Report, narrate, spread
from tests.bench.twoagents import PORT, STEER, move, scene
from tests.crowd import Crowd
from tests.fix_agents import Agent
from tests.waiting import until

_PHASES = {value: name.removeprefix("PHASE_").lower() for name, value in types_pb2.Phase.items()}


def run(*, quick: bool) -> Report:
    report = Report("handoff", quick=quick)
    blackout(report, 5 if quick else 100)
    stream.measure(report, rounds=1 if quick else 5, seconds=2 if quick else 4)
    counts = (50, 100) if quick else (1000, 10_000)
    rates = {}
    for count in counts:
        rates[count] = throughput(report, count, rounds=2 if quick else 6)
    few, many = counts
    report.number("rate at many by rate at few", rates[many] / rates[few], 0.9, "", at_least=True)
    with Contest() as contest:
        reference(report, contest, counts[1], rates[many])
    return report


def throughput(report: Report, count: int, *, rounds: int) -> float:
    """Connections a second from the freeze of the first to the activation of the last; the median of the rounds."""
    narrate(f"{count} idle connections, {rounds} times")
    rates, p50, p99, phases = [], [], [], dict[str, list[float]]()
    with scene("*=hold") as at, Crowd(at.net.host("client"), at.net.vip4, PORT, count):
        pairs = at.pairs()
        memory = 0.0
        for number in range(rounds):
            source, destination = next(pairs)
            before = resident(source)
            began, ended, frozen = drain(source, destination, count, phases)
            if number:  # the first opens what is needed
                memory = max(memory, (resident(source) - before) / count)
                rates.append(count / ((ended - began) / 1e9))
                p50.append(frozen[len(frozen) // 2] / 1000)
                p99.append(frozen[len(frozen) * 99 // 100] / 1000)
            until(lambda: at.a.settled() and at.b.settled(), within=20)
    rate = median(rates)
    report.number(f"connections/s, {count}", rate, 12_000, "1/s", at_least=True, spread=spread(rates))
    report.number(f"own blackout p99, {count}", median(p99), 30, "ms", median_ms=round(median(p50), 2))
    report.number(f"agent memory, {count}", max(0.0, memory), 40, "KiB/connection")
    report.tables[f"phases of a batch, {count}, milliseconds"] = {name: spread(each) for name, each in phases.items()}
    return rate


def drain(
    source: Agent, destination: Agent, count: int, phases: dict[str, list[float]]
) -> tuple[int, int, Sequence[int]]:
    """When the first was frozen and the last active, by the source's clock in nanoseconds, and how long each waited."""
    starts, ends, frozen = [], [], []
    with Client(f"unix:{source.socket}") as client:
        for said in client.drain([destination.address], steer=STEER):
            if said.WhichOneof("report") == "batch":
                frozen += list(said.batch.results.frozen_us)
                for timing in said.batch.results.timings:
                    phases.setdefault(_PHASES[timing.phase], []).append(timing.duration_ns / 1e6)
                    if timing.phase == types_pb2.PHASE_FREEZE:
                        starts.append(timing.start_ns)
                    ends.append(timing.start_ns + timing.duration_ns)
        assert said.summary.done == count, said.summary
    return min(starts), max(ends), sorted(frozen)


def resident(agent: Agent) -> float:
    """KiB of memory that the agent has had at most."""
    assert agent.process is not None
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0])


def blackout(report: Report, moves: int) -> None:
    """What one client that echoes sees: the longest wait for an echo around each move, above the usual one.

    Its server takes part: a program that does not could have read a word that it then never answers, and one that is
    started for it would be measured as well.
    """
    narrate(f"one echoing client, {moves} moves")
    with scene() as at:
        with at.net.host("client").entered():
            sock = socket.create_connection((at.net.vip4, PORT), timeout=10)
        with sock, contextlib.ExitStack() as clients:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            by_agent = {id(each): clients.enter_context(Client(f"unix:{each.socket}")) for each in (at.a, at.b)}
            echo = _Echo(sock)
            pairs = at.pairs()
            still, moving = [], []
            with at.net.capture("client") as wire:
                for _ in range(moves):
                    time.sleep(0.1)
                    still.append(echo.longest())
                    source, destination = next(pairs)
                    move(by_agent[id(source)], sock, destination)
                    time.sleep(0.1)
                    moving.append(echo.longest())
                echo.stop()
    above = [max(0.0, moved - quiet) * 1000 for moved, quiet in zip(moving, still, strict=True)]
    report.number("blackout of an echoing client, median", median(above), 3, "ms", spread=spread(above))
    report.number("blackout of an echoing client, p99", sorted(above)[len(above) * 99 // 100], 10, "ms")
    report.number("retransmissions of the peer", len(wire.retransmissions), 0, "")


class _Echo(threading.Thread):
    """Says a word, waits for it, says the next; remembers the longest wait since it was asked."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self._sock = sock
        self._longest = 0.0
        self._count = 0
        self._over = False
        self.start()

    def run(self) -> None:
        while not self._over:
            began = time.perf_counter()
            self._sock.sendall(b"a word\n")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += self._sock.recv(100)
            assert int(answer.split()[0]) == self._count + 1, (answer, self._count)
            self._longest = max(self._longest, time.perf_counter() - began)
            self._count += 1
            time.sleep(0.0005)

    def longest(self) -> float:
        """In seconds, with what is being waited for now."""
        now = self._count
        until(lambda: self._count > now)
        longest, self._longest = self._longest, 0.0
        return longest

    def stop(self) -> None:
        self._over = True
        self.join(10)


def reference(report: Report, contest: Contest, count: int, rate: float) -> None:
    """The C program's cost of the kernel's share for one connection, and the agents' share beside it."""
    alone = contest.alternate(3, {"C": contest.reference(connections=min(count, 5000))})
    cost = alone["C"]["wall"]["median"]
    report.tables["beside the reference"] = {
        "microseconds a connection": {
            "agents": round(1e6 / rate, 1),
            "C, one process": round(cost, 1),
            "ratio": round(1e6 / rate / cost, 2),
        }
    }
