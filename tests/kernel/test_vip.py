"""steer/vip.py: an address goes from host to host, and a third one notices at once."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time

import pytest

from migrate.errors import HostError, NotFound
from migrate.fourtuple import FourTuple
from migrate.kernel.link import Links
from migrate.steer import Steering
from migrate.steer.vip import Vip
from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until

PORT = 8000
ADDRESSES = pytest.mark.parametrize("address", [Lan.vip4, Lan.vip6])


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def carried(host: Host, address: str) -> list[int]:
    """The prefix lengths with which the host has the address."""
    with Links(host.netns) as links:
        return [each.prefix_length for each in links.addresses() if each.address == packed(address)]


def knows(host: Host, address: str, mac: str) -> bool:
    """Whether the host believes that the address is there."""
    shown = host.run(["ip", "neigh", "show", "to", address, "dev", host.dev]).stdout
    return f"lladdr {mac} " in shown


def ping(host: Host, address: str) -> None:
    host.run(["ping", "-c1", "-W5", address])


def connection(local: str, port: int = 1) -> FourTuple:
    return FourTuple(packed(local), PORT, packed(local)[:-1] + b"\x63", port)


@ADDRESSES
def test_neighbours_follow(lan: LanFactory, address: str) -> None:
    net = lan("client", "a", "b")
    client, a, b = net.hosts.values()
    with Vip(a.dev, namespace=a.netns) as here, Vip(b.dev, namespace=b.netns) as there:
        here.announce(packed(address))
        ping(client, address)
        assert knows(client, address, a.mac)
        for old, new, host in ((here, there, b), (there, here, a)):
            old.withdraw(packed(address))
            new.announce(packed(address))
            # Without a packet of the client's: what it knows is what it was told.
            until(functools.partial(knows, client, address, host.mac))
            ping(client, address)
    assert carried(a, address) and not carried(b, address)


@ADDRESSES
def test_a_stream_of_datagrams_is_hardly_interrupted(lan: LanFactory, address: str) -> None:
    net = lan("client", "a", "b")
    client, a, b = net.hosts.values()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(Vip(a.dev, namespace=a.netns))
        there = stack.enter_context(Vip(b.dev, namespace=b.netns))
        here.announce(packed(address))
        sinks = []
        for host in (a, b):
            with host.entered():
                sink = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sink.bind(("", PORT))
            sink.settimeout(10)
            sinks.append(sink)
        with client.entered():
            source = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        source.connect((address, PORT))
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.0005):
                source.send(str(time.monotonic_ns()).encode())

        sender = threading.Thread(target=send)
        sender.start()
        try:
            sinks[0].recv(100)
            here.withdraw(packed(address))
            there.announce(packed(address))
            done = time.monotonic_ns()
            first = int(sinks[1].recv(100))
        finally:
            stop.set()
            sender.join()
    # It was announced before `done`, and what was sent from then on arrives. A neighbour that was told nothing would
    # send on to the old host for seconds. The bound allows for a busy machine.
    assert (first - done) / 1e9 < 1


def test_repeating_changes_nothing(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.hosts.values()
    with Vip(a.dev, namespace=a.netns) as vip:
        for _ in range(2):
            vip.withdraw(packed(net.vip4))
            assert carried(a, net.vip4) == []
        for _ in range(2):
            vip.announce(packed(net.vip4))
            assert carried(a, net.vip4) == [32]
        ping(client, net.vip4)


def test_an_address_is_withdrawn_however_it_came(lan: LanFactory) -> None:
    net = lan("a")
    a = net.host("a")
    net.assign(a, net.vip4)
    with Vip(a.dev, namespace=a.netns) as vip:
        vip.announce(packed(net.vip4))  # a second time, with another prefix length
        assert sorted(carried(a, net.vip4)) == [24, 32]
        vip.withdraw(packed(net.vip4))
        assert carried(a, net.vip4) == []
        net.assign(a, net.vip4)  # somebody else, meanwhile
        vip.withdraw(packed(net.vip4))
        assert carried(a, net.vip4) == []
        a.run(["ip", "addr", "add", f"{net.vip4}/24", "dev", "lo"])  # not ours
        vip.withdraw(packed(net.vip4))
    assert carried(a, net.vip4) == [24]


def test_prefix_length(lan: LanFactory) -> None:
    net = lan("a")
    a = net.host("a")
    with Vip(a.dev, namespace=a.netns, prefix_length=24) as vip:
        vip.announce(packed(net.vip4))
        assert carried(a, net.vip4) == [24]
        vip.withdraw(packed(net.vip4))
        assert carried(a, net.vip4) == []


def test_as_steering(lan: LanFactory) -> None:
    net = lan("a", "b")
    a, b = net.hosts.values()
    tuples = [connection(net.vip4, 1), connection(net.vip4, 2), connection(net.vip6, 1)]
    with contextlib.ExitStack() as stack:
        source: Steering = stack.enter_context(Vip(a.dev, namespace=a.netns))
        destination: Steering = stack.enter_context(Vip(b.dev, namespace=b.netns))
        source.take(tuples)
        for giver, taker, owner in ((source, destination, b), (destination, source, a)):
            giver.give(tuples, packed(owner.ip4))
            taker.take(tuples)
            for host in (a, b):
                assert [carried(host, each) for each in (net.vip4, net.vip6)] == (
                    [[32], [128]] if host is owner else [[], []]
                )


def test_connections_outlive_their_address(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.hosts.values()
    with Vip(a.dev, namespace=a.netns) as vip:
        vip.announce(packed(net.vip4))
        with a.entered():
            listener = socket.create_server((net.vip4, PORT))
        with (
            listener,
            client.entered(),
            socket.create_connection((net.vip4, PORT)) as there,
            listener.accept()[0] as here,
        ):
            vip.withdraw(packed(net.vip4))
            there.send(b"too early")
            vip.announce(packed(net.vip4))
            there.settimeout(10)
            here.settimeout(10)
            assert here.recv(100) == b"too early"
            here.send(b"fine")
            assert there.recv(100) == b"fine"


def test_it_opens_and_closes_no_socket_while_a_connection_waits(
    lan: LanFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Closing an AF_PACKET socket takes more than 10 ms; all else together takes one.
    net = lan("client", "a")
    client, a = net.hosts.values()

    def refuse(*_: object) -> None:
        raise AssertionError("a socket")

    with Vip(a.dev, namespace=a.netns) as vip, monkeypatch.context() as patched:
        patched.setattr(socket, "socket", refuse)
        vip.announce(packed(net.vip4))
        vip.withdraw(packed(net.vip4))
        vip.announce(packed(net.vip4))
    ping(client, net.vip4)


def test_a_device_that_is_not_there_or_no_ethernet(lan: LanFactory) -> None:
    a = lan("a").host("a")
    with Vip(a.dev, namespace=a.netns):  # what is opened once
        pass
    before = os.listdir("/proc/self/fd"), threading.active_count()
    with pytest.raises(NotFound, match="there is no device 'nope'"):
        Vip("nope", namespace=a.netns)
    with pytest.raises(HostError, match="device 'lo' has no Ethernet address"):
        Vip("lo", namespace=a.netns)
    with pytest.raises(NotFound, match="there is no network namespace 'tcpmig-no-such'"):
        Vip(a.dev, namespace="tcpmig-no-such")
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before
