"""Runs tcpmig's command lines, each in a process of its own, and kills it at whatever step a test asks for.

    with Killer() as killer:
        killer.run("dump", name, "-o", file)             # to its end: .code .stdout .stderr .steps
        killer.run("dump", name, "-o", file, at=7)       # dead before its seventh step: .code is -SIGKILL
    killer.run("dump", name, "-o", file, at=("link", 1))    # dead before its first link(); .places of a run has all

A step is a call of a C function by which a process can change anything outside of itself, counted from where a verb
begins to work. What happens between two steps nobody else can see, so the steps are all the moments there are.

The processes are forked from one that has imported everything, so a run takes milliseconds. This file is that
program, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self

__all__ = ["Killer", "Place", "Run"]

ROOT = Path(__file__).parents[1]
BEGIN = {"_save", "_usable"}  # functions of the verbs: what came before only looked
# fmt: off
STEPS = {
    "fork", "pipe2", "open", "close", "read", "write", "writev", "link", "unlink", "fsync", "mkdir", "setsockopt",
    "send", "sendto", "sendmsg", "bind", "connect", "shutdown", "execute", "executemany", "waitpid", "kill",
    "sched_setscheduler", "setsid", "dup", "dup2", "sendall",
}
# fmt: on


Place = tuple[str, int]


class Run(NamedTuple):
    """What became of a command line."""

    code: int
    stdout: str
    stderr: str
    steps: list[str]  # the C functions, in their order; the last is the one before which it was killed

    @property
    def places(self) -> list[Place]:
        """Each step as the how many-eth call of its function: one more of another before it changes nothing."""
        return [(step, self.steps[: number + 1].count(step)) for number, step in enumerate(self.steps)]


class Killer:
    """The program that forks; a context manager. ``environment`` is added to that of this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.killing"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def run(self, *words: str | Path, at: int | Place | None = None) -> Run:
        """One command line; killed before step ``at``, by number or `Place`, if there is such a step."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([at, *map(str, words)]), file=self._process.stdin, flush=True)
        run = Run(*json.loads(self._process.stdout.readline()))
        assert "Traceback" not in run.stderr, run.stderr
        return run


def main() -> None:
    """Answer one line with another."""
    import migrate.cli.dump
    import migrate.cli.main
    import migrate.cli.restore  # noqa: F401

    for line in sys.stdin:
        at, *words = json.loads(line)
        print(json.dumps(_fork(words, at)), flush=True)


def _fork(words: list[str], at: int | list[str | int] | None) -> Run:
    with contextlib.ExitStack() as stack:
        out, err, trace = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = _become(words, at, trace.fileno())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err, trace):
            file.seek(0)
        return Run(code, out.read(), err.read(), trace.read().split())


def _become(words: list[str], at: int | list[str | int] | None, trace: int) -> int:
    from migrate.cli.main import main as tcpmig

    me, counts, began = os.getpid(), Counter[str](), False

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal began
        if event == "call" and frame.f_code.co_name in BEGIN:
            began = True
        if event != "c_call" or not began:
            return
        name = getattr(argument, "__name__", "")
        if name not in STEPS or os.getpid() != me:
            return
        counts[name] += 1
        os.write(trace, f"{name}\n".encode())
        if at in (counts.total(), [name, counts[name]]):
            os.kill(me, signal.SIGKILL)

    sys.setprofile(watch)
    try:
        return tcpmig(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    main()
