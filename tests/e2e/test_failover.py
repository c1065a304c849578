"""Two keepalived daemons give a floating address to one of two hosts, and the connections follow it, or go first."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from migrate.cli.main import main
from tests.crowd import ADOPTED, SERVE, Crowd
from tests.fix_agents import Agents
from tests.fix_keepalived import Node, Pair
from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until

PORT = 8000
COUNT = int(os.environ.get("TCPMIG_FAILOVER_CONNECTIONS", "200"))
PAUSE = 0.01  # seconds between two words
UNIT = Path(__file__).parents[2] / "packaging/systemd/tcpmig-failover.service"
OPTIONS = "$TCPMIG_FAILOVER"
LONGEST = 20.0  # seconds that a word may take while keepalived changes its mind, on a busy machine
DEAF = """
table inet deaf {
    chain arriving { type filter hook input priority 0; meta l4proto 112 drop; }
}
"""
# A capture would not keep up with the crowd for so long.
COUNTER = """
table inet resets {
    chain arriving { type filter hook input priority -300; tcp flags rst counter; }
    chain departing { type filter hook output priority -300; tcp flags rst counter; }
}
"""


class Scene:
    """Two nodes, a's with the address, both serving; and a crowd that keeps talking, in a thread of its own."""

    def __init__(self, net: Lan, a: Node, b: Node) -> None:
        self.net, self.a, self.b = net, a, b
        self.longest = 0.0
        self._errors: list[BaseException] = []

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Meanwhile everyone of the crowd says something and hears it, again and again; nobody is reset."""
        client = self.net.host("client")
        ended = threading.Event()
        client.run(["nft", COUNTER])
        with Crowd(client, self.net.vip4, PORT, COUNT) as crowd:

            def talk() -> None:
                try:
                    while not ended.is_set():
                        self.longest = max(self.longest, crowd.echo())
                        ended.wait(PAUSE)
                except BaseException as error:
                    self._errors.append(error)

            thread = threading.Thread(target=talk)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
            for error in self._errors:
                raise AssertionError(f"{error}\n{self.a.said()}\n{self.b.said()}") from error
            crowd.echo()
            counted = client.run(["nft", "list", "table", "inet", "resets"]).stdout
            assert counted.count("packets 0 ") == 2, counted
        assert self.longest < LONGEST

    def moved(self, here: Node, there: Node) -> None:
        """Wait until the address and all connections are at ``there``."""

        def so() -> bool:
            return there.has_address() and not here.has_address() and there.connections() == COUNT

        try:
            until(so, within=30, what=f"all is at {there.host.name}")
        except AssertionError as error:
            found = [(node.host.name, node.has_address(), node.connections()) for node in (here, there)]
            raise AssertionError(f"{error}, but {found}\n{here.said()}\n{there.said()}") from None
        assert here.connections() == 0


def _listens(host: Host) -> bool:
    return f":{PORT}" in host.run(["ss", "-Hltn"]).stdout


@pytest.fixture
def scene(lan: LanFactory, agents: Agents, pair: Pair, request: pytest.FixtureRequest) -> Scene:
    net = lan("client", "a", "b")
    adopt = [f"*=systemd:{' '.join(ADOPTED)}"]
    a, b = (agents(net.host(name), adopt=adopt) for name in "ab")
    for name in "ab":
        net.host(name).popen([*SERVE, "0.0.0.0", str(PORT)])
        until(partial(_listens, net.host(name)), what="the server listens")
    return Scene(net, *pair(net, a, b, **getattr(request, "param", {})))


def test_planned_switch_and_back(scene: Scene) -> None:
    turns = (scene.a, scene.b, "connections"), (scene.b, scene.a, "address"), (scene.a, scene.b, "connections")
    with scene.talking():
        for here, there, first in turns:
            done = here.failover("--first", first)
            assert done.code == 0, (done, here.said(), there.said())
            assert done.objects[-1]["switched"]
            scene.moved(here, there)
            assert here.guarded()
            until(there.unguarded, what="the grace time ends")
        # Both have come to b. Without an agent at a nothing moves any more, and the address stays with them.
        scene.a.agent.kill()
        assert scene.b.failover().code == 3
        assert (scene.b.has_address(), scene.b.connections()) == (True, COUNT)
        assert scene.a.check() == (1, "check: a standby without an agent\n")
        assert scene.b.check() == (0, "")
        scene.b.agent.kill()
        assert scene.b.check() == (0, "")


@pytest.mark.parametrize("scene", [{"priorities": (110, 100)}], indirect=True, ids=["fifo"])
def test_flapping_peer(scene: Scene) -> None:
    """The standby takes the address for a moment, again and again; then the active one's keepalived is stopped.

    With the FIFO only: the notify form starts a process for each change, which can come too late (docs/failover.md).
    """
    with scene.talking():
        for _ in range(3):
            scene.b.host.run(["nft", DEAF])
            until(scene.b.has_address, what="the standby believes to be alone")
            scene.b.host.run(["nft", "delete", "table", "inet", "deaf"])
            until(lambda: scene.a.has_address() and not scene.b.has_address(), what="the address is back")
            assert scene.b.guarded()
        until(lambda: scene.a.connections() == COUNT, what="they stay, or are back")
        scene.a.stop()
        scene.moved(scene.a, scene.b)


def test_node_that_is_shut_down(scene: Scene) -> None:
    """What systemd does: the unit's ExecStop, then keepalived ends, the agent, the server, and at last the network."""
    a, b = scene.a, scene.b
    with scene.talking():
        for words in stop_commands(a):
            assert a.host.run(words, check=False).returncode == 0
        a.stop()
        a.agent.close()
        a.host.run(["ip", "link", "set", "dev", a.host.dev, "down"])
        assert b.has_address()
        assert b.connections() == COUNT


def stop_commands(node: Node) -> list[list[str]]:
    """The unit's ExecStop lines, as an operator's configuration makes them."""
    lines = [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith("ExecStop=")]
    commands = [line.removeprefix("-").split() for line in lines]
    assert all(words[0] == "/usr/bin/tcpmig" and words[-1:] for words in commands)
    return [
        [
            sys.executable,
            "-m",
            "migrate.cli",
            *itertools.chain(*(node.words if each == OPTIONS else [each] for each in words[1:])),
        ]
        for words in commands
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "10.0.0"], "'10.0.0' is no address"),
        (["--address", "10.0.0.100", "--follow", "VI_1", "MASTER"], "nothing that keepalived says"),
        (["--address", "10.0.0.100", "--follow", "INSTANCE", "VI_1", "SLAVE", "1"], "nothing that keepalived says"),
    ],
)
def test_bad_words(words: list[str], said: str, tmp_path: Path) -> None:
    stderr = io.StringIO()
    assert main(["failover", "--to", "10.0.0.2:7420", "--run-dir", str(tmp_path), *words], stderr=stderr) == 2
    assert said in stderr.getvalue()


def test_unit_is_understood() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if UNIT.name in line and "/usr/bin/tcpmig" not in line]
    assert lines == []
