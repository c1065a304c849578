"""What a connection costs: the public API against the C reference, idle, with full queues, few and many."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.kernel import option_values
from migrate.kernel.option_table import OPTIONS, Kind, Phase
from tests.bench.measure import ROOT, Contest, Report, narrate, paired

KIB = 1024
QUEUES = {"receive": "in the receive queue", "unacked": "sent, not acknowledged", "unsent": "not yet sent"}


def measure(contest: Contest, report: Report) -> None:
    times, many, few = (1, 200, 50) if report.quick else (24, 5000, 1000)
    table: dict[str, Any] = {}
    idle = _idle(contest, report, times, many, table)
    queues = _queues(contest, report, times, few, table)
    _options(contest, report, times, few, table)
    _scale(contest, report, table)
    report.tables["microseconds of processor time a connection, medians; wall: the sum by the clock"] = table
    report.tables["where the time goes, microseconds"] = _shares(report, idle, queues)
    if calls := _calls(contest):
        report.tables["system calls a connection, idle"] = calls


def _idle(contest: Contest, report: Report, times: int, many: int, table: dict[str, Any]) -> dict[str, Any]:
    """The limit compares with the reference as it is; like for like leaves out what the API leaves out as well."""
    narrate(f"{many} idle connections")
    idle = contest.alternate(
        times,
        {
            "reference": contest.reference(connections=many),
            "like for like": contest.reference("--release", "--no-probe", connections=many),
            "with options": contest.reference("--options", connections=many),
            "python": contest.subject(connections=many),
        },
    )
    _ratio(report, f"{many} idle connections, Python to C", idle, 1.3)
    table |= {
        f"{many} idle, C": _row(idle["reference"]),
        f"{many} idle, C, --release --no-probe": _row(idle["like for like"]),
        f"{many} idle, C, --options": _row(idle["with options"]),
        f"{many} idle, Python": _row(idle["python"]),
    }
    return idle


def _queues(contest: Contest, report: Report, times: int, few: int, table: dict[str, Any]) -> dict[str, Any]:
    narrate(f"{few} connections with 64 KiB queued")
    contestants = {}
    for queue in QUEUES:
        work = {"connections": few, queue: 64 * KIB}
        contestants[f"{queue}, C"] = contest.reference(**work)
        contestants[f"{queue}, Python"] = contest.subject(**work)
    figures = contest.alternate(times, contestants)
    for queue, words in QUEUES.items():
        pair = {"reference": figures[f"{queue}, C"], "python": figures[f"{queue}, Python"]}
        _ratio(report, f"64 KiB {words}, Python to C", pair, 1.2)
        table[f"64 KiB {words}, C"] = _row(pair["reference"])
        table[f"64 KiB {words}, Python"] = _row(pair["python"])
    return figures


def _options(contest: Contest, report: Report, times: int, few: int, table: dict[str, Any]) -> None:
    """Eight that a server sets, and every option of the table at once, which no program sets.

    Beside them the setsockopt calls of the latter alone, in C: no program that makes them can be below that.
    """
    narrate(f"{few} connections with options")
    words = {"none": "no option set", "usual": "eight options set", "all": "all options set"}
    work = {each: contest.subject(connections=few, options=each) for each in words}
    figures = contest.alternate(times, work | {"calls": contest.setter(_calls_of_all(), connections=few)})
    none = figures["none"]["cpu"]
    floor = 1 + paired(figures["calls"]["cpu"], none)
    for each in ("usual", "all"):
        ratios = {"nothing but the calls in C on top of none": round(floor, 3)} if each == "all" else {}
        ratio = paired(figures[each]["cpu"], none)
        report.number(f"{words[each]}, to none", ratio, 1.5, "x", ratios=ratios, spread=figures[each])
    table |= {f"{words[each]}, Python": _row(figures[each]) for each in words}
    table["all options, the setsockopt calls alone, C"] = _row(figures["calls"])


def _calls_of_all() -> Iterator[tuple[int, int, bytes]]:
    """What sets every option that a connection over IPv4 can have to the value that the bench gives it."""
    for option in OPTIONS:
        if not option.readable or option.family not in (0, 4) or option.phase is Phase.UNCONNECTED:
            continue
        if option.kind is Kind.FILTER:
            assert isinstance(option.sample, bytes)
            instructions = struct.iter_unpack("!HBBI", option.sample)
            yield option.level, option.number, b"".join(struct.pack("=HBBI", *each) for each in instructions)
        elif call := option_values.call(option, option.sample):
            yield call


def _scale(contest: Contest, report: Report, table: dict[str, Any]) -> None:
    """Batches of 100, as a handoff makes them: a batch fits into the processor's caches, 10,000 connections do not.

    A round of 100 takes 4 ms. Before each some that do not count warm what the contestants before it have thrown out of
    the caches: else it would look dear, and the 10,000 cheap beside it.
    """
    times, many = (1, 300) if report.quick else (16, 10_000)
    narrate(f"100 connections and {many}")
    figures = contest.alternate(
        times,
        {
            "100, C": contest.reference(connections=100, warm=3),
            "100, Python": contest.subject(connections=100, warm=3),
            "all at once, C": contest.reference(connections=many),
            "all at once, Python": contest.subject(connections=many),
            "batches of 100, C": contest.reference(connections=many, batch=100),
            "batches of 100, Python": contest.subject(connections=many, batch=100),
        },
    )
    ratios = {
        f"{order}, {language}": round(
            paired(figures[f"{order}, {language}"]["cpu"], figures[f"100, {language}"]["cpu"]), 3
        )
        for order in ("all at once", "batches of 100")
        for language in ("C", "Python")
    }
    name = f"a connection of {many} in batches of 100 to one of 100"
    report.number(name, ratios["batches of 100, Python"], 1.1, "x", ratios=ratios, spread=figures)
    for name, one in figures.items():
        table[name if name.startswith("100,") else f"{many}, {name}"] = _row(one)


def _ratio(report: Report, name: str, figures: dict[str, Any], limit: float) -> None:
    """Processor time decides; all ratios and spreads are kept."""
    python = figures["python"]
    ratios = {
        f"{figure} to {other}": round(paired(python[figure], one[figure]), 3)
        for other, one in figures.items()
        if other != "python"
        for figure in ("cpu", "wall")
    }
    report.number(name, ratios["cpu to reference"], limit, "x", ratios=ratios, spread=figures)


def _row(figures: dict[str, Any]) -> dict[str, float]:
    return {name: one["median"] for name, one in figures.items() if name not in ("user", "system")}


def _shares(report: Report, idle: dict[str, Any], queues: dict[str, Any]) -> dict[str, Any]:
    """User and system time come from clock ticks, so their means over all rounds are used.

    Copying is what 64 KiB add to the phase: out of the receive queue while saving, into it while restoring.
    """
    python, like = idle["python"], idle["like for like"]
    cpu = python["cpu"]["median"]
    kernel = cpu * python["system"]["mean"] / (python["system"]["mean"] + python["user"]["mean"])
    shares = {
        "system calls, idle": {"Python": round(kernel, 2), "C": like["cpu"]["median"]},
        "interpreter and library, idle": {"Python": round(cpu - kernel, 2)},
    }
    for part, figures in report.tables["a record, microseconds"].items():
        shares[f"{part} a record"] = {"Python": figures["median"]}
    for words, phase in (("copying 64 KiB out", "save"), ("copying 64 KiB in", "restore")):
        full = {language: queues[f"receive, {language}"][phase]["median"] for language in ("Python", "C")}
        empty = {"Python": python[phase]["median"], "C": like[phase]["median"]}
        shares[words] = {language: round(full[language] - empty[language], 2) for language in full}
    return shares


def _calls(contest: Contest) -> dict[str, Any] | None:
    """Exact: the calls of three rounds less those of one, so that set-up and check do not count."""
    if not shutil.which("strace"):
        return None
    contestants: dict[str, list[str | Path]] = {
        "C": [contest.program],
        "Python": [sys.executable, "-m", "tests.bench.subject", "--reference", contest.program],
    }
    columns = {}
    for name, command in contestants.items():
        once, thrice = (_count(["unshare", "--net", *command], rounds) for rounds in (1, 3))
        columns[name] = {call: (thrice[call] - once.get(call, 0)) / 200 for call in thrice}
    calls = {call for column in columns.values() for call, count in column.items() if count >= 0.9}
    return {call: {name: round(column.get(call, 0), 2) for name, column in columns.items()} for call in sorted(calls)}


def _count(command: list[str | Path], rounds: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile("r") as log:
        trace: list[str | Path] = ["strace", "-f", "-qq", "-e", "signal=none", "-o", log.name]
        subprocess.run(
            [*trace, *command, "--connections", "100", "--rounds", str(rounds)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
        )
        counts: dict[str, int] = {}
        for line in log:
            if call := re.match(r"\d+ +([sg]etsockopt)\(\d+, \w+, (\w+)|\d+ +(\w+)\(", line):
                name = f"{call[1]} {call[2]}" if call[1] else call[3]
                counts[name] = counts.get(name, 0) + 1
    return counts
