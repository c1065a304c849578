"""Many restored at once are as those restored one by one, nobody speaks too early, and io_uring may be missing."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from migrate import rebuild
from migrate.bulk import dump_many, release_many
from migrate.checkpoint import dump, thaw
from migrate.errors import Conflict, Error, HostError, PrivilegeError
from migrate.ici import Ici
from migrate.kernel import batch, netns, option_values, options, sockopt, uring
from migrate.kernel.batch import Batch
from migrate.kernel.option_table import BY_NAME, OPTIONS, Phase
from migrate.kernel.uring import Ring, Values, setsockopt
from migrate.restore import Restored, to_push
from tests.fix_netns import LanFactory
from tests.kernel.test_bulk import liven, pairs
from tests.peers import connect

__all__ = ["pairs"]

# Time goes on; the path is learnt anew; what was never sent, and some options, come when it is activated.
CHANGES = {"origin_time", "ts_value", "srtt_us", "rttvar_us", "cwnd", "ssthresh", "mss", "options"}

Pairs = list[tuple[socket.socket, socket.socket]]


@pytest.fixture(params=["together", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With io_uring, and as on a host that does not allow it."""
    state = batch._Shared()
    state.able = request.param == "together"
    monkeypatch.setattr(batch, "_shared", state)
    yield request.param
    assert (batch.shared() is not None) == (request.param == "together")
    state.forget()


def taken(pairs: Pairs) -> list[Ici]:
    """The records of our ends, which are released."""
    ours = [near for _, near in pairs]
    records = [record for record in dump_many(ours) if isinstance(record, Ici)]
    assert len(records) == len(ours)
    assert release_many(ours) == [None] * len(ours)
    for sock in ours:
        with pytest.raises(ConnectionAbortedError):
            sock.send(b"?")
    return records


def test_restored_as_one_by_one(pairs: Pairs, way: str) -> None:
    """What is dumped from the silent sockets is what they were made from; then they talk."""
    liven(pairs)
    records = taken(pairs)
    arrived = [sockopt.received_length(far) for far, _ in pairs]
    assert {bool(each.received) for each in records} == {bool(each.unsent) for each in records} == {False, True}
    with netns.entered_with(pairs[0][1]):
        silent = rebuild.restore_many(records, activate=False)
    for sock, record in zip(silent, records, strict=True):
        assert isinstance(sock, socket.socket)
        assert sockopt.in_repair(sock)
        again = msgspec.structs.asdict(dump(sock))
        before = msgspec.structs.asdict(record)
        unlike = {name: (again[name], value) for name, value in before.items() if again[name] != value}
        assert unlike.keys() <= CHANGES, unlike
    assert rebuild.activate_many([sock for sock in silent if isinstance(sock, socket.socket)]) == [None] * len(silent)
    for number, ((far, _), sock, record) in enumerate(zip(pairs, silent, records, strict=True)):
        assert isinstance(sock, socket.socket)
        with sock:
            assert received(sock, len(record.received)) == bytes(record.received)
            sock.sendall(b"!")
            wanted = bytes(arrived[number]) + bytes(record.sent) + bytes(record.unsent) + b"!"
            assert received(far, len(wanted)) == wanted
            assert (sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0) == (number % 5 == 4)
            assert sockopt.congestion(sock) == record.congestion


def test_what_may_leave_leaves_at_once(pairs: Pairs, way: str) -> None:
    """What was never sent goes with the activation, not with the peer's answer to its probe; or stays if it has to."""
    records = [
        msgspec.structs.replace(
            record,
            unsent=b"left",
            snd_wnd=0 if number % 3 == 1 else record.snd_wnd,
            options={**record.options, "TCP_CORK": 1} if number % 3 == 2 else record.options,
        )
        for number, record in enumerate(taken(pairs))
    ]
    with netns.entered_with(pairs[0][1]):
        silent = [sock for sock in rebuild.restore_many(records, activate=False) if isinstance(sock, Restored)]
    for sock in silent:
        option_values.put(sock, BY_NAME["SO_ATTACH_FILTER"], struct.pack("!HBBI", 0x06, 0, 0, 0))  # nothing passes
    assert rebuild.activate_many(silent) == [None] * len(records)
    assert [sockopt.unsent_length(sock) for sock in silent] == [(0, 4, 4)[number % 3] for number in range(len(records))]
    assert all(received(far, 4) == b"left" for far, _ in pairs[::3])
    for sock in silent:
        sock.close()


@pytest.mark.parametrize(
    ("sent", "unsent", "window", "pushed"),
    [
        (0, 0, 9000, False),  # there is nothing
        (0, 5000, 1448, True),  # a whole segment may leave
        (0, 5000, 1447, False),  # only a part of one
        (0, 100, 100, True),  # all of it
        (0, 100, 99, False),
        (1000, 100, 1100, True),  # behind what is in flight
        (1000, 100, 1099, False),
        (9000, 100, 500, False),  # the peer has shrunk its window
    ],
)
def test_what_may_leave(pairs: Pairs, sent: int, unsent: int, window: int, pushed: bool) -> None:
    """As the kernel judges it by the peer's window; a corked connection waits."""
    (record,) = taken(pairs[:1])
    record = msgspec.structs.replace(record, sent=bytes(sent), unsent=bytes(unsent), snd_wnd=window, mss=1448)
    assert to_push(record) == pushed
    assert not to_push(msgspec.structs.replace(record, options={"TCP_CORK": 1}))


def test_options_of_many(lan: LanFactory, way: str) -> None:
    """Every option that one connection can have, on all of them; and one that cannot be set here is named."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    pairs = [connect(client, a, a.ip4) for _ in range(20)]
    table = [
        each for each in OPTIONS if each.readable and each.family in (0, 4) and each.phase is not Phase.UNCONNECTED
    ]
    for _, near in pairs:
        for option in table:
            with contextlib.suppress(OSError):  # this kernel has none, or not for a connection
                option_values.put(near, option, option.sample)
    records = taken(pairs)
    assert len(records[0].options) > 60
    records = [
        msgspec.structs.replace(each, options={**each.options, "SO_BINDTODEVICE": b"elsewhere", "TCP_NEVER": 1})
        for each in records
    ]
    with netns.entered_with(pairs[0][1]):
        restored = rebuild.restore_many(records)
    for sock, record in zip(restored, records, strict=True):
        assert isinstance(sock, Restored)
        wanted = {name: value for name, value in record.options.items() if name not in sock.unset}
        assert set(sock.unset) >= {"SO_BINDTODEVICE", "TCP_NEVER"}
        assert len(wanted) > 60
        found = options.read(sock)
        assert {name: (found.get(name), value) for name, value in wanted.items() if found.get(name) != value} == {}
        sock.close()
    for ends in pairs:
        for end in ends:
            end.close()


def received(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(5)
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data))
    return data


def test_each_says_what_is_wrong_with_it(pairs: Pairs, way: str) -> None:
    """One exists, one's address is elsewhere, the others live."""
    records = taken(pairs)
    elsewhere = msgspec.structs.replace(records[1], local=bytes(len(records[1].local) - 1) + b"\x63")
    with netns.entered_with(pairs[0][1]):
        results = rebuild.restore_many([records[0], records[0], elsewhere, *records[2:]])
    assert [type(each) for each in results[1:3]] == [Conflict, HostError]
    assert not any(isinstance(each, Error) for each in [results[0], *results[3:]])
    for sock in results:
        if isinstance(sock, socket.socket):
            sock.close()


def test_without_privilege_no_segment_leaves(lan: LanFactory, way: str) -> None:
    """Where repair mode is refused, a connect() would begin a handshake."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    far, near = connect(client, a, a.ip4)
    record = dump(near)
    thaw(near, record)
    with client.entered():
        listener = socket.create_server((client.ip4, 0))
    copies = [
        msgspec.structs.replace(record, remote_port=listener.getsockname()[1], local_port=40000 + number)
        for number in range(10)
    ]
    child = os.fork()
    if not child:
        try:
            with a.entered():
                os.setresuid(65534, 65534, 65534)
                results = rebuild.restore_many(copies)
                os._exit(0 if all(isinstance(each, PrivilegeError) for each in results) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        listener.accept()
    for sock in (far, near, listener):
        sock.close()


def test_out_of_descriptors(pairs: Pairs, way: str) -> None:
    """Half of a batch finds room: the others say what helps."""
    records = taken(pairs)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with netns.entered_with(pairs[0][1]):
        batch.shared()
        full = [os.dup(0) for _ in range(100)]
        for descriptor in full[:5]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(full) + 1, hard))
        try:
            results = rebuild.restore_many(records)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in full[5:]:
                os.close(descriptor)
    errors = [each for each in results if isinstance(each, Error)]
    assert 0 < len(errors) < len(records)
    assert all("ulimit" in str(each) for each in errors)
    for sock in results:
        if isinstance(sock, socket.socket):
            sock.close()


def test_a_ring_that_puts_calls_off_is_given_up() -> None:
    """What did not come back may still be made, some time: nobody uses that ring any more."""
    ring = Ring(8)
    values = Values(struct.Struct("=i"), b"", 2)
    program = ring.program([setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0)], values, 2)
    with socket.socket() as one, socket.socket() as other:
        values.put(0, 3)
        values.put(4, 5)
        assert program.run([one.fileno(), other.fileno()]) is None
        assert [each.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) for each in (one, other)] == [3, 5]
        values.put(4, 10_000_000)
        assert program.run([one.fileno(), -1]) == {1: errno.EBADF}
        assert not ring.closed
        program._finished[1] = program._finished[2]  # as if one had not come back
        assert (program.run([one.fileno()]) or {})[-1] == errno.EAGAIN
        assert ring.closed
        assert program.run([one.fileno()]) == {-1: errno.EBADF}


def test_more_than_the_ring_has_room_for_at_once() -> None:
    """Entries are used again and again, at every place of the ring."""
    ring = Ring(16)
    values = Values(struct.Struct("=i"), b"", 5)
    program = ring.program(
        [setsockopt(socket.SOL_SOCKET, option, 0) for option in (socket.SO_PRIORITY, socket.SO_RCVLOWAT)], values, 5
    )
    with socket.socket() as sock:
        for number in range(1, 100):
            for place in range(1 + number % 5):
                values.put(4 * place, 1 + (number + place) % 6)
            assert program.run([sock.fileno()] * (1 + number % 5)) is None
            wanted = 1 + (number + number % 5) % 6
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == wanted
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == wanted
    ring.close()


def test_a_child_makes_its_own() -> None:
    """A ring's memory is shared with a forked child, so that two would write into it."""
    assert batch.shared() is not None
    child = os.fork()
    if not child:
        os._exit(0 if batch._shared.batch is None and batch.shared() is not None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_host_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear reason, and everything goes on one by one."""
    monkeypatch.setattr(uring, "_SETUP", 0xFFFF)
    with pytest.raises(HostError, match="io_uring cannot be used here"):
        Batch()
    state = batch._Shared()
    assert state.get() is None


def test_where_no_port_is_left(lan: LanFactory) -> None:
    """Repair mode shares ports: a connection comes back beside a listener on its port, when no port is free."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    far, near = connect(client, a, a.ip4)
    record = dump(near)
    near.close()
    a.run(["sysctl", "-qw", f"net.ipv4.ip_local_port_range={record.local_port} {record.local_port}"])
    with a.entered():
        taker = socket.create_server(("0.0.0.0", record.local_port), reuse_port=False)
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("0.0.0.0", 0))
        restored = rebuild.restore_many([record])[0]
    assert isinstance(restored, Restored)
    far.sendall(b"?")
    assert received(restored, 1) == b"?"
    for sock in (far, taker, restored):
        sock.close()
