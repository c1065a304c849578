"""Many connections are prepared before the first is frozen: whatever ends the move then, all of it comes out clean."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from migrate.agent.client import Client
from migrate.agent.passage import BATCH
from tests.crowd import Crowd
from tests.e2e.test_agent_move import ECHO, PORT, VIP, serving
from tests.fix_agents import Agent, Agents
from tests.fix_netns import LanFactory
from tests.waiting import until

COUNT = 600
FREEZE = "source:PREPARING:PREPARED:Freeze"  # of the first batch: all others wait for their turn
OFFER = "destination:PREPARED:OFFER:RestoreSilent"


def stopped(agent: Agent) -> bool:
    """By itself, on purpose."""
    return "a fault on purpose" in agent.log.read_text()


def wake(agent: Agent) -> None:
    assert agent.process is not None
    agent.process.send_signal(signal.SIGCONT)


def abort(a: Agent, b: Agent) -> None:
    """The caller stops the move while the first batch is about to be frozen."""
    waker = threading.Timer(1.0, wake, [a])
    waker.start()
    with Client(f"unix:{a.socket}") as client:
        client.abort(move_of(a))
    waker.join()


def move_of(agent: Agent) -> str:
    line = next(each for each in agent.log.read_text().splitlines() if "move started" in each)
    return line.partition("move=")[2].split()[0].strip('"')


def kill_source(a: Agent, b: Agent) -> None:
    a.kill()
    a.start()


def kill_destination(a: Agent, b: Agent) -> None:
    b.kill()
    b.start()


@pytest.mark.parametrize(
    ("end", "point", "why"),
    [
        (abort, FREEZE, "the move was stopped"),
        (kill_source, FREEZE, ""),
        (kill_destination, OFFER, "the stream to the destination broke"),
    ],
)
def test_what_was_prepared_and_never_frozen_stays_and_leaves_nothing_behind(
    lan: LanFactory, agents: Agents, end: Callable[[Agent, Agent], None], point: str, why: str
) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    faulty = a if point == FREEZE else b
    faulty.stop()
    faulty.start(crash_at=f"{point}=STOP")
    with serving(net.host("a"), net.vip4), Crowd(net.host("client"), net.vip4, PORT, COUNT) as crowd:
        moved: list[dict[str, object]] = []

        def drain() -> None:
            done = a.tcpmig("drain", "--to", b.address, "--steer", VIP, timeout=120)
            moved.extend(done.results.values())

        move = threading.Thread(target=drain)
        move.start()
        until(lambda: stopped(faulty), within=20, what="the first is about to be frozen, or offered")
        prepared = [each for each in b.rows() if each[0] == "destination"]
        assert len(prepared) >= COUNT // BATCH, "all are prepared before the first is frozen"
        end(a, b)
        move.join(100)
        until(lambda: a.settled() and b.settled(), within=40, what="nothing is left at either host")
        assert crowd.echo() < 5
        if why:
            assert any(why in str(each) for each in moved), moved[:3]
