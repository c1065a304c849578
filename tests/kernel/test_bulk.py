"""Many at once says the same as one by one, whatever the connections are like; and does without snapshots as well."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest

from migrate import bulk, checkpoint, rebuild
from migrate.checkpoint import dump, release, thaw
from migrate.errors import Conflict, Error, Refused
from migrate.ici import Ici
from migrate.kernel import netns, sockopt, tcpinfo, uapi
from migrate.tcpstate import TcpState
from tests.fix_netns import LanFactory
from tests.peers import connect
from tests.waiting import until

CHANGES = {"origin_time", "ts_value", "snd_wl1", "rcv_wnd", "rcv_wup"}  # from one dump to the next: thawing probes


def unlike(one: Ici, other: Ici) -> dict[str, tuple[object, object]]:
    first, second = msgspec.structs.asdict(one), msgspec.structs.asdict(other)
    for record in (first, second):
        record["options"].pop("TCP_QUICKACK", None)  # a state that the answer to thawing's probe changes
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[bulk._Bulk]:
    """A process that has taken no snapshot yet."""
    state = bulk._Bulk()
    monkeypatch.setattr(bulk, "_bulk", state)
    yield state
    state.forget()


@pytest.fixture(params=["ip4", "ip6", "mapped"])
def pairs(lan: LanFactory, request: pytest.FixtureRequest) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Twenty connections of every sort: (peer's end, our end)."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    made: list[tuple[socket.socket, socket.socket]] = []
    if request.param == "mapped":
        with a.entered():
            listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        with listener:
            for _ in range(20):
                with client.entered():
                    far = socket.create_connection((a.ip4, listener.getsockname()[1]))
                made.append((far, listener.accept()[0]))
    else:
        made += [connect(client, a, getattr(a, request.param)) for _ in range(20)]
    yield made
    for far, near in made:
        far.close()
        near.close()


def liven(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Data unread and unsent, half-closed both ways, options."""
    for number, (far, near) in enumerate(pairs):
        sort = number % 5
        if sort == 1:
            far.send(bytes(3000))
            until(partial(_has_unread, near, 3000))
        if sort == 2:
            near.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, 4 << 20)
            near.send(bytes(1 << 20), socket.MSG_DONTWAIT)
        if sort == 3:
            far.shutdown(socket.SHUT_WR)
            until(partial(_closing, near))
        if sort == 4:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    until(lambda: all(_stalled(near) for _, near in pairs[2::5]))


def _has_unread(sock: socket.socket, length: int) -> bool:
    return sockopt.received_length(sock) == length


def _stalled(sock: socket.socket) -> bool:
    """Nothing is on its way, and no probe of the window (200 ms later) brought a byte across."""
    since = tcpinfo.parse(sockopt.tcp_info(sock)).last_data_sent
    return since > 400 and sockopt.unsent_length(sock) == sockopt.outstanding_length(sock) > 0


def _closing(sock: socket.socket) -> bool:
    return sockopt.state(sock) == TcpState.CLOSE_WAIT


def test_the_same_as_one_by_one(fresh: bulk._Bulk, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    liven(pairs)
    ours = [near for _, near in pairs]
    many = bulk.dump_many(ours)
    assert fresh.trusted
    for sock, record in zip(ours, many, strict=True):
        assert isinstance(record, Ici)
        assert sockopt.in_repair(sock)
        with pytest.raises(OSError, match="Invalid argument"):
            sock.send(b"?")  # no queue is selected that it would enter
        thaw(sock, record)
        alone = dump(sock)
        thaw(sock, alone)
        assert unlike(record, alone).keys() <= CHANGES
        assert abs(record.ts_value - alone.ts_value) < 5000


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize("many", [True, False], ids=["many", "one"])
def test_whoever_was_writing_when_it_froze(
    fresh: bulk._Bulk,
    pairs: list[tuple[socket.socket, socket.socket]],
    monkeypatch: pytest.MonkeyPatch,
    many: bool,
    again: int,
) -> None:
    """A write that has begun may still add to the queue of a frozen socket: it is read again, once."""
    near = pairs[0][1]
    near.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, 4 << 20)
    near.send(bytes(1 << 20), socket.MSG_DONTWAIT)
    until(partial(_stalled, near))
    sent = sockopt.outstanding_length(near) - sockopt.unsent_length(near)
    plain_queue, left = checkpoint.plain_queue, [again]

    def late(sock: socket.socket, which: int, length: int) -> bytes:
        if left[0]:
            left[0] -= 1
            sockopt.select_queue(sock, uapi.TCP_SEND_QUEUE)
            sock.send(b"late")
        return plain_queue(sock, which, length)

    monkeypatch.setattr(checkpoint, "plain_queue", late)
    monkeypatch.setattr(bulk, "_select", lambda *_: False)
    result = bulk.dump_many([sock for _, sock in pairs])[0] if many else _or_error(near)
    if again > 1:
        assert isinstance(result, Refused)
        assert "changed while" in str(result)
        assert not sockopt.in_repair(near)
        return
    assert isinstance(result, Ici)
    assert bytes(result.unsent).endswith(b"late")
    assert len(result.sent) == sent
    assert len(result.sent) + len(result.unsent) == sockopt.outstanding_length(near)


def _or_error(sock: socket.socket) -> Ici | Error:
    try:
        return dump(sock)
    except Error as error:
        return error


def test_what_cannot_move_is_refused_and_untouched(
    fresh: bulk._Bulk, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    assert bulk.prepare()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, uapi.IPPROTO_MPTCP) as multipath,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        results = bulk.dump_many([pairs[0][1], multipath, datagrams, pairs[1][1]])
    assert [type(result) for result in results] == [Ici, Refused, Refused, Ici]
    assert "Multipath" in str(results[1])
    assert "no TCP socket" in str(results[2])


def test_many_live_on_and_one_that_cannot_be_restored_does_not_stop_the_others(
    fresh: bulk._Bulk, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    ours = [near for _, near in pairs]
    records = [record for record in bulk.dump_many(ours) if isinstance(record, Ici)]
    assert len(records) == len(ours)
    for sock in ours:
        release(sock)
    with netns.entered_with(ours[0]):
        first, again, *others = rebuild.restore_many([records[0], *records])
    assert isinstance(again, Conflict)
    for (far, _), moved in zip(pairs, [first, *others], strict=True):
        assert isinstance(moved, socket.socket)
        with moved:
            far.sendall(b"?")
            assert moved.recv(2) == b"?"
            moved.sendall(b"!")
            assert far.recv(2) == b"!"


@pytest.mark.parametrize("why", ["unable", "wrong"])
def test_without_snapshots(
    fresh: bulk._Bulk,
    pairs: list[tuple[socket.socket, socket.socket]],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """A kernel that has no such fields, or whose fields mean something else: the documented calls decide."""
    liven(pairs)
    if why == "unable":
        fresh.able = False
    else:
        right: Callable[..., Ici] = bulk._record

        def wrong(*arguments: object, **more: object) -> Ici:
            record = right(*arguments, **more)
            record.snd_wnd += 1
            return record

        monkeypatch.setattr(bulk, "_record", wrong)
    ours = [near for _, near in pairs]
    many = bulk.dump_many(ours)
    assert not fresh.trusted
    assert fresh.snapshot is None
    for sock, record in zip(ours, many, strict=True):
        assert isinstance(record, Ici)
        thaw(sock, record)
        assert unlike(record, dump(sock)).keys() <= CHANGES
        thaw(sock, record)
