"""The states without a connection that could be repaired: LISTEN with what waits in it, CLOSED, SYN_SENT, TIME_WAIT."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import pytest

import migrate
from migrate import quarantine, unconnected
from migrate.errors import Refused
from migrate.kernel import diag, netns, options, sockopt
from migrate.kernel.segment import TIMESTAMP, Segment
from migrate.tcpstate import REBUILD, TcpState, Way
from tests.e2e.test_states import Field, field, prepare
from tests.lives import FAMILIES, Life, judge, option_values_of
from tests.waiting import until

__all__ = ["field"]

families = pytest.mark.parametrize("family", FAMILIES)


def test_every_state_has_its_tests() -> None:
    """test_states.py has those that are repaired or connected again; these are here."""
    here = {TcpState.CLOSED, TcpState.LISTEN, TcpState.SYN_RECEIVED, TcpState.TIME_WAIT}
    assert here == {state for state, plan in REBUILD.items() if plan.way not in (Way.REPAIR, Way.CONNECT)}


# CLOSED


def reset(life: Life) -> None:
    life.passive(prepare)
    life.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    life.peer.close()


def finished(life: Life) -> None:
    """By way of LAST_ACK."""
    life.passive(prepare)
    life.peer.shutdown(socket.SHUT_WR)
    until(lambda: life.state() is TcpState.CLOSE_WAIT)
    life.ours.shutdown(socket.SHUT_WR)


def finished_first(life: Life) -> None:
    """By way of TIME_WAIT, which goes on without the socket."""
    life.passive(prepare)
    life.ours.shutdown(socket.SHUT_WR)
    until(lambda: life.state() is TcpState.FIN_WAIT_2)
    life.peer.shutdown(socket.SHUT_WR)


@families
@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("how", [reset, finished, finished_first], ids=lambda how: how.__name__)
def test_a_connection_that_ended(field: Field, how: Callable[[Life], None], family: str, full: bool) -> None:
    with field.life(family, full=full) as life:
        how(life)
        until(lambda: sockopt.state(life.ours) == TcpState.CLOSED)
        name, chosen = life.ours.getsockname(), option_values_of(life.ours)
        seen = len(life.wire.segments)
        life.move()
        assert sockopt.state(life.ours) == TcpState.CLOSED
        assert life.ours.getsockname() == name
        assert option_values_of(life.ours) == chosen
        assert life.ours.recv(1 << 20) == life.expected_by_us if full else True
        if how is reset:
            with pytest.raises(ConnectionResetError):
                life.ours.recv(1)
        assert life.ours.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            life.ours.send(b"x")
        assert not [each for each in life.wire.segments[seen:] if each.source == life.four_tuple.local]
        assert life.state() is (TcpState.TIME_WAIT if how is finished_first else TcpState.CLOSED)


@families
@pytest.mark.parametrize("bound", [False, True], ids=["fresh", "bound"])
def test_never_connected(field: Field, family: str, bound: bool) -> None:
    with field.life(family) as life:
        life.ours.close()
        life.ours = life.fresh(life.mover.here)
        prepare(life.ours)
        life.ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bound:
            life.ours.bind((life.address, 0))
        name = life.ours.getsockname()
        life.name(name[1] or 1, 9)
        chosen = options.read(life.ours, connected=False)
        life.move()
        assert life.ours.getsockname() == name
        assert options.read(life.ours, connected=False) == chosen
        life.ours.listen()
        if bound:
            life.listener, life.ours = life.ours, socket.socket()
            life.peer_connects()
            life.accept()
            life.send(b"it can be used")
            life.deliver()


# SYN_SENT


@families
def test_a_syn_that_was_lost_is_repeated(field: Field, family: str) -> None:
    with field.life(family) as life:
        life.connect(prepare)
        life.move()
        assert life.state() is TcpState.SYN_SENT
        life.peer_accepts(again=True)
        until(lambda: life.state() is TcpState.ESTABLISHED)
        life.send(b"x" * 1000)
        life.deliver()
        judge(life.wire.segments, life.four_tuple, closed=False)


def test_a_refused_connection_is_refused_there_too(field: Field) -> None:
    with field.life("ipv4") as life:
        life.connect()
        assert life.listener
        life.listener.close()
        life.move()
        life.hear()
        until(lambda: life.ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0, what="a RST for the SYN")
        assert life.state() is TcpState.CLOSED


# LISTEN and SYN_RECEIVED


class Waiting:
    """A listener, the connections that its owner has not accepted, and their peers."""

    def __init__(self, life: Life, stack: contextlib.ExitStack, count: int) -> None:
        self.life = life
        self.peers: list[socket.socket] = []
        self.names: list[migrate.FourTuple] = []
        for number in range(count):
            self.connect(stack)
            self.peers[-1].send(b"request %d" % number)
        until(lambda: unconnected.waiting(self.listener) == count, what="they wait")

    @property
    def listener(self) -> socket.socket:
        assert self.life.listener
        return self.life.listener

    def connect(self, stack: contextlib.ExitStack, *, deaf: bool = False) -> None:
        self.life.peer = socket.socket()
        if deaf:
            self.life.peer_connects(deaf=True)
        else:
            self.life.peer_connects()
        self.names.append(self.life.four_tuple)
        self.peers.append(stack.enter_context(self.life.peer))
        if not deaf:
            until(lambda: self.life.peer_state() is TcpState.ESTABLISHED)

    def move(self, taken: list[socket.socket]) -> list[socket.socket]:
        """The listener and what was taken from it, to the other host."""
        mover = self.life.mover
        tuples = [migrate.FourTuple.parse(name) for name in map(str, self.names)]
        with (
            migrate.hold(tuples, netns=mover.here.netns) as before,
            migrate.hold(tuples, netns=mover.there.netns) as after,
        ):
            socks = [self.listener, *taken]
            records = [migrate.Ici.decode(migrate.dump(sock).encode()) for sock in socks]
            mover.move_address()
            with netns.entered(mover.here.netns):
                restored = [migrate.restore(record, activate=False) for record in records]
            for sock in socks:
                migrate.release(sock)
                sock.close()
            after.keep(packet for packets in before.take().values() for packet in packets)
            for sock in restored:
                migrate.activate(sock)
        self.life.listener = restored[0]
        return restored[1:]


def some_options(sock: socket.socket) -> None:
    prepare(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1200)
    sock.setsockopt(socket.IPPROTO_TCP, 23, 5)  # TCP_FASTOPEN
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 60_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


@families
@pytest.mark.parametrize("count", [0, 3], ids=["idle", "three"])
def test_a_listener_with_what_waits_in_it(field: Field, family: str, count: int) -> None:
    with field.life(family) as life, contextlib.ExitStack() as stack:
        life.listen(some_options)
        it = Waiting(life, stack, count)
        before = options.read(it.listener, connected=False), it.listener.getsockname(), life.backlog()
        unconnected.settle(it.listener)
        taken = list(unconnected.accepted(it.listener))
        assert len(taken) == count
        moved = it.move(taken)
        assert (options.read(it.listener, connected=False), it.listener.getsockname(), life.backlog()) == before
        for number, sock in enumerate(moved):
            stack.enter_context(sock)
            assert sock.recv(100) == b"request %d" % number
            assert "SO_ATTACH_FILTER" not in options.read(sock)
            sock.send(b"answer")
            it.peers[number].settimeout(10)
            assert it.peers[number].recv(100) == b"answer"
        life.peer = stack.enter_context(socket.socket())
        life.peer_connects()
        life.accept()
        assert life.ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        for name in (*it.names, life.four_tuple):
            judge(life.wire.segments, name, closed=False)


@families
def test_a_handshake_is_waited_for(field: Field, family: str) -> None:
    """SYN_RECEIVED: the peer's ACK comes late, its connection moves nevertheless."""
    with field.life(family) as life, contextlib.ExitStack() as stack:
        life.listen()
        it = Waiting(life, stack, 0)
        it.connect(stack, deaf=True)
        until(lambda: life.state() is TcpState.SYN_RECEIVED)
        with pytest.raises(Refused, match="1 handshakes are unfinished"):
            unconnected.settle(it.listener, seconds=0.05)
        life.hear()
        unconnected.settle(it.listener)
        taken = list(unconnected.accepted(it.listener))
        (sock,) = it.move(taken)
        stack.enter_context(sock)
        it.peers[0].send(b"late")
        sock.settimeout(10)
        assert sock.recv(10) == b"late"
        judge(life.wire.segments, it.names[0], closed=False)


def test_the_owner_may_accept_it_all_first(field: Field) -> None:
    with field.life("ipv4") as life, contextlib.ExitStack() as stack:
        life.listen()
        it = Waiting(life, stack, 1)
        with pytest.raises(Refused, match="1 connections not accepted"):
            unconnected.settle(it.listener, seconds=0.05, owner_accepts=True)
        stack.enter_context(it.listener.accept()[0])
        unconnected.settle(it.listener, owner_accepts=True)


def test_a_frozen_listener_begins_no_handshake_and_thaws(field: Field) -> None:
    with field.life("ipv4") as life, contextlib.ExitStack() as stack:
        life.listen()
        migrate.dump(life.listener) if life.listener else None
        life.peer_connects()
        until(lambda: len(life.wire.segments) > 0, what="a SYN")
        assert life.state() is TcpState.CLOSED
        assert life.listener
        migrate.thaw(life.listener)
        life.accept()  # by the SYN's repetition
        stack.enter_context(life.listener)
        assert not life.wire.rsts


# TIME_WAIT


@families
def test_time_wait_is_made_anew(field: Field, family: str) -> None:
    """The acknowledgment of the peer's FIN is lost; the FIN's repetition meets TIME_WAIT at the other host."""
    with field.life(family) as life:
        life.passive(prepare)
        life.ours.close()
        until(lambda: life.state() is TcpState.FIN_WAIT_2)
        life.deafen()
        life.peer.shutdown(socket.SHUT_WR)
        until(lambda: life.state() is TcpState.TIME_WAIT)
        lost: list[Segment] = []

        def lose(count: int) -> bool:
            lost.extend(life.missed())
            return len(lost) >= count

        until(lambda: lose(1), what="an acknowledgment that is lost")
        record = the_record(life)
        assert record.family == (4 if family == "ipv4" else 6)
        life.mover.move_address()
        with life.mover.here.entered():
            quarantine.keep_free([record])
        assert life.state() is TcpState.TIME_WAIT
        until(lambda: lose(2), what="an answer of the other host")
        life.hear()
        until(lambda: life.peer_state() is TcpState.CLOSED, what="its FIN is acknowledged")
        judge(life.wire.segments, life.four_tuple)
        first, last = lost[0], lost[-1]
        assert (last.seq, last.ack, last.flags) == (first.seq, first.ack, first.flags)
        ((kind, before),), ((_, after),) = first.options, last.options
        assert kind == TIMESTAMP
        assert after[4:] == before[4:], "the peer's last timestamp"
        assert 0 <= int.from_bytes(after[:4]) - int.from_bytes(before[:4]) < 10_000, "the clock goes on, milliseconds"


def the_record(life: Life) -> migrate.Ici:
    """Of its TIME_WAIT, as it is read at the destination."""
    with life.mover.here.entered():
        found = diag.find(life.four_tuple)
        assert found
        (record,) = quarantine.records([found])
    return migrate.Ici.decode(record.encode())


def test_time_wait_without_numbers_is_a_quarantine(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(code: bytes, target: int) -> bytes:
        raise PermissionError(code, target)

    monkeypatch.setattr("migrate.kernel.bpf.iterated", forbidden)
    with field.life("ipv4") as life:
        finished_first(life)
        until(lambda: life.state() is TcpState.TIME_WAIT)
        record = the_record(life)
        assert not record.mss_clamp and 50_000 < record.time_left <= 60_000
        record.time_left = 2500
        life.mover.move_address()
        port = life.four_tuple.local_port
        with life.mover.here.entered(), socket.create_server((life.address, port)) as listener:
            quarantine.keep_free([record])
            began = time.monotonic()
            life.peer.close()
            with life.client.entered():
                life.peer = socket.socket()
            life.peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            life.peer.bind((life.peer_address, life.four_tuple.remote_port))
            life.peer.settimeout(10)
            life.peer.connect((life.address, port))
            assert time.monotonic() - began > 2.4, "the four-tuple was kept free"
            listener.accept()[0].close()
        assert not life.wire.rsts


def test_a_record_without_numbers_is_not_restored(field: Field) -> None:
    with pytest.raises(Refused, match="TIME_WAIT"):
        migrate.restore(migrate.Ici(4, b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 81, TcpState.TIME_WAIT, 0, 0, time_left=1000))
