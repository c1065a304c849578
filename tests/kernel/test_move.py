"""A connection dumped on one host lives on at another: queues, states, negotiated options, both families.

Each test ends the connection properly on the new host, with the peer's kernel as the judge.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import migrate
from migrate.kernel import sockopt, tcpinfo, uapi
from migrate.tcpstate import TcpState
from tests.fix_netns import Lan, LanFactory
from tests.moving import Mover
from tests.peers import Peer, connect, digest, noise
from tests.waiting import until

MEBI = 1 << 20

Prepare = Callable[[socket.socket], None]  # sets options before a connection is made


@pytest.fixture(params=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Moved:
    """A client, and a server's socket that a mover carries between the hosts a and b."""

    def __init__(self, net: Lan, mover: Mover, address: str, prepare: Prepare | None) -> None:
        self.net, self.mover = net, mover
        self.client, self.server = connect(net.host("client"), net.host("a"), address, prepare=prepare)

    def move(self) -> None:
        self.server = self.mover.move(self.server)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def moved(lan: LanFactory, family: str) -> Iterator[Callable[..., Moved]]:
    """``moved(prepare=…, mtu=…)``: a connection from the client to the floating address at a, over ``family``."""
    with contextlib.ExitStack() as stack:

        def make(
            prepare: Prepare | None = None,
            *,
            mtu: int = 1500,
            sysctl: dict[str, int | str] | None = None,
        ) -> Moved:
            net = lan("client", "a", "b", mtu=mtu)
            for host in net.hosts.values():
                for name, value in (sysctl or {}).items():
                    host.sysctl(name, value)
            address = net.vip4 if family == "ipv4" else net.vip6
            mover = stack.enter_context(Mover(net.host("a"), net.host("b"), address))
            made = Moved(net, mover, address, prepare)
            stack.callback(made.close)
            return made

        yield make


def exchange(moved: Moved, length: int = 300_000) -> None:
    """Bytes both ways at once, whole and in order."""
    ends = [
        Peer(moved.client, send=length, receive=length, seed=1),
        Peer(moved.server, send=length, receive=length, seed=2),
    ]
    for end in ends:
        end.join()
    assert [end.received_digest for end in ends] == [digest(noise(2), length), digest(noise(1), length)]


def ends_well(moved: Moved) -> None:
    """Both sides close in turn; the client's kernel goes through the states to the end."""
    moved.server.shutdown(socket.SHUT_WR)
    assert moved.client.recv(1) == b""
    moved.client.close()
    until(lambda: moved.server.recv(1) == b"", what="the client's FIN")
    moved.server.close()


def test_an_idle_connection_moves_and_comes_back(moved: Callable[..., Moved]) -> None:
    it = moved()
    port = it.client.getsockname()[1]
    with it.net.capture("client") as capture:
        for _ in range(3):
            it.move()
            exchange(it)
        ends_well(it)
    assert it.server.fileno() == -1
    assert not capture.rsts
    assert {segment.flow[1] for segment in capture.segments} >= {port}


def test_unread_bytes_move(moved: Callable[..., Moved]) -> None:
    it = moved(lambda sock: sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 4 * MEBI))
    peer = Peer(it.client, send=2 * MEBI, receive=0)
    peer.join()
    until(lambda: sockopt.received_length(it.server) == 2 * MEBI)
    it.move()
    assert it.mover.record and len(it.mover.record.received) == 2 * MEBI
    reader = Peer(it.server, receive=2 * MEBI)
    reader.join()
    assert reader.received_digest == digest(noise(), 2 * MEBI)
    exchange(it)
    ends_well(it)


@pytest.mark.parametrize("dies", [False, True], ids=["", "whoever restores it dies when it has left repair mode"])
def test_bytes_that_a_shut_window_kept_here_move(
    moved: Callable[..., Moved], dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dies:
        monkeypatch.setattr(migrate, "activate", partial(sockopt.leave_repair, probe=True))
    it = moved(lambda sock: sock.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, 4 * MEBI))
    it.server.setblocking(False)
    data = b"".join(block for block, _ in zip(noise(3), range(32), strict=False))
    assert it.server.send(data) == 2 * MEBI, "the buffer was made for that"
    info = tcpinfo.reader("notsent_bytes", "snd_wnd")
    until(lambda: _stalled(it.server), what="the peer's window is full")
    it.move()
    assert it.mover.record
    assert len(it.mover.record.sent) + len(it.mover.record.unsent) > MEBI
    assert len(it.mover.record.unsent) >= info(sockopt.tcp_info(it.server))[0] > MEBI // 2
    reader = Peer(it.client, receive=2 * MEBI)
    reader.join()
    assert reader.received_digest == digest(noise(3), 2 * MEBI)
    it.server.setblocking(True)
    exchange(it)
    ends_well(it)


def _stalled(sock: socket.socket) -> bool:
    """All that the peer's window admits is sent and acknowledged."""
    return sockopt.unsent_length(sock) > 0 and sockopt.unsent_length(sock) == sockopt.outstanding_length(sock)


@pytest.mark.parametrize("unread", [0, 5000])
def test_half_closed_by_the_peer(moved: Callable[..., Moved], unread: int) -> None:
    it = moved()
    if unread:
        it.client.send(bytes(unread))
    it.client.shutdown(socket.SHUT_WR)
    until(lambda: sockopt.state(it.server) == TcpState.CLOSE_WAIT)
    it.move()
    assert sockopt.state(it.server) == TcpState.CLOSE_WAIT
    assert len(it.server.recv(65536)) == unread
    assert it.server.recv(1) == b""
    sender = Peer(it.server, send=MEBI, receive=0, close_after=True)
    reader = Peer(it.client)
    for end in (sender, reader):
        end.join()
    assert reader.received_digest == digest(noise(), MEBI)
    until(lambda: sockopt.state(it.server) in (TcpState.CLOSED, TcpState.LAST_ACK))


@pytest.mark.parametrize(
    "sysctl", [{"net.ipv4.tcp_timestamps": 0}, {"net.ipv4.tcp_sack": 0}, {"net.ipv4.tcp_window_scaling": 0}], ids=str
)
def test_without_an_option(moved: Callable[..., Moved], sysctl: dict[str, int]) -> None:
    it = moved(sysctl=sysctl)
    exchange(it)
    before = options(it.server)
    it.move()
    assert options(it.server) == before
    exchange(it)
    ends_well(it)


def options(sock: socket.socket) -> tuple[int, ...]:
    """What was negotiated, as the kernel tells it."""
    return tcpinfo.reader("options", "wscales")(sockopt.tcp_info(sock))


@pytest.mark.parametrize("scale", [0, 14])
def test_window_scale(moved: Callable[..., Moved], scale: int) -> None:
    """The scale follows from the largest window that a socket could ever offer."""

    def prepare(sock: socket.socket) -> None:
        if scale == 0:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 32767)

    it = moved(prepare, sysctl={"net.ipv4.tcp_rmem": "4096 131072 2147483647"})
    assert tcpinfo.scales(options(it.server)[1]) == (scale, scale)
    before = options(it.server)
    it.move()
    assert options(it.server) == before
    exchange(it)
    ends_well(it)


@pytest.mark.parametrize(("mtu", "mss"), [(1500, 536), (9000, 9000 - 52)])
def test_segments_are_as_large_as_before(moved: Callable[..., Moved], family: str, mtu: int, mss: int) -> None:
    def prepare(sock: socket.socket) -> None:
        if mss == 536:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)

    it = moved(prepare, mtu=mtu)
    exchange(it)
    read = tcpinfo.reader("snd_mss")
    before = read(sockopt.tcp_info(it.server))
    it.move()
    assert read(sockopt.tcp_info(it.server)) == before
    exchange(it)
    assert read(sockopt.tcp_info(it.server)) == before
    assert before[0] <= mss
    ends_well(it)


def test_sequence_numbers_wrap(moved: Callable[..., Moved]) -> None:
    """Both directions pass 2**32 between two moves: sockets are made in repair mode just before it."""
    it = moved()
    it.server, it.client = wrapped(it)
    exchange(it)
    it.move()
    assert it.mover.record and it.mover.record.snd_una < 1 << 31, "it wrapped"
    exchange(it)
    ends_well(it)


def wrapped(it: Moved) -> tuple[socket.socket, socket.socket]:
    """The same connection with both sequence numbers set 100 kB before their end."""
    near = (1 << 32) - 100_000
    server, client = migrate.dump(it.server), migrate.dump(it.client)
    for record in (server, client):
        record.snd_wl1 = record.rcv_wup = record.rcv_nxt = record.snd_una = near
    it.server.close()
    it.client.close()
    made = []
    for record, host in ((server, it.mover.here), (client, it.net.host("client"))):
        with host.entered():
            made.append(migrate.restore(record))
    return made[0], made[1]


def test_a_dump_that_is_thawed_changes_nothing(moved: Callable[..., Moved]) -> None:
    it = moved()
    it.server.send(b"x" * 10)
    it.client.send(b"y" * 10)
    until(lambda: sockopt.received_length(it.server) == 10)
    migrate.dump(it.server)
    migrate.thaw(it.server)
    assert it.server.recv(100) == b"y" * 10
    assert it.client.recv(100) == b"x" * 10
    exchange(it)
    ends_well(it)


def test_a_released_socket_says_so_to_its_owner(moved: Callable[..., Moved]) -> None:
    it = moved()
    with it.net.capture("client") as capture:
        migrate.dump(it.server)
        migrate.release(it.server)
        with pytest.raises(ConnectionAbortedError):
            it.server.recv(1)
        it.server.close()
    assert not capture.rsts
    assert not [segment for segment in capture.segments if segment.flags & 1]


def test_a_discarded_socket_leaves_the_record_usable(moved: Callable[..., Moved]) -> None:
    it = moved()
    with it.net.capture("client") as capture:
        record = migrate.dump(it.server)
        migrate.release(it.server)
        it.server.close()
        with it.mover.here.entered():
            migrate.discard(migrate.restore(record, activate=False))
            it.server = migrate.restore(record)
        exchange(it)
        ends_well(it)
    assert not capture.rsts


def test_buffers_grow_again_after_a_move(moved: Callable[..., Moved]) -> None:
    """SO_RCVBUF and SO_SNDBUF are not locked: the kernel tunes them as before."""
    it = moved(lambda sock: None)
    it.client.send(bytes(60_000))
    until(lambda: sockopt.received_length(it.server) == 60_000)
    it.move()
    assert it.server.getsockopt(socket.SOL_SOCKET, uapi.SO_BUF_LOCK) == 0
    assert it.server.recv(60_000, socket.MSG_WAITALL)
    before = it.server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    exchange(it, 30 * MEBI)
    assert it.server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > before
