"""The demonstration from beginning to end, and what came of it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from migrate.demo import web
from migrate.demo.move import Freeze, Migration
from migrate.demo.network import ADDRESS, Network, ResetCounter, program
from migrate.demo.owner import Owner
from migrate.demo.traffic import Plan, Report, Traffic
from migrate.errors import HostError

__all__ = ["Result", "Row", "blackouts", "percentile", "play"]

_RATE = 1000  # requests a second by all connections together
_SHORTEST = 0.25  # seconds between a connection's requests: long enough for a quiet point
_BEFORE, _AFTER = 1.5, 1.0  # seconds of traffic, beyond what it takes for two answers and for one
_NICE = -10
_SPARE = 256  # descriptors for all else


class Row(msgspec.Struct):
    """One connection as the picture shows it; times in seconds since the first connection was frozen."""

    frozen: tuple[float, float] | None
    answers: list[tuple[float, str]]  # when, and from which host


class Result(msgspec.Struct):
    """What the demo measured. Blackout and freeze are lists of seconds, one a connection, sorted."""

    connections: int
    moved: int
    lost: int
    answers: int
    bytes_verified: int
    resets: int  # segments with RST at the client's device
    retransmissions: int  # by all three hosts, during the move and after it
    blackout: list[float]
    freeze: list[float]
    duration: float  # seconds from the first freeze until the last connection lived again
    failures: list[str]
    rows: list[Row]

    @property
    def good(self) -> bool:
        """Nothing lost, nothing wrong, no RST."""
        return self.moved == self.connections and not (self.lost or self.resets or self.failures)


def play(connections: int, say: Callable[[str], None], progress: Callable[[int], None]) -> Result:
    """Build the hosts, start the traffic, move it, take all down again.

    ``say`` is told what happens, ``progress`` how many connections have moved. Raises HostError where this machine
    cannot do it.
    """
    program("nginx", "nginx")
    with contextlib.suppress(PermissionError):
        # All hosts share this machine. Whatever else it does would show as blackout.
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    descriptors = _allow_descriptors(2 * connections + _SPARE)
    interval = max(_SHORTEST, connections / _RATE)
    with ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tcpmig-demo-")))
        say("three hosts as network namespaces on a bridge: client, A with the floating address, B")
        network = opened.enter_context(Network())
        say("nginx on A and on B, unmodified, with the same files")
        digests = web.make_files(directory / "files")
        for host in (network.a, network.b):
            web.serve(host, directory / "files", directory / host.name, descriptors, opened)
        owner = Owner(network.b, web.PORT)
        opened.callback(owner.close)
        resets = opened.enter_context(ResetCounter(network.client))
        say(f"{connections} HTTP connections to A, each with a request every {interval * 1000:.0f} ms")
        traffic = Traffic(network.client, Plan(ADDRESS, web.PORT, connections, interval, digests))
        opened.callback(traffic.close)
        ready = time.monotonic()
        migration = opened.enter_context(Migration(network, owner, connections))
        time.sleep(max(0.0, ready + 2 * interval + _BEFORE - time.monotonic()))
        sent_again = -_retransmissions(network)
        say("moving them to B, one small batch after the other, while the traffic goes on")
        begin = time.monotonic()
        migration.run(progress)
        end = time.monotonic()
        time.sleep(interval + _AFTER)
        sent_again += _retransmissions(network)
        report = traffic.end()
        over = time.monotonic()
        frozen = {key.remote_port: freeze for key, freeze in migration.frozen.items()}
        by_client = [frozen.get(port) for port in traffic.ready.ports]
        reasons = {str(key): why for key, why in migration.failed.items()}
        reasons |= {f"client {number}": why for number, why in report.failures.items()}
        return Result(
            connections=connections,
            moved=len(frozen),
            lost=len(report.failures),
            answers=len(report.answers),
            bytes_verified=report.sent + report.received,
            resets=resets.count(),
            retransmissions=sent_again,
            blackout=blackouts(report.arrivals, begin, end, over),
            freeze=sorted(freeze.end - freeze.begin for freeze in frozen.values()),
            duration=end - begin,
            failures=[f"{who}: {why}" for who, why in reasons.items()],
            rows=_rows(report, by_client, begin),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted values, by nearest rank; 0 for none."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else 0.0


def blackouts(arrivals: Sequence[Sequence[float]], begin: float, end: float, over: float) -> list[float]:
    """By connection the longest gap in what arrived during the move, less the longest one before; sorted, in seconds.

    The move was from ``begin`` to ``end``. Who heard nothing more had a gap until ``over``.
    """
    found = []
    for times in arrivals:
        before = during = 0.0
        for last, now in itertools.pairwise([*times, over]):
            if now <= begin:
                before = max(before, now - last)
            elif last <= end:
                during = max(during, now - last)
        found.append(max(0.0, during - before))
    return sorted(found)


def _rows(report: Report, frozen: Sequence[Freeze | None], begin: float) -> list[Row]:
    rows = [Row(freeze and (freeze.begin - begin, freeze.end - begin), []) for freeze in frozen]
    for answer in report.answers:
        rows[answer.connection].answers.append((answer.time - begin, answer.host))
    return rows


def _retransmissions(network: Network) -> int:
    return sum(host.retransmissions() for host in network.hosts)


def _allow_descriptors(wanted: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise HostError(
            f"{wanted} open files are needed, and {hard} are allowed",
            hint=f"--connections {max(1, (hard - _SPARE) // 2)}, or a higher limit (ulimit -Hn)",
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
