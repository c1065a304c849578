"""Two hosts with an agent each, mutual TLS, and a client: what the benches of agents measure."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrate.agent.client import Client
from migrate.agent.tls import init_tls
from migrate.fourtuple import FourTuple
from migrate.selection import Selector
from tests.crowd import SERVE
from tests.fix_agents import Agent
from tests.fix_netns import Lan

__all__ = ["PORT", "STEER", "Scene", "move", "scene"]

STEER = "vip:eth0"
PORT = 8000


@dataclass
class Scene:
    """A client and two hosts with an agent each; the address is at ``a``."""

    net: Lan
    a: Agent
    b: Agent

    def pairs(self) -> Iterator[tuple[Agent, Agent]]:
        """Where from and where to, in turns."""
        while True:
            yield self.a, self.b
            yield self.b, self.a


@contextlib.contextmanager
def scene(adopt: str = "", serve: Sequence[str | Path] = SERVE) -> Iterator[Scene]:
    """The hosts, their agents with that rule of adoption, and at ``a`` the server: ``serve`` ADDRESS PORT.

    Without a rule: an application that takes part (`tests.taking_part`), on both hosts.
    """
    with contextlib.ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tcpmig-bench-")))
        init_tls(directory / "tls", ["10.0.0.2", "10.0.0.3"])
        net = Lan(["client", "a", "b"])
        opened.callback(net.close)
        net.assign("a", net.vip4)
        agents = []
        for name in "ab":
            (directory / name).mkdir()
            path = directory / name / "application" / "socket"
            options = ["--adopt", adopt or f"*=unix:{path}", "--log-level", "info"]
            agents.append(Agent(net.host(name), directory / name, directory / "tls", options))
            agents[-1].start()
            opened.callback(agents[-1].stop)
            if not adopt:
                words = [sys.executable, "-m", "tests.taking_part", path, net.vip4, PORT, *["listen"] * (name == "a")]
                _ready(net.host(name).popen([*map(str, words)], stdout=subprocess.PIPE))
        if adopt:
            _ready(net.host("a").popen([*serve, net.vip4, str(PORT)], stdout=subprocess.PIPE))
        yield Scene(net, *agents)


def _ready(program: subprocess.Popen[bytes]) -> None:
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"


def move(client: Client, sock: socket.socket, destination: Agent) -> None:
    """Move the connection whose client's end is ``sock``, by the agent that ``client`` calls."""
    (local, local_port), (remote, remote_port) = sock.getpeername(), sock.getsockname()
    chosen = Selector(connection=FourTuple.parse(f"{local}:{local_port},{remote}:{remote_port}"))
    *before, last = client.migrate(chosen, destination.address, steer=STEER)
    assert last.summary.done == 1, before
