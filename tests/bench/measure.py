"""What all benches share: samples and their spread, limits, the report, the reference and its runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


# What PYTHON… variables make of an interpreter (unbuffered, without its compiled files) is the caller's affair.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

Command = Sequence[object]  # of a contestant


def narrate(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def spread(samples: Iterable[float]) -> dict[str, float]:
    """Median, mean, extremes and the median absolute deviation."""
    values = list(samples)
    middle = median(values)
    away = median(abs(value - middle) for value in values)
    figures = {"median": middle, "mean": fmean(values), "min": min(values), "max": max(values), "mad": away}
    return {**{name: round(value, 3) for name, value in figures.items()}, "samples": len(values)}


def elapsed(command: Sequence[str | Path]) -> float:
    """Milliseconds from start to end of a command whose output goes nowhere."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=PLAIN)
    return (time.perf_counter() - start) * 1e3


def in_own_network(module: str, *arguments: object) -> Any:
    """Run a module of this package in a new network namespace; the JSON it prints."""
    command = _in_own_network(module, *arguments)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def _in_own_network(module: str, *arguments: object) -> list[str]:
    return ["unshare", "--net", sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]


@dataclass
class Report:
    """What was measured: numbers that have a limit, and tables that explain them."""

    verb: str
    quick: bool = False
    numbers: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)

    def number(
        self, name: str, value: float, limit: float, unit: str, *, at_least: bool = False, **detail: Any
    ) -> None:
        """One number of the requirements; ``limit`` is the most it may be, or the least."""
        ok = value >= limit if at_least else value <= limit
        self.numbers.append(
            {
                "name": name,
                "value": round(value, 3),
                "limit": limit,
                "bound": "min" if at_least else "max",
                "unit": unit,
                "ok": ok,
                **detail,
            }
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "v": 1,
            "bench": self.verb,
            "quick": self.quick,
            "host": {
                "kernel": platform.release(),
                "machine": platform.machine(),
                "processors": os.cpu_count(),
                "python": platform.python_version(),
                "compiler": platform.python_compiler(),
            },
            "numbers": self.numbers,
            "tables": self.tables,
        }

    def print_table(self) -> None:
        """The numbers and tables for a person, on standard error."""
        rows = [
            (
                *(each["name"], f"{each['value']:g}", f"{'>=' if each['bound'] == 'min' else '<='} {each['limit']:g}"),
                *(each["unit"], "ok" if each["ok"] else "MISSED"),
            )
            for each in self.numbers
        ]
        narrate("")
        print(format_rows(("number", "value", "limit", "unit", ""), rows), file=sys.stderr)
        for title, table in self.tables.items():
            columns = list(next(iter(table.values())))
            body = [(name, *(f"{row.get(column, '')}" for column in columns)) for name, row in table.items()]
            print(f"\n{title}\n{format_rows(('', *columns), body)}", file=sys.stderr)


def format_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (head, *rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Contest(AbstractContextManager["Contest"]):
    """The reference, built for this run, and the Python API, which take turns at the same work."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="tcpmig-bench-")
        self.program = Path(self._directory.name, "reference")
        self._setter = Path(self._directory.name, "options")

    def __enter__(self) -> Self:
        for program, names in ((self.program, ("reference.c", "reference_scene.c")), (self._setter, ("options.c",))):
            sources = [Path(__file__).with_name(name) for name in names]
            subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, *sources], check=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    def reference(self, *flags: str, **arguments: int) -> Command:
        """The program in C."""
        return [self.program, *_options(arguments), *flags]

    def subject(self, **arguments: int | str) -> Command:
        """The same in Python."""
        return _in_own_network("subject", "--reference", self.program, *_options(arguments))

    def setter(self, calls: Iterable[tuple[int, int, bytes]], *, connections: int) -> Command:
        """A program in C that makes these setsockopt calls on so many sockets, and nothing else."""
        words = [f"{level}:{number}:{value.hex()}" for level, number, value in calls]
        return ["unshare", "--net", self._setter, "--connections", connections, *words]

    def alternate(self, rounds: int, contestants: Mapping[str, Command]) -> dict[str, Any]:
        """Let the contestants take turns, round by round; of each, by figure, what `spread` says about its rounds.

        All are there from the beginning, and one works at a time: a neighbour on a shared machine who spoils some
        seconds spoils all of a turn. ``turns`` of a figure are its rounds, for `paired`. The first round of each, which
        warms the caches, does not count.
        """
        with ExitStack() as running:
            processes = {
                name: running.enter_context(_Paced([*one, "--rounds", rounds + 1, "--paced"]))
                for name, one in contestants.items()
            }
            for _ in range(rounds + 1):
                for process in processes.values():
                    process.turn()
            reports = {name: process.report() for name, process in processes.items()}
        return {name: {figure: _figure(mine, figure) for figure in mine[0]} for name, mine in reports.items()}


class _Paced(AbstractContextManager["_Paced"]):
    """A contestant at work: it does a round when told to, and says so."""

    def __init__(self, command: Command) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([str(word) for word in command], stdin=pipe, stdout=pipe, cwd=ROOT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.__exit__(kind, error, trace)

    def turn(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != b"\n":
            raise SystemExit(f"a contestant failed: {self._process.args!r}")

    def report(self) -> list[dict[str, float]]:
        """Its rounds, without the first."""
        assert self._process.stdout
        rounds: list[dict[str, float]] = json.load(self._process.stdout)["rounds"]
        if self._process.wait():
            raise SystemExit(f"a contestant failed: {self._process.args!r}")
        return rounds[1:]


def _figure(rounds: list[dict[str, float]], figure: str) -> dict[str, Any]:
    values = [one[figure] for one in rounds]
    return spread(values) | {"turns": [round(each, 3) for each in values]}


def paired(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The median of the ratios of each turn: neighbours on a shared machine spoil both of a turn, or its ratio only."""
    return float(median(mine / theirs for mine, theirs in zip(one["turns"], other["turns"], strict=True)))


def _options(arguments: Mapping[str, int | str]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
