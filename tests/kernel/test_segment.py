"""Injected segments reach sockets as if the peer had sent them; where they cannot, that is said and nothing leaves."""

from __future__ import annotations

import random
import socket

import pytest

from migrate.errors import Error, HostError
from migrate.fourtuple import FourTuple
from migrate.kernel.nft import MARK
from migrate.kernel.segment import ACK, FIN, PSH, Injector, Segment
from tests.fix_netns import Host, Lan, LanFactory, ip
from tests.kernel.pairs import KINDS, Pair, numbers, pair, unprivileged
from tests.waiting import until


def hosts(lan: LanFactory) -> tuple[Lan, Host, Host]:
    net = lan("client", "a")
    return net, net.host("client"), net.host("a")


def arriving(ends: Pair, payload: bytes, flags: int = ACK | PSH) -> bytes:
    """What the client could send next."""
    seq, ack = numbers(ends.client)
    return Segment(ends.flow, seq, ack, flags, window=1000, payload=payload).build()


def injector(host: Host) -> Injector:
    with host.entered():
        return Injector(MARK)


def received(sock: socket.socket, length: int) -> bytes:
    return sock.recv(length, socket.MSG_WAITALL)


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_fin_reach_the_socket(lan: LanFactory, kind: str) -> None:
    _, client, a = hosts(lan)
    with pair(client, a, kind) as ends, injector(a) as inject:
        inject.inject(arriving(ends, b"hello", ACK | PSH | FIN))
        assert received(ends.server, 5) == b"hello"
        assert ends.server.recv(1) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_neither_reverse_path_filters_nor_the_source_matter(lan: LanFactory, kind: str) -> None:
    _, client, a = hosts(lan)
    for device in ("all", "default", "lo", a.dev):
        a.sysctl(f"net.ipv4.conf.{device}.rp_filter", 1)
    with pair(client, a, kind) as ends, injector(a) as inject:
        packet = arriving(ends, b"hello")
        a.run(["ip", "route", "flush", "dev", a.dev])  # no way back to the source either
        a.run(["ip", "-6", "route", "flush", "dev", a.dev, "proto", "kernel", "table", "main"])
        inject.inject(packet)
        assert received(ends.server, 5) == b"hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_packet_larger_than_the_mtu_of_lo_is_split(lan: LanFactory, kind: str) -> None:
    _, client, a = hosts(lan)
    payload = random.Random(1).randbytes(30_000)
    with pair(client, a, kind) as ends, injector(a) as inject:
        a.run(["ip", "link", "set", "lo", "mtu", "1400"])
        inject.inject(arriving(ends, payload))
        assert received(ends.server, len(payload)) == payload


def test_the_largest_packet_needs_no_splitting(lan: LanFactory) -> None:
    _, client, a = hosts(lan)
    a.sysctl("net.ipv4.tcp_rmem", "4096 400000 600000")  # a first window of 64 KiB
    payload = random.Random(2).randbytes(65_495)
    with pair(client, a, "IPv4") as ends, injector(a) as inject:
        packet = arriving(ends, payload)
        assert len(packet) == 65_535
        inject.inject(packet)
        assert received(ends.server, len(payload)) == payload


def test_an_address_that_is_elsewhere_is_refused_and_nothing_leaves(lan: LanFactory) -> None:
    net, client, a = hosts(lan)
    with injector(a) as inject, net.capture(a) as wire:
        for flow in (
            "10.0.0.1:80,10.0.0.9:7",
            "10.0.0.100:80,10.0.0.9:7",
            "[fd00::1]:80,[fd00::9]:7",
            "8.8.8.8:1,9.9.9.9:2",
        ):
            with pytest.raises(HostError, match="no address of this host"):
                inject.inject(Segment(FourTuple.parse(flow), 1).build())
        assert wire.segments == []
        net.assign(a, net.vip4)
        inject.inject(Segment(FourTuple.parse(f"{net.vip4}:80,{client.ip4}:7"), 1).build())
        rsts = until(lambda: wire.rsts)  # nobody is there, but it was tried
        assert [segment.outgoing for segment in rsts] == [True]


def test_lo_must_be_up(lan: LanFactory) -> None:
    _, client, a = hosts(lan)
    for kind in KINDS:
        with pair(client, a, kind) as ends, injector(a) as inject:
            packet = arriving(ends, b"hello")
            ip(["link set lo down"], namespace=a.netns)
            with pytest.raises(HostError, match="ip link set lo up"):
                inject.inject(packet)
            ip(["link set lo up"], namespace=a.netns)
            inject.inject(packet)
            assert received(ends.server, 5) == b"hello"


def test_a_firewall_in_the_way_is_named_and_can_let_the_mark_pass(lan: LanFactory) -> None:
    _, client, a = hosts(lan)
    a.run(["nft", "add table inet t; add chain inet t out { type filter hook output priority 0; policy drop; }"])
    a.run(["nft", f"insert rule inet t out meta mark != {MARK:#x} accept"])
    with pair(client, a, "IPv4") as ends, injector(a) as inject:
        packet = arriving(ends, b"hello")
        with pytest.raises(HostError, match=f"mark {MARK:#x} pass"):
            inject.inject(packet)
        a.run(["nft", f"insert rule inet t out meta mark {MARK:#x} accept"])
        inject.inject(packet)
        assert received(ends.server, 5) == b"hello"


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_the_device_of_its_address_is_reached(lan: LanFactory, kind: str) -> None:
    _, client, a = hosts(lan)
    with pair(client, a, kind) as ends, injector(a) as inject:
        packet = arriving(ends, b"hello")
        ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        inject.inject(packet)
        ends.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            ends.server.recv(1)
        ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, a.dev.encode())
        inject.inject(packet)
        assert ends.server.recv(5) == b"hello"


def test_what_is_no_segment_is_not_injected(lan: LanFactory) -> None:
    _, _, a = hosts(lan)
    with injector(a) as inject, pytest.raises(Error, match="no TCP segment"):
        inject.inject(b"noise")


def test_privilege_is_asked_for() -> None:
    said = unprivileged(lambda: Injector(MARK))
    assert said.startswith("PrivilegeError: ")
    assert "CAP_NET_RAW" in said


def test_closing_twice_closes_once(lan: LanFactory) -> None:
    _, _, a = hosts(lan)
    inject = injector(a)
    inject.close()
    inject.close()
