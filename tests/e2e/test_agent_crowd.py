"""Ten thousand connections that echo all the while move from one host to the other and back."""

from __future__ import annotations

import json
import threading
from typing import Self

from tests.crowd import Crowd
from tests.e2e.test_agent_move import ECHO, PORT, VIP, serving
from tests.fix_agents import Agents
from tests.fix_netns import Host, LanFactory
from tests.waiting import until

COUNT = 10_000
PACE = 0.1  # seconds between two rounds


# Whatever reaches the client and whatever it answers: more than a capture has room for, so the kernel counts.
RESETS = """table inet resets {
    counter seen {}
    chain arriving { type filter hook prerouting priority -400; tcp flags rst counter name seen; }
    chain departing { type filter hook output priority -400; tcp flags rst counter name seen; }
}
"""


def count_resets(host: Host) -> None:
    host.run(["nft", "-f", "-"], input=RESETS)


def resets(host: Host) -> int:
    """RSTs that came or went since."""
    listed = json.loads(host.run(["nft", "-j", "list", "counter", "inet", "resets", "seen"]).stdout)
    return int(next(each["counter"]["packets"] for each in listed["nftables"] if "counter" in each))


class Chorus(threading.Thread):
    """Everyone echoes, again and again; each word is compared. A context manager."""

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.error: BaseException | None = None
        self._crowd = crowd
        self._over = threading.Event()

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._crowd.echo(seconds=60)
                self.rounds += 1
                self._over.wait(PACE)
        except BaseException as error:
            self.error = error

    def await_round(self, *, within: float) -> None:
        """Until a round that began after now has ended; raises what went wrong."""
        now = self.rounds
        until(lambda: self.error is not None or self.rounds > now + 1, within=within, what="everyone echoes")
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(90)
        if self.error is not None:
            raise self.error


def test_ten_thousand_there_and_back(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    count_resets(net.host("client"))
    with (
        serving(net.host("a"), net.vip4),
        Crowd(net.host("client"), net.vip4, PORT, COUNT) as crowd,
        Chorus(crowd) as chorus,
    ):
        chorus.await_round(within=90)
        for source, destination in ((a, b), (b, a)):
            before = chorus.rounds
            drain = ["drain", "--to", destination.address, "--steer", VIP, "--when-quiet", "90"]
            done = source.tcpmig(*drain, timeout=180)
            stayed = [each for each in done.results.values() if not each["ok"]]
            assert (done.code, done.summary["done"], stayed) == (0, COUNT, []), done.summary
            assert chorus.rounds > before  # the moves were in the midst of it
            chorus.await_round(within=90)
            assert resets(net.host("client")) == 0
