"""Two agents move connections that are in use."""

from __future__ import annotations

import socket

from tests.fix_agents import Agents
from tests.fix_netns import Lan, LanFactory
from tests.peers import connect

STEER = "vip:eth0"


def test_one_connection_there(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=["*=child:cat"])
    client, server = connect(net.host("client"), net.host("a"), net.vip4)
    with client, server, net.capture("client") as wire:
        client.settimeout(5)
        client.sendall(b"one")
        assert server.recv(10) == b"one"
        done = a.tcpmig("migrate", name(net, client), "--to", b.address, "--steer", STEER)
        assert done.code == 0, (done, a.log.read_text(), b.log.read_text())
        client.sendall(b"two")
        assert client.recv(10) == b"two"
    assert not wire.rsts


def name(net: Lan, client: socket.socket) -> str:
    """A connection, as the server's host calls it."""
    remote, local = client.getsockname()[:2], client.getpeername()[:2]
    return f"{local[0]}:{local[1]},{remote[0]}:{remote[1]}"
