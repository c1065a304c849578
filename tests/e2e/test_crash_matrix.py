"""An agent is killed, or the caller, or the link is cut, at every transition of both tables: each connection lives on.

What the tables have is walked, not listed: a library of scenarios brings both machines to every transition, and each
transition is then a place for one more fault. A transition that no scenario passes fails the test. The suite plays
every scenario, every crash point of the usual run, and a part of the rest, another part every day;
``TCPMIG_MATRIX=3/8`` plays the third eighth of all instead (`scripts/crash-matrix`). ``pytest -s`` shows the matrix.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.machine import crash_points
from migrate.handoff.source import SourceHandoff
from tests.crash_bench import FATES, Bench, Case
from tests.crash_scenarios import SCENARIOS, UNREACHABLE
from tests.fix_agents import Runner
from tests.quick_agent import QuickAgents

BENCHES = 8
ATTEMPTS = 3  # a busy machine may miss a point that depends on time
SAMPLE = 24  # cases of the whole matrix in a run of the suite
TABLES = {machine.role: list(crash_points(machine)) for machine in (SourceHandoff, DestinationHandoff)}
TRANSITIONS = [point for points in TABLES.values() for point in points if point.count(":") == 2]
# Nothing may be there for these to act on; then they are left out of a step and their points are not passed.
SPARED = {"Thaw", "Discard", "Rebuild", "Unclaim"}

CACHE = "crash-matrix/passed"
PART = os.environ.get("TCPMIG_MATRIX", "")

pytestmark = pytest.mark.timeout(7200 if PART else 590)


class Matrix:
    """Several benches that share the cases."""

    def __init__(self, directory: Path, tls: Path, runner: Runner) -> None:
        self._directory, self._tls, self._runner = directory, tls, runner
        self._made = 0
        self._lock = threading.Lock()

    def _bench(self) -> Bench:
        with self._lock:
            self._made += 1
            return Bench(self._directory / str(self._made), self._tls, self._runner)

    def _work(self, todo: queue.SimpleQueue[Case]) -> None:
        bench = self._bench()
        while not todo.empty():
            try:
                case = todo.get_nowait()
            except queue.Empty:
                break
            began = time.monotonic()
            try:
                bench.play(case)
            except BaseException as error:
                case.problem = f"{bench.said()}\n{''.join(traceback.format_exception(error))}"
                bench.close()
                bench = self._bench()
            fate = (case.fate if case.reached else "not reached") if case.point else ""
            said = (
                f"{case.point:48} {fate:12} {case.scenario.name:36} {case.living:6} {time.monotonic() - began:5.1f} s"
            )
            print(f"{said}  {case.problem}", flush=True)
        bench.close()

    def play(self, cases: Sequence[Case]) -> None:
        """All of them; prints what comes of each."""
        todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            todo.put(case)
        threads = [threading.Thread(target=self._work, args=(todo,)) for _ in range(min(BENCHES, len(cases)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not [case for case in cases if case.problem]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Matrix]:
    with contextlib.closing(QuickAgents()) as runner:
        yield Matrix(tmp_path_factory.mktemp("matrix"), certificates, runner)


@pytest.fixture(scope="module")
def played(matrix: Matrix, request: pytest.FixtureRequest) -> list[Case]:
    """Every scenario, with no fault but its own. The parts of a whole play them once."""
    cases = [Case(scenario) for scenario in SCENARIOS]
    known = request.config.cache and request.config.cache.get(CACHE, {})
    if PART and not PART.startswith("1/") and known:
        for case in cases:
            case.passed = frozenset(known[case.scenario.name])
        return cases
    matrix.play(cases)
    if request.config.cache:
        request.config.cache.set(CACHE, {case.scenario.name: sorted(case.passed) for case in cases})
    return cases


def aims_of(played: Sequence[Case]) -> Iterator[list[Case]]:
    """The whole matrix: each point and fate, with every scenario that leads there; first those that wait for it."""
    for points in TABLES.values():
        for point in points:
            transition = ":".join(point.split(":")[:3])
            ways = [
                each.scenario for each in played if transition in each.passed and point not in each.scenario.scripts
            ]
            ways.sort(key=lambda way: bool(way.scripts) and transition not in " ".join(way.scripts.values()))
            for fate in FATES if point == transition else ("kill",):
                if ways:
                    yield [Case(way, point, fate) for way in ways]


def test_scenarios_pass_every_transition(played: list[Case]) -> None:
    passed = frozenset[str]().union(*(case.passed for case in played))
    assert [transition for transition in TRANSITIONS if transition not in passed | UNREACHABLE.keys()] == []
    assert [transition for transition in UNREACHABLE if transition in passed] == []


def test_a_fault_at_every_point(matrix: Matrix, played: list[Case]) -> None:
    aims = list(aims_of(played))
    if PART:
        part, parts = map(int, PART.split("/"))
        chosen = aims[part - 1 :: parts]
    else:
        usual = [ways for ways in aims if not ways[0].scenario.scripts and ways[0].fate == "kill"]
        others = [ways for ways in aims if ways not in usual]
        step = max(1, len(others) // SAMPLE)
        chosen = usual + others[time.time_ns() // 86400_000_000_000 % step :: step]
    reached: collections.Counter[str] = collections.Counter()
    missed = chosen
    for number in range(ATTEMPTS):
        cases = [dataclasses.replace(ways[number % len(ways)]) for ways in missed]
        matrix.play(cases)
        reached.update(case.fate for case in cases if case.reached)
        again = [not case.reached and case.point.rpartition(":")[2] not in SPARED for case in cases]
        missed = list(itertools.compress(missed, again))
    print(f"{len(chosen)} of {len(aims)} aims, met:", dict(reached))
    assert missed == []
