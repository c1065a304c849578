"""Two keepalived daemons give a floating address to one of two hosts, and the connections follow it, or go first."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from tests.crowd import ADOPTED, SERVE, Crowd
from tests.fix_agents import Agents
from tests.fix_keepalived import Node, Pair
from tests.fix_netns import Lan, LanFactory
from tests.waiting import until

PORT = 8000
COUNT = int(os.environ.get("TCPMIG_FAILOVER_CONNECTIONS", "200"))
PAUSE = 0.01  # seconds between two words
LONGEST = 8.0  # seconds that a word may take while keepalived changes its mind
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

        until(so, within=20, what=f"all is at {there.host.name}: {here.said()}\n{there.said()}")
        assert here.connections() == 0


@pytest.fixture
def scene(lan: LanFactory, agents: Agents, pair: Pair) -> Scene:
    net = lan("client", "a", "b")
    adopt = [f"*=systemd:{' '.join(ADOPTED)}"]
    a, b = (agents(net.host(name), adopt=adopt) for name in "ab")
    for name in "ab":
        net.host(name).popen([*SERVE, "0.0.0.0", str(PORT)])
        until(lambda each=name: f":{PORT}" in net.host(each).run(["ss", "-Hltn"]).stdout)
    return Scene(net, *pair(net, a, b))


@pytest.mark.parametrize("first", ["connections", "address"])
def test_planned_switch_and_back(scene: Scene, first: str) -> None:
    with scene.talking():
        for here, there in itertools.islice(itertools.cycle([(scene.a, scene.b), (scene.b, scene.a)]), 3):
            done = here.failover("--first", first)
            assert done.code == 0, (done, here.said(), there.said())
            assert done.objects[-1]["switched"]
            scene.moved(here, there)
            assert here.guarded()
            until(lambda node=there: not node.guarded(), what="the grace time ends")
