"""Agents that start quickly and do not wait long, so that many can be started and each of their time-outs waited for.

They are forked from one process that has imported everything, which is this file as a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from migrate.agent import options
from migrate.handoff import machine
from migrate.kernel import netns
from tests.fix_netns import Host

__all__ = ["FOREVER", "TIMES", "QuickAgents"]

TIMES = machine.Times(prepare=2.0, patience=2.5, answer=2.0, ask=0.4, asks=3, linger=0.5)
KEEPALIVE = 4.0
FOREVER = 2 * KEEPALIVE + 3.0  # seconds: beyond every time-out of these agents
ROOT = Path(__file__).parents[1]


class QuickAgents:
    """Starts them: a `tests.fix_agents.Runner`."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.quick_agent"], stdin=theirs.fileno(), cwd=ROOT
            )

    def __call__(
        self, host: Host, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]
    ) -> QuickProcess:
        """`tcpmig agent` with these words, in that host."""
        status, theirs = os.pipe()
        order = json.dumps([host.netns, ["agent", *words], dict(environment)])
        socket.send_fds(self._ours, [order.encode()], [log.fileno(), theirs])
        os.close(theirs)
        return QuickProcess(status)

    def close(self) -> None:
        """No more of them; those that run go on."""
        self._ours.close()
        self._process.wait(10)


class QuickProcess:
    """One agent, as `tests.fix_agents.Process` wants it. The pipe tells its number, and in the end its exit code."""

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._status.readline())
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("agent", timeout or 0)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _look(self, timeout: float | None) -> int | None:
        if self._code is None and select.select([self._status], [], [], timeout)[0]:
            self._code = int(self._status.readline())
            self._status.close()
        return self._code


def main() -> None:
    """Fork an agent for each order on the standard input."""
    machine.DEFAULT_TIMES = TIMES  # before migrate.agent.driver is imported
    options.KEEPALIVE_SECONDS = KEEPALIVE
    import migrate.agent.server  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as orders:
        while True:
            order, (*descriptors,), _, _ = socket.recv_fds(orders, 1 << 16, 2)
            if not order:
                return
            if os.fork() == 0:
                orders.close()
                _watch(*json.loads(order), *descriptors)
            for each in descriptors:
                os.close(each)


def _watch(namespace: str, words: list[str], environment: dict[str, str], log: int, status: int) -> None:
    """In a process of its own: an agent, and the word of its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    agent = os.fork()
    if agent == 0:
        os.close(status)
        code = 70
        try:
            os.dup2(log, 2)
            os.close(log)
            os.environ.clear()
            os.environ.update(environment)
            from migrate.cli.main import main as tcpmig

            with netns.entered(namespace):
                code = tcpmig(words)
        finally:
            with contextlib.suppress(ValueError):
                sys.stderr.flush()
            os._exit(code)
    os.write(status, b"%d\n" % agent)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]))
    os._exit(0)


if __name__ == "__main__":
    main()
