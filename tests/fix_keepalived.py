"""Real keepalived daemons, which give a LAN's floating address to one of two hosts: the fixture ``pair``.

::

    def test_something(lan, agents, pair):
        net = lan("client", "a", "b")
        a, b = pair(net, agents(net.host("a")), agents(net.host("b")))     # a has the address
        a.failover("--first", "address")                                    # `tcpmig failover` to b: a Done
        until(b.has_address)

Both run scripts/keepalived/check and notify as an operator's configuration would have it, with faster timers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.fix_agents import Agent, Done
from tests.fix_netns import Lan
from tests.waiting import until

__all__ = ["Node", "Pair"]

SCRIPTS = Path(__file__).parents[1] / "scripts/keepalived"
GRACE = 2  # seconds
GUARD = "tcpmig-guard-0a000064"  # of 10.0.0.100

CONFIGURATION = """
global_defs {{
    router_id {name}
    script_user root
    {fifo}
}}
vrrp_script follows {{
    script "{check}"
    interval 1
    weight -50
    fall 1
    rise 1
}}
vrrp_instance VI_1 {{
    state BACKUP
    {words}
    interface {dev}
    virtual_router_id 51
    version 3
    advert_int 0.2
    priority {priority}
    unicast_src_ip {ip}
    unicast_peer {{
        {peer}
    }}
    virtual_ipaddress {{
        {vip}/24 dev {dev}
    }}
    track_script {{
        follows
    }}
}}
"""

FIFO = """vrrp_notify_fifo {directory}/fifo
    vrrp_notify_fifo_script "{notify}" """


class Node:
    """One host of the pair: its agent and its keepalived."""

    def __init__(self, net: Lan, agent: Agent, peer: Agent, *, priority: int, fifo: bool) -> None:
        self.host = agent.host
        self.agent = agent
        self.address = net.vip4
        self.directory = agent.directory / "keepalived"
        self.directory.mkdir()
        self.run_dir = self.directory / "run"
        self.log = self.directory / "log"
        # What every use of `tcpmig failover` on this host has in common.
        self.words = ["--address", net.vip4, "--to", peer.address]
        self.words += ["--socket", str(agent.socket), "--run-dir", str(self.run_dir)]
        self._tcpmig = self.directory / "tcpmig"
        self._tcpmig.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m migrate.cli "$@" >>{self.log} 2>&1\n')
        self._tcpmig.chmod(0o755)
        notify = " ".join(map(str, [SCRIPTS / "notify", *self.words, "--grace", GRACE]))
        self._check: list[str | Path] = [SCRIPTS / "check", net.vip4, agent.socket, self.run_dir]
        self._configuration = self.directory / "keepalived.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                name=self.host.name,
                fifo=FIFO.format(directory=self.directory, notify=notify) if fifo else "",
                words="" if fifo else f'notify "{notify}"',
                check=" ".join(map(str, self._check)),
                dev=self.host.dev,
                priority=priority,
                ip=self.host.ip4,
                peer=peer.host.ip4,
                vip=net.vip4,
            )
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start keepalived, and wait until it and its notify program work."""
        files: list[str | Path] = [
            "-p",
            self.directory / "pid",
            "-r",
            self.directory / "vrrp.pid",
            "-f",
            self._configuration,
        ]
        command: list[str | Path] = ["keepalived", "--dont-fork", "--vrrp", "--log-console", "--log-detail", *files]
        with open(self.directory / "keepalived.log", "ab") as log:
            self.process = self.host.popen(
                command, stdout=log, stderr=log, env={**os.environ, "TCPMIG": str(self._tcpmig)}
            )
        until(self._followed, what=f"{self.host.name}'s notify program runs", within=20)

    def stop(self) -> None:
        """End keepalived in order; it gives the address up."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(15)

    def has_address(self) -> bool:
        """Whether keepalived gave this host the address."""
        return self.address in self.host.run(["ip", "address", "show", "dev", self.host.dev]).stdout

    def guarded(self) -> bool:
        """Whether the host sends no RST from the address."""
        return GUARD in self.host.run(["nft", "list", "tables"]).stdout

    def unguarded(self) -> bool:
        """Whether it may."""
        return not self.guarded()

    def connections(self) -> int:
        """How many established connections of the address live here."""
        return len(self.host.run(["ss", "-Htn", "state", "established", "src", self.address]).stdout.splitlines())

    def check(self) -> tuple[int, str]:
        """What the check program gives, and what it says."""
        done = self.host.run(self._check, check=False)
        return done.returncode, done.stderr

    def failover(self, *words: str) -> Done:
        """The planned switch."""
        return self.agent.tcpmig("failover", *self.words[:4], "--run-dir", str(self.run_dir), *words)

    def _followed(self) -> bool:
        return self.log.exists() and bool(self.log.read_text())

    def said(self) -> str:
        """Everything that helps to see what went wrong."""
        logs = [self.directory / "keepalived.log", self.log, self.agent.log]
        return "\n".join(f"--- {path}\n{path.read_text()[-6000:]}" for path in logs if path.exists())


Pair = Callable[..., tuple[Node, Node]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """``pair(net, agent_a, agent_b, priorities=(100, 100), fifo=True)``; the first has the address."""
    with contextlib.ExitStack() as started:

        def start(
            net: Lan, a: Agent, b: Agent, *, priorities: Sequence[int] = (100, 100), fifo: bool = True
        ) -> tuple[Node, Node]:
            first, second = priorities
            nodes = Node(net, a, b, priority=first, fifo=fifo), Node(net, b, a, priority=second, fifo=fifo)
            for node in nodes:
                started.callback(node.stop)
                node.start()
                if node is nodes[0]:
                    until(node.has_address, what=f"a has the address: {node.said()}", within=20)
            return nodes

        yield start
