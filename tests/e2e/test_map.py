"""`migrate --map`: agents behind a load balancer, which hides that a connection's local end changes."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from migrate.agent.client import Client
from migrate.agent.errors import from_problem
from migrate.errors import UsageError
from migrate.fourtuple import parse_endpoint
from migrate.relocate import LocalMap
from migrate.selection import Selector
from tests.balancer import BEHIND, Scene, end
from tests.fix_agents import Agent, Agents
from tests.fix_netns import LanFactory
from tests.peers import Peer, Talk, digest, echo_server, listen, noise
from tests.waiting import until

SIZE = 2 << 20


@pytest.mark.parametrize("family", [4, 6])
def test_data_under_way_moves_there_and_back(lan: LanFactory, agents: Agents, family: int) -> None:
    scene = Scene(lan, agents, family, adopt="child:cat")
    a, b = scene.a, scene.b
    ends = {"ok": True, "local": scene.end(a.host), "moved_to": scene.end(b.host)}
    with (
        listen(a.host, end(a.host, family), BEHIND) as listener,
        scene.dial() as client,
        listener.accept()[0],  # nobody reads from it
        scene.net.capture("client") as wire,
    ):
        peer = Peer(client, send=SIZE, receive=SIZE)
        until(lambda: peer.sent > 1 << 17, what="much is unread")
        wish, port = scene.wish(client, a, b), client.getsockname()[1]
        [planned] = a.tcpmig(*wish, "--dry-run").results.values()
        assert planned.items() >= (ends | {"expected": True}).items()
        assert scene.lives(a.host) == [scene.end(a.host)]
        with scene.balancer.apart(port):
            done = a.tcpmig(*wish)
            assert done.code == 0, done
            [result] = done.results.values()
            assert result.items() >= ends.items()
            assert scene.lives(b.host) == [scene.end(b.host)]
            assert not scene.lives(a.host)
            scene.balancer.repoint(port, b.host)
        peer.join()
        assert peer.received_digest == digest(noise(), SIZE)
        with scene.balancer.apart(port):
            done = b.tcpmig(*scene.wish(client, b, a), "--when-quiet", "10")
            assert done.code == 0, done
            scene.balancer.repoint(port, a.host)
        peer = Peer(client, send=SIZE, receive=SIZE, seed=1)
        peer.join()
        assert peer.received_digest == digest(noise(1), SIZE)
        assert scene.lives(a.host) == [scene.end(a.host)]
    assert not wire.rsts


def test_segments_that_the_old_host_kept_reach_the_new_end(lan: LanFactory, agents: Agents) -> None:
    scene = Scene(lan, agents)
    a, b = scene.a, scene.b
    # The balancer goes on sending to a for as long as this test pleases, and a must not mind.
    a.host.run(["nft", "table ip mute { chain out { type filter hook output priority 0; tcp flags rst drop; }; }"])
    with echo_server(a.host, a.host.ip4, BEHIND), scene.dial() as client, scene.net.capture("client") as wire:
        port = client.getsockname()[1]
        talk = Talk(client)
        talk.goes_on()
        with scene.balancer.deaf_to(f"saddr {b.host.ip4}"):
            done = a.tcpmig(*scene.wish(client, a, b), "--when-quiet", "10")
            assert done.code == 0, done
            # What the balancer lets pass it sends to a.
            until(lambda: scene.received(b.host) > 0, what="the client's word reaches b")
            scene.balancer.drop(f"saddr {scene.balancer.client}")
            scene.balancer.repoint(port, b.host)
        talk.goes_on()
        talk.over = True
        talk.join(10)
    assert not wire.rsts


def ended(agent: Agent) -> bool:
    return agent.process is not None and agent.process.poll() is not None


@pytest.mark.parametrize(
    "point",
    [
        "destination:COMMITTING:WON",
        "destination:COMMITTING:WON:Activate",
        "source:OFFERED:COMMITTED:Release",
    ],
)
def test_a_killed_agent_goes_on_with_the_new_end(lan: LanFactory, agents: Agents, point: str) -> None:
    scene = Scene(lan, agents)
    a, b = scene.a, scene.b
    dying = a if point.startswith("source") else b
    dying.stop()
    dying.start(crash_at=point)
    with echo_server(a.host, a.host.ip4, BEHIND), scene.dial() as client, scene.net.capture("client") as wire:
        assert scene.says(client, b"before")
        port = client.getsockname()[1]
        with scene.balancer.apart(port):
            mover = threading.Thread(target=a.tcpmig, args=scene.wish(client, a, b))
            mover.start()
            until(partial(ended, dying), what="it is killed")
            dying.start()
            mover.join()
            until(lambda: a.settled() and b.settled(), within=30, what="both settled")
            assert (scene.lives(a.host), scene.lives(b.host)) == ([], [scene.end(b.host)])
            scene.balancer.repoint(port, b.host)
        assert scene.says(client, b"after")
    assert not wire.rsts


def test_what_cannot_be_mapped_stays(lan: LanFactory, agents: Agents) -> None:
    scene = Scene(lan, agents)
    a, b = scene.a, scene.b
    with echo_server(a.host, a.host.ip4, BEHIND), scene.dial() as client, Client(f"unix:{a.socket}") as agent:
        assert scene.says(client, b"before")
        local, whole = parse_endpoint(scene.end(a.host)), LocalMap.parse("10.0.0.2", "10.0.0.3")
        strange = LocalMap.parse("10.0.0.9", "10.0.0.3")
        for moving, said in (
            (agent.migrate(Selector(local=local), b.address, maps=[whole, strange]), "10.0.0.9, which no chosen"),
            (
                agent.migrate(Selector(local=local), b.address, maps=[strange], dry_run=True),
                "10.0.0.9, which no chosen",
            ),
            (agent.migrate(Selector(local=local), b.address, maps=[whole], steer="forward"), "a map gives them up"),
            (agent.drain([b.address, "10.0.0.9:7420"], maps=[whole]), "several destinations"),
        ):
            with pytest.raises(UsageError, match=said):
                raise from_problem(list(moving)[-1].summary.problem)
        done = a.tcpmig("migrate", "--local", scene.end(a.host), "--to", b.address, "--map", "10.0.0.9=10.0.0.3")
        assert (done.code, done.objects) == (2, []), done
        assert scene.says(client, b"after")
