"""What migrate and drain share: options, and telling the user how a move goes."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.errors import Error, UsageError

if TYPE_CHECKING:
    from migrate.agent.client import Client
    from migrate.agent.v1.migration_pb2 import MoveReport
    from migrate.agent.v1.types_pb2 import Results
    from migrate.relocate import LocalMap

__all__ = ["add_agent", "add_options", "client", "follow", "maps"]

_BAR = 0.1  # seconds between two looks of the bar
_WIDTH = 30
_OUTCOMES = {1: "done", 2: "stayed", 3: "gone", 4: "in doubt"}  # types.proto


def add_agent(parser: argparse.ArgumentParser) -> None:
    """Where this host's agent is."""
    parser.add_argument("--socket", metavar="PATH", default="/run/tcpmig/agent.sock", help="this host's agent")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every move can be told."""
    add_agent(parser)
    parser.add_argument("--when-quiet", metavar="SECONDS", type=float, help="wait, at most that long, for quiet points")
    parser.add_argument(
        "--steer", metavar="HOW", default="", help="vip:DEV, forward, or follow: how the segments find it"
    )
    parser.add_argument(
        "--map",
        metavar="OLD=NEW",
        action="append",
        default=[],
        help="connections with the local end OLD, an ADDR[:PORT], get NEW there, where a NAT hides it from the peers; "
        "may be given several times; excludes --steer",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would move, and what not and why")


def client(arguments: argparse.Namespace) -> Client:
    """A channel to this host's agent."""
    from migrate.agent.client import Client

    if arguments.when_quiet is not None and not 0 < arguments.when_quiet <= 86400:
        raise UsageError("--when-quiet takes between 0 and 86400 seconds")
    return Client(f"unix:{arguments.socket}")


def maps(arguments: argparse.Namespace) -> list[LocalMap]:
    """What --map says. Raises UsageError."""
    from migrate.relocate import LocalMap

    chosen = []
    for text in arguments.map:
        old, equals, new = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} maps nothing", hint="write OLD=NEW, as in 10.0.0.2:8080=10.0.0.3:8080")
        chosen.append(LocalMap.parse(old, new))
    return chosen


def follow(reports: Iterator[MoveReport], output: Output, *, dry_run: bool) -> int:
    """Print results as they come, a bar on a terminal; the exit code."""
    from migrate.agent.errors import from_problem

    bar = _Bar(output)
    with contextlib.closing(bar):
        for report in reports:
            match report.WhichOneof("report"):
                case "plan":
                    bar.total = report.plan.movable
                    if dry_run:
                        _results(report.plan.expected, output, report.plan.destination, expected=True)
                        frozen = report.plan.expected_frozen_us
                case "progress":
                    bar.show(report.progress)
                case "batch":
                    bar.hide()
                    _results(report.batch.results, output, report.batch.destination)
                case "summary":
                    summary = report.summary
    if summary.HasField("problem"):
        raise from_problem(summary.problem)
    if dry_run:
        _say_plan(summary.selected, frozen, output)
        return 0
    seconds = summary.elapsed_ns / 1e9
    output.data(
        f"{summary.done} of {summary.selected} moved in {seconds:.2f} s; each stood still for "
        f"{summary.frozen_p50_us / 1000:.1f} ms (median), {summary.frozen_max_us / 1000:.1f} ms at most",
        {
            "summary": {
                name: getattr(summary, name)
                for name in ("selected", "done", "stayed", "gone", "in_doubt", "bytes", "elapsed_ns")
            }
            | {f"frozen_{name}_us": getattr(summary, f"frozen_{name}_us") for name in ("p50", "p99", "max")},
            "move": summary.move_id,
        },
    )
    if summary.done == summary.selected:
        return 0
    return PARTIAL if summary.done else 1


def _say_plan(selected: int, frozen_us: int, output: Output) -> None:
    output.data(
        f"{selected} selected; each would stand still for about {frozen_us / 1000:.1f} ms",
        {"selected": selected, "expected_frozen_us": frozen_us},
    )


def _results(results: Results, output: Output, destination: str, *, expected: bool = False) -> None:
    from migrate.agent.errors import from_problem

    reasons: dict[int, Error] = {}
    for failure in results.failures:
        problem = from_problem(failure.problem)
        reasons |= dict.fromkeys(failure.positions, problem)
    for position, (name, outcome) in enumerate(zip(results.connections, results.outcomes, strict=True)):
        why = reasons.get(position)
        record: dict[str, Any] = {"connection": name, "ok": outcome == 1, "outcome": _OUTCOMES.get(outcome, "unknown")}
        if expected:
            record["expected"] = True
        if why is not None:
            record["reason"] = str(why)
        if destination:
            record["to"] = destination
        if results.frozen_us and outcome == 1:
            record["frozen_us"] = results.frozen_us[position]
        word = ("would move" if expected else "moved") if outcome == 1 else _OUTCOMES.get(outcome, "unknown")
        where = f" to {destination}"
        if results.moved_to and results.moved_to[position]:
            record |= {"local": name.partition(",")[0], "moved_to": results.moved_to[position]}
            where += f", as {results.moved_to[position]}"
        output.data(f"{name}: {word}" + (f": {why}" if why else where), record)


class _Bar:
    """How far it is, at what rate, and how long it will take; only on a terminal."""

    def __init__(self, output: Output) -> None:
        self.total = 0
        self._stream = output.stderr
        self._wanted = not output.as_json and self._stream.isatty()
        self._shown = False
        self._last = 0.0

    def show(self, progress: Any) -> None:
        now = time.monotonic()
        if not self._wanted or now - self._last < _BAR:
            return
        self._last = now
        over = progress.done + progress.failed
        share = over / max(1, progress.selected)
        rate = over / max(1e-9, progress.elapsed_ns / 1e9)
        left = (progress.selected - over) / max(1e-9, rate)
        filled = "#" * round(share * _WIDTH)
        text = f"[{filled:<{_WIDTH}}] {over}/{progress.selected}  {rate:.0f}/s  {left:.0f} s left"
        print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
        self._shown = True

    def hide(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._shown = False

    def close(self) -> None:
        self.hide()
