"""Real keepalived daemons, which give a LAN's floating addresses to one of two hosts: the fixture ``pair``.

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
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.fix_agents import Agent, Done
from tests.fix_netns import Host, Lan
from tests.waiting import until

__all__ = ["Node", "Pair"]

SCRIPTS = Path(__file__).parents[1] / "scripts/keepalived"
GRACE = 2  # seconds

CONFIGURATION = """
global_defs {{
    router_id {name}
    script_user root
    {fifo}
}}
{instances}
"""

FIFO = """vrrp_notify_fifo {directory}/fifo
    vrrp_notify_fifo_script "{notify}" """

# Timers for tests; a keepalived of one IP version an instance.
INSTANCE = """
vrrp_script follows_{number} {{
    script "{check}"
    interval 1
    weight -50
    fall 1
    rise 1
}}
vrrp_instance VI_{number} {{
    state BACKUP
    {notify}
    interface {dev}
    virtual_router_id {number}
    version 3
    advert_int 0.2
    priority {priority}
    unicast_src_ip {ip}
    unicast_peer {{
        {peer}
    }}
    virtual_ipaddress {{
        {addresses}
    }}
    track_script {{
        follows_{number}
    }}
}}
"""


class Node:
    """One host of the pair: its agent and its keepalived. ``groups``: the addresses of each instance."""

    def __init__(
        self, agent: Agent, peer: Agent, groups: Sequence[Sequence[str]], *, priority: int, fifo: bool, grace: float
    ) -> None:
        self.host = agent.host
        self.agent = agent
        self.addresses = list(itertools.chain(*groups))
        self.directory = agent.directory / "keepalived"
        self.directory.mkdir()
        self.run_dir = self.directory / "run"
        self.log = self.directory / "log"
        self._others = ["--to", peer.address, "--to", peer.address6]
        self._here = ["--socket", str(agent.socket), "--run-dir", str(self.run_dir)]
        self.words = self._words(self.addresses)
        self._tcpmig = self.directory / "tcpmig"
        self._tcpmig.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m migrate.cli "$@" >>{self.log} 2>&1\n')
        self._tcpmig.chmod(0o755)

        def notify(addresses: Sequence[str]) -> str:
            return " ".join(map(str, [SCRIPTS / "notify", *self._words(addresses), "--grace", grace]))

        self._configuration = self.directory / "keepalived.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                name=self.host.name,
                fifo=FIFO.format(directory=self.directory, notify=notify(self.addresses)) if fifo else "",
                instances="".join(
                    INSTANCE.format(
                        number=number,
                        notify="" if fifo else f'notify "{notify(addresses)}"',
                        check=" ".join(map(str, self._check(addresses[0]))),
                        dev=self.host.dev,
                        priority=priority,
                        ip=_like(addresses[0], self.host),
                        peer=_like(addresses[0], peer.host),
                        addresses="\n        ".join(
                            f"{each}/64 dev {self.host.dev} preferred_lft 0"
                            if ":" in each
                            else f"{each}/24 dev {self.host.dev}"
                            for each in addresses
                        ),
                    )
                    for number, addresses in enumerate(groups, 51)
                ),
            )
        )
        self.process: subprocess.Popen[bytes] | None = None

    def _words(self, addresses: Sequence[str]) -> list[str]:
        """What every use of `tcpmig failover` on this host has in common."""
        return [*itertools.chain(*(("--address", each) for each in addresses)), *self._others, *self._here]

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
        """Whether keepalived gave this host the addresses."""
        shown = self.host.run(["ip", "address", "show", "dev", self.host.dev]).stdout
        return all(f" {each}/" in shown for each in self.addresses)

    def guarded(self) -> bool:
        """Whether the host sends no RST from the addresses."""
        return self._guards() == len(self.addresses)

    def unguarded(self) -> bool:
        """Whether it may."""
        return self._guards() == 0

    def _guards(self) -> int:
        return self.host.run(["nft", "list", "tables"]).stdout.count(" tcpmig-guard-")

    def connections(self) -> int:
        """How many established connections of the addresses live here."""
        return sum(
            len(self.host.run(["ss", "-Htn", "state", "established", "src", f"[{each}]"]).stdout.splitlines())
            for each in self.addresses
        )

    def check(self) -> tuple[int, str]:
        """What the check program gives for the first address, and what it says."""
        done = self.host.run(self._check(self.addresses[0]), check=False)
        return done.returncode, done.stderr

    def _check(self, address: str) -> list[str | Path]:
        return [SCRIPTS / "check", address, self.agent.socket, self.run_dir]

    def failover(self, *words: str) -> Done:
        """The planned switch."""
        common = self._words(self.addresses)
        at = common.index("--socket")  # Agent.tcpmig says it
        return self.agent.tcpmig("failover", *common[:at], *common[at + 2 :], *words)

    def _followed(self) -> bool:
        return self.log.exists() and bool(self.log.read_text())

    def said(self) -> str:
        """Everything that helps to see what went wrong."""
        logs = [self.directory / "keepalived.log", self.log, self.agent.log]
        return "\n".join(f"--- {path}\n{path.read_text()[-6000:]}" for path in logs if path.exists())


def _like(address: str, host: Host) -> str:
    """The host's own address of that address's IP version."""
    return host.ip6 if ":" in address else host.ip4


Pair = Callable[..., tuple[Node, Node]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """``pair(net, agent_a, agent_b, groups=[["10.0.0.100"]], priorities=(100, 100))``; a has all."""
    with contextlib.ExitStack() as started:

        def start(
            net: Lan,
            a: Agent,
            b: Agent,
            *,
            groups: Sequence[Sequence[str]] = (),
            priorities: Sequence[int] = (100, 100),
            fifo: bool = True,
            grace: float = GRACE,
        ) -> tuple[Node, Node]:
            first, second = priorities
            groups = groups or [[net.vip4]]
            nodes = (
                Node(a, b, groups, priority=first, fifo=fifo, grace=grace),
                Node(b, a, groups, priority=second, fifo=fifo, grace=grace),
            )
            for node in nodes:
                started.callback(node.stop)
                node.start()
                if node is nodes[0]:
                    until(node.has_address, what=f"a has the address: {node.said()}", within=20)
            return nodes

        yield start
