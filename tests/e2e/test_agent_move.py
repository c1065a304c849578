"""Two agents move connections that are in use."""

from __future__ import annotations

import contextlib
import functools
import shlex
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest

from migrate.agent.client import Client
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.kernel.nft import ForwardTable
from migrate.selection import Selector, find
from tests.crowd import ADOPTED, SERVE, Crowd
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Host, Lan, LanFactory
from tests.peers import Peer, connect, digest, echo_server, noise
from tests.waiting import until

VIP = "vip:eth0"
PORT = 8000
ECHO = f"*=systemd:{shlex.join(ADOPTED)}"


def name(client: socket.socket) -> str:
    """A connection, as the server's host calls it."""
    (local, local_port), (remote, remote_port) = client.getpeername()[:2], client.getsockname()[:2]
    if ":" in local:
        local, remote = f"[{local}]", f"[{remote}]"
    return f"{local}:{local_port},{remote}:{remote_port}"


def dial(net: Lan, port: int = PORT, address: str = "") -> socket.socket:
    with net.host("client").entered():
        sock = socket.create_connection((address or net.vip4, port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def says(sock: socket.socket, word: bytes) -> bool:
    """The far end echoes."""
    sock.sendall(word)
    return sock.recv(len(word), socket.MSG_WAITALL) == word


def forwards_nothing(agent: Agent) -> bool:
    return agent.forwarded() == 0


def carries(host: Host, address: str) -> bool:
    return f" {address}/" in host.run(["ip", "-o", "address", "show", "dev", host.dev]).stdout


@contextlib.contextmanager
def serving(host: Host, address: str, port: int = PORT) -> Iterator[subprocess.Popen[bytes]]:
    """A process that echoes, as an unmodified program would."""
    process = host.popen([*SERVE, address, str(port)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_one_connection_there_and_back(lan: LanFactory, agents: Agents, family: str) -> None:
    net = lan("client", "a", "b")
    for host in net.hosts.values():
        host.sysctl("net.ipv4.tcp_ecn", 1)
    address = net.vip4 if family == "ipv4" else net.vip6
    net.assign("a", address)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    with (
        serving(net.host("a"), address),
        dial(net, address=address) as client,
        net.capture("client") as wire,
    ):
        assert says(client, b"before")
        for source, destination in ((a, b), (b, a)):
            done = source.tcpmig("migrate", name(client), "--to", destination.address, "--steer", VIP)
            assert (done.code, done.summary["done"], done.results[name(client)]["ok"]) == (0, 1, True), done
            assert says(client, b"after")
            assert carries(destination.host, address)
            assert not carries(source.host, address)
    assert not wire.rsts
    assert all(each.ecn for each in wire.segments if each.length), "every segment with data says that it knows ECN"


def test_unread_and_unsent_data_moves(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    size = 3 << 20
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=["*=child:cat"])
    client, server = connect(net.host("client"), net.host("a"), net.vip4)
    with client, server:
        peer = Peer(client, send=size, receive=size, close_after=True)
        until(lambda: peer.sent > 1 << 17, what="much is unread")
        done = a.tcpmig("migrate", name(client), "--to", b.address, "--steer", VIP)
        assert done.code == 0, done
        peer.join()
        assert peer.received_digest == digest(noise(), size)


def test_a_single_connection_moves_alone(lan: LanFactory, agents: Agents) -> None:
    for steer in ("forward", VIP):
        net = lan("client", "a", "b")
        net.assign("a", net.vip4)
        a = agents(net.host("a"), adopt=[ECHO], name=f"a-{steer[:3]}")
        b = agents(net.host("b"), adopt=[ECHO], name=f"b-{steer[:3]}")
        with (
            serving(net.host("a"), net.vip4),
            dial(net) as mover,
            dial(net) as stays,
            net.capture("client") as wire,
        ):
            assert says(mover, b"1")
            assert says(stays, b"1")
            assert a.tcpmig("migrate", name(mover), "--to", b.address, "--steer", steer).code == 0
            assert says(mover, b"22")
            assert says(stays, b"22")
            assert carries(net.host("a"), net.vip4)  # it has a connection there, and the listener
            assert a.forwarded() == 1
            with dial(net) as new:
                assert says(new, b"new")
            assert b.tcpmig("migrate", name(mover), "--to", a.address, "--steer", steer).code == 0
            assert says(mover, b"333")
            assert says(stays, b"333")
            until(functools.partial(forwards_nothing, a), what="nothing is forwarded any more")
        assert not wire.rsts


def test_refused_ones_stay_alive(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=[f"{net.vip4}:8001=child:cat"])
    with (
        serving(net.host("a"), net.vip4, 8000),
        serving(net.host("a"), net.vip4, 8001),
        dial(net, 8000) as stays,
        dial(net, 8001) as moves,
        net.capture("client") as wire,
    ):
        assert says(stays, b"1")
        assert says(moves, b"1")
        done = a.tcpmig("migrate", "--local", net.vip4, "--to", b.address, "--steer", VIP)
        assert done.code == 3, done
        assert done.results[name(moves)]["ok"]
        assert "nobody at the destination adopts it" in done.results[name(stays)]["reason"]
        assert says(stays, b"2")
        assert says(moves, b"2")
        done = a.tcpmig("migrate", name(stays), "--to", b.address)
        assert done.code == 1
        assert says(stays, b"3")
    assert not wire.rsts


def test_a_destination_that_is_not_there(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a = agents(net.host("a"))
    with serving(net.host("a"), net.vip4), dial(net) as client:
        done = a.tcpmig("migrate", name(client), "--to", "10.0.0.3:7420", "--steer", VIP)
        assert done.code == 1
        assert "broke" in done.results[name(client)]["reason"]
        assert says(client, b"alive")
        assert a.tcpmig("migrate", "10.0.0.100:1,10.0.0.1:2", "--to", "10.0.0.3:7420").code == 1
        assert a.tcpmig("migrate", "--to", "10.0.0.3:7420").code == 2


def test_what_ended_elsewhere_is_forwarded_no_longer(lan: LanFactory, agents: Agents) -> None:
    net = lan("a", "b")
    host = net.host("a")
    flow = FourTuple.parse(f"{net.vip4}:80,10.0.0.9:5001")
    with host.entered(), ForwardTable(host.dev) as table:
        table.add({flow: socket.inet_aton(net.host("b").ip4)})
        host.run(["nft", "flush", "set", "netdev", table.name, "active4"])  # as if nothing had come for days
    a = agents(host)
    until(functools.partial(forwards_nothing, a), what="the agent sweeps")
    assert str(flow) in a.log.read_text()


def test_drain_at_quiet_points(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=[ECHO])
    with serving(net.host("a"), net.vip4), Crowd(net.host("client"), net.vip4, PORT, 60) as crowd:
        crowd.echo()
        plan = a.tcpmig("drain", "--to", b.address, "--dry-run")
        assert plan.code == 0
        assert sum(each["ok"] for each in plan.results.values()) == 60
        assert plan.objects[-1]["expected_frozen_us"] > 0
        done = a.tcpmig("drain", "--to", b.address, "--steer", VIP, "--when-quiet", "10")
        assert (done.code, done.summary["done"]) == (0, 60), done
        crowd.echo()


def test_workers_that_share_a_local_end(lan: LanFactory, agents: Agents) -> None:
    """SO_REUSEPORT: the kernel deals connections out to several processes; those of each move, alone or with all."""
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=[f"{net.vip4}:{PORT}=child:cat"])
    chosen = Selector(local=parse_endpoint(f"{net.vip4}:{PORT}"))

    def owners(host: Host) -> Counter[int]:
        with host.entered():
            return Counter(owner.pid for each in find(chosen) for owner in each.owners)

    with (
        serving(net.host("a"), net.vip4) as first,
        serving(net.host("a"), net.vip4) as second,
        net.capture("client") as wire,
        Crowd(net.host("client"), net.vip4, PORT, 40) as crowd,
    ):
        crowd.echo()
        before = owners(a.host)
        assert before.keys() == {first.pid, second.pid}
        alone = a.tcpmig("migrate", "--pid", str(first.pid), "--to", b.address, "--steer", VIP)
        assert (alone.code, alone.summary["done"]) == (0, before[first.pid]), alone
        assert owners(a.host) == {second.pid: before[second.pid]}
        crowd.echo()
        rest = a.tcpmig("drain", "--to", b.address, "--steer", VIP, "--when-quiet", "10")
        assert (rest.code, rest.summary["done"]) == (0, before[second.pid]), rest
        assert not owners(a.host)
        assert len(owners(b.host)) == 40, "a child each"
        crowd.echo()
        assert first.poll() is second.poll() is None
    assert not wire.rsts


def test_a_thousand_there_and_back(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    with (
        serving(net.host("a"), net.vip4),
        net.capture("client") as wire,
        Crowd(net.host("client"), net.vip4, PORT, 1000) as crowd,
    ):
        crowd.echo()
        for source, destination in ((a, b), (b, a)):
            done = source.tcpmig("drain", "--to", destination.address, "--steer", VIP)
            assert (done.code, done.summary["done"]) == (0, 1000), done.summary
            crowd.echo()
    assert not wire.rsts


def test_fifty_moves_in_a_row(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=["*=child:cat"]), agents(net.host("b"), adopt=["*=child:cat"])
    with echo_server(net.host("a"), net.vip4, PORT), dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")
        with Client(f"unix:{a.socket}") as at_a, Client(f"unix:{b.socket}") as at_b:
            for number in range(25):
                assert moved(at_a, client, b)
                assert says(client, b"there %d" % number)
                assert moved(at_b, client, a)
                assert says(client, b"back %d" % number)
    assert not wire.rsts


def moved(at: Client, client: socket.socket, to: Agent) -> bool:
    """Move it by the library's call."""
    *_, last = at.migrate(Selector(connection=FourTuple.parse(name(client))), to.address, steer=VIP)
    return bool(last.summary.done == 1)
