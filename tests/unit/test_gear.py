"""The suite's own gear: it must see what happens, or the other tests prove nothing."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess

import pytest

from tests.capture import ACK, BLOCK, FRAME, Capture, Segment, retransmissions
from tests.fix_netns import NAMED, PREFIX, LanFactory, ip, sweep
from tests.peers import Peer, connect, digest, echo_server, noise
from tests.waiting import until


@pytest.mark.parametrize("family", [4, 6])
def test_capture_sees_every_byte_and_peers_digest_them(lan: LanFactory, family: int) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    address = a.ip4 if family == 4 else a.ip6
    for host in (client, a):
        host.sysctl("net.ipv4.tcp_early_retrans", 0)
    with net.capture(client) as wire:
        here, there = connect(client, a, address)
        with here, there:
            left = Peer(here, send=3_000_000, receive=2_000_000, seed=1)
            right = Peer(there, send=2_000_000, receive=3_000_000, seed=2)
            left.join()
            right.join()
            port = here.getsockname()[1]
    assert left.received_digest == right.sent_digest == digest(noise(2), 2_000_000)
    assert right.received_digest == left.sent_digest == digest(noise(1), 3_000_000)
    assert sum(s.length for s in wire.segments if s.source_port == port) == 3_000_000
    assert sum(s.length for s in wire.segments if s.destination_port == port) == 2_000_000
    assert all(s.outgoing == (s.source_port == port) for s in wire.segments)
    assert wire.retransmissions == wire.rsts == []


def test_capture_counts_resets_and_retransmissions(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    here, there = connect(client, a)
    with here, there, net.capture("client") as wire:
        a.run(
            ["nft", "add table ip t; add chain ip t in { type filter hook input priority 0; }; add rule ip t in drop"]
        )
        here.sendall(b"x" * 10)
        assert until(lambda: {s.length for s in wire.retransmissions}) == {10}
        a.run(["nft", "flush", "ruleset"])
        assert there.recv(10) == b"x" * 10
        here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        here.close()
        assert [s.outgoing for s in wire.rsts] == [True]


@pytest.mark.parametrize("first", [1000, 2**32 - 250])
@pytest.mark.parametrize(
    ("sent", "repeated"),
    [
        ([(0, 100), (100, 100)], []),
        ([(0, 100), (0, 100)], [1]),
        ([(0, 100), (200, 100), (100, 100)], []),  # overtaken
        ([(0, 100), (200, 100), (100, 100), (100, 100)], [3]),
        ([(0, 100), (200, 200), (100, 50), (150, 50), (150, 50)], [4]),
        ([(0, 100), (200, 100), (100, 200)], [2]),  # fills the gap, and more
        ([(0, 100), (200, 100), (400, 100), (100, 100), (300, 100), (500, 100)], []),
        ([(0, 200), (100, 200)], [1]),  # partly new
        ([(0, 100), (99, 0)], []),  # a probe without data
    ],
)
def test_what_is_a_retransmission(sent: list[tuple[int, int]], repeated: list[int], first: int) -> None:
    segments = [
        Segment(i, True, b"", b"", b"", 1, b"", 2, (first + at) % 2**32, 0, ACK, 0, length)
        for i, (at, length) in enumerate(sent)
    ]
    assert [segment.time for segment in retransmissions(segments)] == repeated


def test_a_capture_that_overflowed_says_so(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with echo_server(a) as (_, port), Capture(client.netns, client.dev, frames=BLOCK // FRAME) as wire:
        with client.entered():
            sock = socket.create_connection((a.ip4, port))
        with sock:
            for _ in range(BLOCK // FRAME):
                sock.sendall(b"ping")
                assert sock.recv(4, socket.MSG_WAITALL) == b"ping"
        with pytest.raises(AssertionError, match="missed"):
            print(wire.segments)


def test_a_peer_reports_an_early_end(lan: LanFactory) -> None:
    net = lan("client", "a")
    here, there = connect(net.host("client"), net.host("a"))
    with here, there:
        peer = Peer(here, receive=10)
        there.sendall(b"12345")
        there.close()
        with pytest.raises(AssertionError, match="after 5 of 10 bytes"):
            peer.join()


def test_noise_is_the_same_however_it_is_cut() -> None:
    stream = b"".join(next(n) for n in [noise(5)] for _ in range(3))
    assert digest(noise(5), 150_000) == hashlib.sha256(stream[:150_000]).hexdigest()
    assert digest(noise(6), 150_000) != digest(noise(5), 150_000)


def test_nothing_is_left_of_a_lan(lan: LanFactory) -> None:
    net = lan("client", "a")
    process = net.host("a").popen(["sleep", "60"])
    names = [net.bridge_netns, net.host("client").netns, net.host("a").netns]
    assert all((NAMED / name).exists() for name in names)
    net.close()
    assert process.returncode is not None
    assert not any((NAMED / name).exists() for name in names)


def test_what_a_killed_run_left_is_swept() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    stale, alive = f"{PREFIX}-{process.pid}-0-a", f"{PREFIX}-{os.getpid()}-0-a"
    ip(f"netns add {name}" for name in (stale, alive))
    try:
        sweep()
        assert not (NAMED / stale).exists()
        assert (NAMED / alive).exists()
    finally:
        ip([f"netns del {alive}"])
