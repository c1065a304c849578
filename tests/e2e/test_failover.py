"""Two keepalived daemons give a floating address to one of two hosts, and the connections follow it, or go first."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.main import main
from tests.crowd import ADOPTED, SERVE, Crowd
from tests.fix_agents import Agents, Done
from tests.fix_keepalived import Node, Pair
from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until

PORT = 8000
COUNT = int(os.environ.get("TCPMIG_FAILOVER_CONNECTIONS", "200"))
ADOPT = [f"*=systemd:{' '.join(ADOPTED)}"]
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


FORMS = ("fifo", "notify")  # of keepalived's configuration
# One path serves both; where nothing flaps, one of them is enough but for a run by hand.
EITHER = FORMS if "TCPMIG_FAILOVER_CONNECTIONS" in os.environ else ("fifo",)
GROUPS = [["10.0.0.100", "10.0.0.101"], ["fd00::100"]]  # addresses of two instances


class Scene:
    """Two nodes, a's with the addresses, both serving; and crowds that keep talking, in a thread of their own."""

    def __init__(self, net: Lan, a: Node, b: Node, count: int) -> None:
        self.net, self.a, self.b = net, a, b
        self.count = count  # connections to each address
        self.client = net.host("client")
        self._errors: list[BaseException] = []

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Meanwhile everyone of the crowds says something and hears it, again and again; nobody is reset."""
        ended = threading.Event()
        self.client.run(["nft", COUNTER])
        with contextlib.ExitStack() as opened:
            crowds = [opened.enter_context(Crowd(self.client, each, PORT, self.count)) for each in self.a.addresses]

            def talk() -> None:
                try:
                    while not ended.is_set():
                        for crowd in crowds:
                            crowd.echo()
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
            for crowd in crowds:
                crowd.echo()
            counted = self.client.run(["nft", "list", "table", "inet", "resets"]).stdout
            assert counted.count("packets 0 ") == 2, counted
            waited = sorted(1000 * each for crowd in crowds for each in crowd.waited)
            print(
                f"{len(waited)} connections, none lost, none reset; the longest wait of each: "
                f"median {waited[len(waited) // 2]:.0f} ms, p99 {waited[len(waited) * 99 // 100]:.0f} ms"
            )
        assert waited[-1] < 1000 * LONGEST

    def moved(self, here: Node, there: Node) -> None:
        """Wait until the addresses and all connections are at ``there``."""
        all_ = self.count * len(here.addresses)

        def so() -> bool:
            return there.has_address() and not here.has_address() and there.connections() == all_

        try:
            until(so, within=30, what=f"all is at {there.host.name}")
        except AssertionError as error:
            found = [(node.host.name, node.has_address(), node.connections()) for node in (here, there)]
            raise AssertionError(f"{error}, but {found}\n{here.said()}\n{there.said()}") from None
        assert here.connections() == 0


def _listens(host: Host, *, version: str = "") -> bool:
    return f":{PORT}" in host.run(["ss", f"-Hltn{version}"]).stdout


def _stayed(done: Done) -> list[str]:
    return [each["reason"] for each in done.objects if not each.get("ok", True)]


Scenes = Callable[..., Scene]


@pytest.fixture
def scenes(lan: LanFactory, agents: Agents, pair: Pair) -> Scenes:
    """``scenes(count=200, adopt=[…], form="fifo", …)``: the rest is for `pair`."""

    def make(*, count: int = COUNT, adopt: Sequence[str] = ADOPT, form: str = "fifo", **more: Any) -> Scene:
        net = lan("client", "a", "b")
        a, b = (agents(net.host(name), adopt=adopt, options=["--listen", "[::]:7420"]) for name in "ab")
        for name in "ab":
            for every, version in (("0.0.0.0", "4"), ("::", "6")):
                net.host(name).popen([*SERVE, every, str(PORT)])
                until(partial(_listens, net.host(name), version=version), what="the server listens")
        return Scene(net, *pair(net, a, b, fifo=form == "fifo", **more), count)

    return make


@pytest.mark.parametrize("form", EITHER)
def test_planned_switch_and_back(scenes: Scenes, form: str) -> None:
    scene = scenes(form=form)
    turns = (scene.a, scene.b, "connections"), (scene.b, scene.a, "address"), (scene.a, scene.b, "connections")
    with scene.talking():
        for here, there, first in turns:
            done = here.failover("--first", first)
            assert done.code == 0, (_stayed(done), here.said(), there.said())
            assert done.objects[-1]["switched"]
            scene.moved(here, there)
            assert here.guarded()
        until(scene.b.unguarded, what="the grace time ends")
        # All have come to b. Without an agent at a nothing moves any more, and the address stays with them.
        scene.a.agent.kill()
        assert scene.b.failover().code in (1, 3)
        assert (scene.b.has_address(), scene.b.connections()) == (True, scene.count)
        assert scene.a.check() == (1, "check: a standby without an agent\n")
        assert scene.b.check() == (0, "")
        scene.b.agent.kill()
        assert scene.b.check() == (0, "")


@pytest.mark.parametrize("form", FORMS)
def test_flapping_peer(scenes: Scenes, form: str) -> None:
    """The standby takes the address for a moment, again and again; then the active one's keepalived is stopped."""
    scene = scenes(form=form, priorities=(110, 100))
    a, b = scene.a, scene.b
    with scene.talking():
        for _ in range(3):
            b.host.run(["nft", DEAF])
            until(b.has_address, what="the standby believes to be alone")
            b.host.run(["nft", "delete", "table", "inet", "deaf"])
            until(lambda: a.has_address() and not b.has_address(), what="the address is back")
            assert b.guarded()
        until(lambda: a.connections() == scene.count, what="they stay, or are back")
        a.stop()
        scene.moved(a, b)


@pytest.mark.parametrize("form", EITHER)
def test_node_that_is_shut_down(scenes: Scenes, form: str) -> None:
    """What systemd does: the unit's ExecStop, then keepalived ends, the agent, the server, and at last the network."""
    scene = scenes(form=form)
    a, b = scene.a, scene.b
    with scene.talking():
        for words in stop_commands(a):
            assert a.host.run(words, check=False).returncode == 0
        a.stop()
        a.agent.close()
        a.host.run(["ip", "link", "set", "dev", a.host.dev, "down"])
        assert b.has_address()
        assert b.connections() == scene.count


@pytest.mark.parametrize("form", EITHER)
def test_several_addresses_of_both_versions(scenes: Scenes, form: str) -> None:
    """Two addresses in one instance and an IPv6 address in another: a planned switch, then the active one stops."""
    scene = scenes(form=form, count=20, groups=GROUPS)
    with scene.talking():
        done = scene.a.failover()
        assert done.code == 0, (_stayed(done), scene.a.said(), scene.b.said())
        assert [each["address"] for each in done.objects if "switched" in each] == scene.a.addresses
        scene.moved(scene.a, scene.b)
        assert scene.a.guarded()
        # What follows takes longer than keepalived waits for its programs.
        agent = scene.b.agent.process
        assert agent is not None
        agent.send_signal(signal.SIGSTOP)
        scene.b.stop()
        agent.send_signal(signal.SIGCONT)
        scene.moved(scene.b, scene.a)


def test_what_cannot_move_is_served_where_it_is(scenes: Scenes) -> None:
    """A node stops, and its peer takes none of its connections: the address goes, and the connections live on.

    Then the address comes back to them, and what came to the peer meanwhile follows it.
    """
    scene = scenes(count=20, adopt=["10.0.0.100:1=hold"])
    a, b = scene.a, scene.b
    with scene.talking():
        first, second = stop_commands(a)
        assert a.host.run(first, check=False).returncode == 3
        assert (a.has_address(), b.has_address()) == (True, False)
        assert a.host.run(second, check=False).returncode == 3
        until(lambda: b.has_address() and not a.has_address(), what="the address has gone")
        assert (a.connections(), b.agent.forwarded()) == (scene.count, scene.count)
        with Crowd(scene.client, b.addresses[0], PORT, 5) as late:
            late.echo()
            assert b.connections() == 5
            until(b.unguarded, what="the grace time ends")
            late.echo()
            b.stop()
            until(a.has_address, what="the address is back")
            late.echo()
            assert (a.connections(), b.connections(), a.agent.forwarded()) == (scene.count, 5, 5)


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


def test_unit_stops_before_what_the_switch_needs() -> None:
    """systemd stops in the reverse order of After."""
    lines = UNIT.read_text().splitlines()
    (after,) = [line.removeprefix("After=").split() for line in lines if line.startswith("After=")]
    assert {"network-online.target", "tcpmig-agent.service", "keepalived.service"} <= set(after)
    # Stopping the agent alone is no reason to switch.
    assert not [line for line in lines if line.startswith(("Requires=", "BindsTo=", "PartOf="))]
