"""tcpmig demo: three hosts in namespaces, real traffic, a migration, a table and a picture."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from migrate.cli.output import Output
from migrate.demo.scene import Result, percentile, play
from migrate.demo.timeline import draw
from migrate.errors import HostError, UsageError, from_oserror

__all__ = ["add_arguments", "run"]

_MOST = 20_000  # connections; the client has one address, and its ports are the limit
_LINES = 0.25  # seconds between two lines of progress where no bar can be drawn
_USER_NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many, and where the picture goes."""
    parser.add_argument("--connections", metavar="N", type=_count, default=1000, help="how many to move (1000)")
    parser.add_argument(
        "--svg", metavar="FILE", default="tcpmig-demo.svg", help="where the picture goes (./tcpmig-demo.svg)"
    )


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {_MOST}")
    return value


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Play it; 0 if nothing was lost, nothing was wrong, and no RST was seen."""
    picture = Path(arguments.svg)
    if picture.is_dir() or not os.access(picture if picture.exists() else picture.absolute().parent, os.W_OK):
        raise UsageError(f"{arguments.svg!r} cannot be written", hint="--svg FILE")
    if os.geteuid() != 0:
        _become_root(arguments, output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all is taken down as after Ctrl-C
    with _progress(arguments.connections, output) as progress:
        result = play(arguments.connections, output.say, progress)
    try:
        picture.write_text(draw(result), encoding="utf-8")
    except OSError as error:
        raise from_oserror(f"writing {arguments.svg!r}", error, hint="--svg FILE") from None
    if arguments.json:
        output.data("", _record(result, picture))
    else:
        first, *others = _table(result, picture)
        output.table(first, others)
    for failure in result.failures[:10]:
        output.warn(failure)
    return 0 if result.good else 1


def _become_root(arguments: argparse.Namespace, output: Output) -> None:
    """In a user namespace of our own, where an ordinary user has its networks to itself; returns only by an error."""
    missing = HostError(
        "without root the demo needs a user namespace, and this host does not allow them",
        hint="run it as root, or allow them: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns",
    )
    if shutil.which(_USER_NAMESPACE[0]) is None:
        raise missing
    if subprocess.run([*_USER_NAMESPACE, "true"], capture_output=True, check=False).returncode:
        raise missing
    output.say("not root: in a user namespace")
    words = ["demo", "--connections", str(arguments.connections), "--svg", arguments.svg]
    words += ["--json"] if arguments.json else []
    os.execvp(_USER_NAMESPACE[0], [*_USER_NAMESPACE, "--", sys.executable, "-m", "migrate.cli", *words])


@contextmanager
def _progress(total: int, output: Output) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then."""
    if not output.stderr.isatty():
        yield _Lines(total, output)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("moving"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(file=output.stderr), auto_refresh=False)
    task = bar.add_task("", total=total, start=False)

    def show(moved: int) -> None:
        if not bar.live.is_started:
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=moved, refresh=True)
        if moved >= total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


class _Lines:
    """Progress as lines."""

    def __init__(self, total: int, output: Output) -> None:
        self._total, self._output = total, output
        self._next = 0.0

    def __call__(self, moved: int) -> None:
        now = time.monotonic()
        if now >= self._next or moved >= self._total:
            self._next = now + _LINES
            self._output.say(f"  {moved} of {self._total} moved")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _spread(values: list[float]) -> str:
    p50, p99, most = (_ms(percentile(values, percent)) for percent in (50, 99, 100))
    return f"p50 {p50}, p99 {p99}, max {most}"


def _table(result: Result, picture: Path) -> list[list[str]]:
    rate = result.moved / result.duration
    return [
        ["moved", f"{result.moved:,} of {result.connections:,}"],
        ["lost", str(result.lost)],
        ["bytes verified", f"{result.bytes_verified:,} in {result.answers:,} answers, both ways"],
        ["RSTs on the wire", str(result.resets)],
        ["retransmissions", str(result.retransmissions)],
        ["blackout (peers)", _spread(result.blackout)],
        ["freeze", _spread(result.freeze)],
        ["duration", f"{result.duration:.2f} s, {rate:,.0f} connections/s"],
        ["picture", str(picture)],
    ]


def _record(result: Result, picture: Path) -> dict[str, object]:
    spreads = {
        f"{name}_{which}_ms": round(percentile(values, percent) * 1000, 3)
        for name, values in (("blackout", result.blackout), ("freeze", result.freeze))
        for which, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }
    return {
        "ok": result.good,
        "connections": result.connections,
        "moved": result.moved,
        "lost": result.lost,
        "answers": result.answers,
        "bytes_verified": result.bytes_verified,
        "resets": result.resets,
        "retransmissions": result.retransmissions,
        **spreads,
        "duration_s": round(result.duration, 3),
        "rate_per_s": round(result.moved / result.duration, 1),
        "failures": result.failures,
        "picture": str(picture),
    }
