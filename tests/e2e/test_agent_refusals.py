"""What an agent must not be confused by: two callers at once, strangers, garbage, a caller that goes away."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from migrate.agent.client import Client
from migrate.agent.tls import init_tls
from migrate.errors import NotFound, RemoteError, UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.selection import Selector
from tests.e2e.test_agent_move import ECHO, PORT, VIP, dial, name, says, serving
from tests.fix_agents import Agents
from tests.fix_netns import LanFactory
from tests.waiting import until


def test_two_callers_move_the_same_connection(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    done: list[int] = []

    def move(chosen: Selector) -> None:
        with Client(f"unix:{a.socket}") as caller:
            *_, last = caller.migrate(chosen, b.address, steer=VIP)
            done.append(last.summary.done)

    with serving(net.host("a"), net.vip4), dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")
        chosen = Selector(connection=FourTuple.parse(name(client)))
        callers = [threading.Thread(target=move, args=(chosen,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert sum(done) == 1
        assert says(client, b"after")
    assert not wire.rsts


def test_a_caller_that_goes_away_does_not_stop_the_move(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        with Client(f"unix:{a.socket}") as caller:
            next(iter(caller.migrate(Selector(connection=FourTuple.parse(name(client))), b.address, steer=VIP)))
        until(lambda: ":8000" in b.host.run(["ss", "-Htn"]).stdout, what="it came")
        until(lambda: a.settled() and b.settled())
        assert says(client, b"after")


def test_strangers_and_garbage(lan: LanFactory, agents: Agents, certificates: Path, tmp_path: Path) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    init_tls(tmp_path / "strange", ["10.0.0.2"])
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        with net.host("client").entered():
            with Client(a.address, tls=tmp_path / "strange") as stranger, pytest.raises(RemoteError):
                list(stranger.drain([b.address]))
            with socket.create_connection((net.host("a").ip4, 7420), timeout=5) as garbage:
                garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
            with Client(a.address, tls=certificates) as operator:
                with pytest.raises(UsageError):
                    list(operator.migrate(Selector(), b.address))
                with pytest.raises(NotFound):
                    operator.abort("nothing")
                with pytest.raises(NotFound):
                    operator.settle("00" * 16, committed=False)
                assert [
                    each.local for each in operator.connections(Selector(local=parse_endpoint(f"{net.vip4}:{PORT}")))
                ]
                *_, last = operator.migrate(Selector(connection=FourTuple.parse(name(client))), b.address, steer=VIP)
        assert last.summary.done == 1
        assert says(client, b"after")
