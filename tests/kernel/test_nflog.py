"""kernel/nflog.py: exactly the packets that a rule logs, each at once; a group belongs to one listener."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import time
from collections.abc import Iterator

import pytest

from migrate.errors import Conflict, HostError, KernelError
from migrate.kernel import nflog
from migrate.kernel.nflog import Listener
from migrate.kernel.segment import Segment, fix_checksums
from tests.fix_netns import Host, LanFactory
from tests.kernel.pairs import numbers, pair, unprivileged
from tests.waiting import until

TABLE = "table inet t { chain in { type filter hook prerouting priority -300; udp dport 7 log group %d; }; }"


def listening(host: Host, group: int | None = None) -> Listener:
    with host.entered():
        return Listener(group)


@pytest.fixture
def host(lan: LanFactory) -> Host:
    return lan("a").host("a")


@contextlib.contextmanager
def udp(host: Host) -> Iterator[socket.socket]:
    """A socket that sends to this host's port 7, where rules log."""
    with host.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.connect(("127.0.0.1", 7))
        yield sock


def send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionRefusedError):  # for what was sent before
        sock.send(data)
        return
    sock.send(data)


def test_packets_come_whole_in_order_and_without_delay(host: Host) -> None:
    with listening(host) as listener, udp(host) as sock:
        host.run(["nft", TABLE % listener.group])
        assert listener.read() == []
        delays = []
        for number in range(20):
            before = time.monotonic()
            send(sock, bytes((number,)) * (100 * number))
            assert select.select([listener], [], [], 10)[0] == [listener]
            delays.append(time.monotonic() - before)
            (packet,) = listener.read()
            assert packet[9] == socket.IPPROTO_UDP
            assert packet[28:] == bytes((number,)) * (100 * number)
        assert sorted(delays)[10] < 0.02  # NFLOG's own timer would wait a second
        for number in range(100):
            send(sock, bytes((number,)))
        assert [packet[28] for packet in listener.read()] == list(range(100))
        assert listener.lost == 0
        host.run(["ping", "-c", "1", "127.0.0.1"])
        assert listener.read() == []  # what no rule logged


def test_a_packet_beyond_the_limit_of_an_attribute_is_cut(lan: LanFactory) -> None:
    host = lan("a").host("a")
    host.sysctl("net.ipv4.tcp_rmem", "4096 400000 600000")
    payload = random.Random(3).randbytes(65_483)  # with timestamps a packet of 65,535 bytes, the most that IPv4 can
    with listening(host) as listener, pair(host, host, "IPv4") as ends:
        ends.client.sendall(b"x")  # the answer opens the window: a segment is at most half of it
        assert ends.server.recv(1) == b"x"
        rule = f"tcp dport {ends.flow.local_port} tcp flags & (psh|ack) == psh|ack"
        seq, _ = numbers(ends.client)
        host.run(["nft", f"table inet t {{ chain in {{ type filter hook prerouting priority -300; {rule} "
                  f"log group {listener.group} drop; }}; }}"])  # fmt: skip
        ends.client.sendall(payload)
        packet = until(listener.read)[0]
    assert len(packet) == 65_531
    assert int.from_bytes(packet[2:4]) == 65_535
    segment = Segment.parse(fix_checksums(packet))
    assert (segment.seq, segment.payload) == (seq, payload[:-4])


def test_what_does_not_fit_is_counted_and_the_rest_comes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nflog, "_RECEIVE_BUFFER", 20_000)
    with listening(host) as listener, udp(host) as sock:
        host.run(["nft", TABLE % listener.group])
        for number in range(300):
            send(sock, number.to_bytes(2) * 500)
        first = [int.from_bytes(packet[28:30]) for packet in listener.read()]
        send(sock, (300).to_bytes(2))
        after = [int.from_bytes(packet[28:30]) for packet in listener.read()]
    assert first == list(range(len(first)))
    assert 0 < len(first) < 300
    assert after == [300]
    assert listener.lost == 300 - len(first)


def test_a_group_has_one_listener(host: Host, lan: LanFactory) -> None:
    with listening(host, 7) as listener:
        assert listener.group == 7
        with pytest.raises(Conflict, match="NFLOG group 7 is in use by another process"):
            listening(host, 7)
        with listening(lan("b").host("b"), 7):
            pass  # groups belong to a network namespace
    with listening(host, 7):
        pass


def test_a_free_group_is_found(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = iter([7, 7, 8])
    monkeypatch.setattr(random, "randint", lambda *_: next(wishes))
    with listening(host) as first, listening(host) as second:
        assert (first.group, second.group) == (7, 8)
        monkeypatch.setattr(random, "randint", lambda *_: 7)
        with pytest.raises(Conflict, match="no free NFLOG group"):
            listening(host)


def test_a_listener_belongs_to_the_namespace_it_was_made_in(lan: LanFactory) -> None:
    net = lan("a", "b")
    a, b = net.host("a"), net.host("b")
    with listening(a, 7) as listener, udp(a) as here, udp(b) as there:
        a.run(["nft", TABLE % 7])
        b.run(["nft", TABLE % 7])
        with b.entered():
            send(there, b"there")
            send(here, b"here")
            assert [packet[28:] for packet in listener.read()] == [b"here"]


def test_closing_leaves_the_group_and_twice_is_once(host: Host) -> None:
    listener = listening(host, 7)
    listener.close()
    listener.close()
    assert listener.fileno() == -1
    listening(host, 7).close()


def test_failures_are_explained(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt() -> object:
        return listening(host, 7)

    with monkeypatch.context() as patch:
        patch.setattr(nflog, "NFNL_SUBSYS_ULOG", 99)  # a kernel without NFLOG knows no such subsystem
        with pytest.raises(HostError, match="modprobe nfnetlink_log"):
            attempt()
    with monkeypatch.context() as patch:
        patch.setattr(nflog, "NFULNL_CFG_CMD_BIND", 77)
        with pytest.raises((KernelError, HostError)):
            attempt()
    assert unprivileged(Listener).startswith("PrivilegeError: listening to NFLOG group ")
