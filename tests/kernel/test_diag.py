"""kernel/diag.py and kernel/tcpinfo.py: what the kernel tells about its sockets, against the sockets themselves."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import HostError, KernelError, PrivilegeError
from migrate.fourtuple import FourTuple
from migrate.kernel import diag, netns, option_values, tcpinfo
from migrate.kernel.diag import Connection, Endpoint, Extension, SockDiag
from migrate.tcpstate import TcpState
from tests.fix_netns import Host, LanFactory
from tests.waiting import until

SO_COOKIE = 57
PORT, PORT6 = 8000, 8001


class Pair(NamedTuple):
    """The two ends of a connection within one host."""

    client: socket.socket
    server: socket.socket


class Scene:
    """Connections within one host: 127.0.0.1, ::1, and 127.0.0.2 between IPv4-mapped sockets."""

    def __init__(self, host: Host, stack: contextlib.ExitStack) -> None:
        self.host = host
        with host.entered():
            listener6 = stack.enter_context(
                socket.create_server(("::", PORT6), family=socket.AF_INET6, dualstack_ipv6=True)
            )
            listener4 = stack.enter_context(socket.create_server(("127.0.0.1", PORT)))
            self.v4 = self._pair(stack, listener4, socket.AF_INET, "127.0.0.1")
            self.v6 = self._pair(stack, listener6, socket.AF_INET6, "::1")
            self.mapped = self._pair(stack, listener6, socket.AF_INET6, "::ffff:127.0.0.2")
        self.pairs = [self.v4, self.v6, self.mapped]

    def _pair(
        self, stack: contextlib.ExitStack, listener: socket.socket, family: socket.AddressFamily, address: str
    ) -> Pair:
        client = stack.enter_context(socket.socket(family))
        client.connect((address, listener.getsockname()[1]))
        return Pair(client, stack.enter_context(listener.accept()[0]))


@pytest.fixture
def scene(lan: LanFactory) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(lan("a").host("a"), stack)


def packed(text: str) -> bytes:
    text = text.removeprefix("::ffff:")
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def four_tuple(sock: socket.socket) -> FourTuple:
    (local, local_port), (remote, remote_port) = sock.getsockname()[:2], sock.getpeername()[:2]
    return FourTuple(packed(local), local_port, packed(remote), remote_port)


def listed(host: Host, **filters: object) -> list[Connection]:
    with host.entered():
        return diag.list_connections(**filters)  # type: ignore[arg-type]


def test_all_sockets_are_listed_as_they_are(scene: Scene) -> None:
    scene.v4.client.send(b"x" * 1000)
    scene.mapped.server.send(b"y" * 77)
    found = {connection.inode: connection for connection in listed(scene.host)}
    assert len(found) == 6
    queues = {scene.v4.server: 1000, scene.mapped.client: 77}
    for pair in scene.pairs:
        for sock in pair:
            connection = found[os.fstat(sock.fileno()).st_ino]
            assert connection.four_tuple == four_tuple(sock)
            assert connection.family == (4 if sock.family == socket.AF_INET else 6)
            assert connection.state is TcpState.ESTABLISHED
            assert connection.uid == os.getuid()
            assert connection.recv_queue == queues.get(sock, 0)
            assert connection.send_queue == 0
            assert connection.cookie == struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
            assert (connection.interface, connection.mark, connection.ulp, connection.info) == (0, 0, "", b"")


def test_ipv4_mapped_sockets_have_the_addresses_of_the_wire(scene: Scene) -> None:
    (found,) = listed(scene.host, remote=Endpoint(packed("127.0.0.2")))
    assert (found.family, len(found.four_tuple.local), len(found.four_tuple.remote)) == (6, 4, 4)


def test_unacknowledged_bytes_are_the_send_queue(lan: LanFactory) -> None:
    net = lan("a", "b")
    a, b = net.hosts.values()
    with b.entered():
        listener = socket.create_server((b.ip4, PORT))
    with listener, a.entered(), socket.create_connection((b.ip4, PORT)) as client, listener.accept()[0]:
        b.run(["ip", "link", "set", b.dev, "down"])
        client.send(b"z" * 500)
        (found,) = diag.list_connections(extensions=Extension.INFO)
        assert found.send_queue == 500
        assert found.timer == 1
        assert 0 < found.expires < 5000
        assert tcpinfo.parse(found.info).unacked == 1


def test_states(scene: Scene) -> None:
    listeners = listed(scene.host, states=[TcpState.LISTEN])
    assert sorted(each.family for each in listeners) == [4, 6]
    assert {each.state for each in listeners} == {TcpState.LISTEN}
    scene.v4.client.shutdown(socket.SHUT_WR)
    until(lambda: listed(scene.host, states=[TcpState.FIN_WAIT_2]))  # the acknowledgement may be delayed
    by_state = {
        state: [each.four_tuple for each in listed(scene.host, states=[state])]
        for state in (TcpState.FIN_WAIT_2, TcpState.CLOSE_WAIT, TcpState.LAST_ACK)
    }
    assert by_state == {
        TcpState.FIN_WAIT_2: [four_tuple(scene.v4.client)],
        TcpState.CLOSE_WAIT: [four_tuple(scene.v4.server)],
        TcpState.LAST_ACK: [],
    }
    assert len(listed(scene.host, states=[TcpState.FIN_WAIT_2, TcpState.ESTABLISHED])) == 5
    assert len(listed(scene.host, states=TcpState)) == 8


V4, V6, MAPPED = packed("127.0.0.1"), packed("::1"), packed("127.0.0.2")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"local": Endpoint(port=PORT)}, lambda c: c.four_tuple.local_port == PORT),
        ({"remote": Endpoint(port=PORT6)}, lambda c: c.four_tuple.remote_port == PORT6),
        ({"local": Endpoint(V4)}, lambda c: c.four_tuple.local == V4),
        ({"local": Endpoint(V4), "remote": Endpoint(V4, PORT)}, lambda c: c.four_tuple.remote_port == PORT),
        ({"local": Endpoint(MAPPED, PORT6)}, lambda c: c.four_tuple[:2] == (MAPPED, PORT6)),
        ({"local": Endpoint(MAPPED, PORT6), "family": 4}, lambda c: False),
        ({"local": Endpoint(packed("127.0.0.0"), prefix_length=8)}, lambda c: len(c.four_tuple.local) == 4),
        ({"remote": Endpoint(packed("127.0.0.3"), prefix_length=31)}, lambda c: c.four_tuple.remote == MAPPED),
        ({"local": Endpoint(packed("128.0.0.0"), prefix_length=1)}, lambda c: False),
        ({"local": Endpoint(V6)}, lambda c: c.four_tuple.local == V6),
        ({"local": Endpoint(packed("::"), prefix_length=64)}, lambda c: c.family == 6),
        ({"local": Endpoint(V6, PORT6), "remote": Endpoint(V6)}, lambda c: c.four_tuple[:2] == (V6, PORT6)),
        ({"local": Endpoint(V6), "family": 4}, lambda c: False),
        ({"family": 4}, lambda c: c.family == 4),
        ({"family": 6}, lambda c: c.family == 6),
        ({"local": Endpoint(), "remote": Endpoint()}, lambda c: True),
        ({"local": Endpoint(port=0)}, lambda c: False),
        ({"states": [TcpState.CLOSE_WAIT]}, lambda c: False),
        ({"states": []}, lambda c: False),
    ],
)
def test_filters(scene: Scene, filters: dict[str, object], expected: Callable[[Connection], bool]) -> None:
    everything = listed(scene.host)
    assert {c.cookie for c in listed(scene.host, **filters)} == {c.cookie for c in everything if expected(c)}


def test_it_is_the_kernel_that_filters(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    ask = SockDiag._ask

    def watched(self: SockDiag, flags: int, request: bytes) -> dict[int, Connection]:
        answer = ask(self, flags, request)
        lengths.append(len(answer))
        return answer

    monkeypatch.setattr(SockDiag, "_ask", watched)
    listed(scene.host, local=Endpoint(V4, PORT))
    assert lengths == [1, 0]
    listed(scene.host, remote=Endpoint(V6, PORT6))
    assert lengths == [1, 0, 1]  # there is nothing to ask of IPv4 sockets


def test_find(scene: Scene) -> None:
    with scene.host.entered(), SockDiag() as sockets:
        for pair in scene.pairs:
            for sock in pair:
                found = sockets.find(four_tuple(sock), extensions=Extension.INFO)
                assert found is not None
                assert found.inode == os.fstat(sock.fileno()).st_ino
                assert found.four_tuple == four_tuple(sock)
                assert len(found.info) >= 232
        there = four_tuple(scene.v4.client)
        # Where it is not, a listener is: the kernel's answer for 127.0.0.1 and for [::].
        assert sockets.find(there.reversed()._replace(remote_port=1)) is None
        assert sockets.find(four_tuple(scene.v6.server)._replace(remote_port=1)) is None
        # And nobody at all.
        assert sockets.find(there._replace(local_port=1)) is None
    assert diag.find(there) is None  # not in this namespace


def test_find_a_socket_bound_to_a_device(lan: LanFactory) -> None:
    a, b = lan("a", "b").hosts.values()
    with a.entered():
        listener = socket.create_server((a.ip4, PORT))
    with listener, b.entered(), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b.dev.encode())
        client.connect((a.ip4, PORT))
        found = diag.find(four_tuple(client))
        assert found is not None
        assert found.interface == socket.if_nametoindex(b.dev)


def test_find_in_time_wait(scene: Scene) -> None:
    there = four_tuple(scene.v4.client)
    scene.v4.client.close()
    scene.v4.server.close()
    with scene.host.entered():
        found = until(lambda: diag.find(there))
    assert found
    assert (found.state, found.inode, found.timer) == (TcpState.TIME_WAIT, 0, 3)
    assert 50_000 < found.expires <= 60_000


@pytest.mark.parametrize("server", ["10.0.0.2", "::"])
def test_syn_received(lan: LanFactory, server: str) -> None:
    a, b = lan("a", "b").hosts.values()
    with b.entered():
        listener = socket.create_server(
            (server, PORT), family=socket.AF_INET6 if ":" in server else socket.AF_INET, dualstack_ipv6=":" in server
        )
    # The SYN-ACK goes to nobody.
    b.run(["ip", "neigh", "replace", a.ip4, "lladdr", "02:00:00:00:00:99", "dev", b.dev, "nud", "permanent"])
    with listener, a.entered(), socket.socket() as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((b.ip4, PORT))
        (half,) = until(lambda: listed(b, states=[TcpState.SYN_RECEIVED]))
        assert half.inode == 0
        assert half.four_tuple == FourTuple(packed(b.ip4), PORT, packed(a.ip4), client.getsockname()[1])
        (sent,) = listed(a, states=[TcpState.SYN_SENT])
        assert sent.four_tuple == half.four_tuple.reversed()


def test_extensions(scene: Scene) -> None:
    sock = scene.v4.client
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x12345678)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    extensions = Extension.INFO | Extension.CONGESTION | Extension.MEMORY
    (found,) = listed(scene.host, local=Endpoint(V4), remote=Endpoint(V4, PORT), extensions=extensions)
    assert found.congestion == "reno"
    assert found.memory[1] == sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000
    assert found.mark == 0x12345678
    told = tcpinfo.parse(found.info)
    own = tcpinfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcpinfo.SIZE))
    assert told._replace(last_data_sent=0, last_data_recv=0, last_ack_recv=0) == own._replace(
        last_data_sent=0, last_data_recv=0, last_ack_recv=0
    )


def test_signed_connections_show(lan: LanFactory) -> None:
    host = lan("a").host("a")
    with host.entered(), socket.create_server((host.ip4, 0)) as listener, socket.socket() as client:
        for sock in (listener, client):
            sock.setsockopt(socket.IPPROTO_TCP, 14, option_values.md5_key(socket.inet_aton(host.ip4), b"key"))
        client.connect(listener.getsockname())
        with listener.accept()[0], socket.create_server((host.ip4, 0)) as plain, socket.socket() as other:
            other.connect(plain.getsockname())
            found = diag.list_connections(extensions=diag.Extension.INFO)
            ports = {each.four_tuple.local_port for each in found if each.signed}
            assert ports == {listener.getsockname()[1], client.getsockname()[1]}


def test_mptcp_subflows_show(lan: LanFactory) -> None:
    a = lan("a").host("a")
    with contextlib.ExitStack() as stack, a.entered():
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
        client.connect(("127.0.0.1", PORT))
        server = stack.enter_context(listener.accept()[0])
        found = diag.list_connections(extensions=Extension.INFO)
        assert {each.ulp for each in found} == {"mptcp"}
        assert {each.inode for each in found} == {os.fstat(each.fileno()).st_ino for each in (client, server)}


def test_many(lan: LanFactory) -> None:
    # More than one datagram, and each once.
    a = lan("a").host("a")
    with contextlib.ExitStack() as stack, a.entered():
        listener = stack.enter_context(socket.create_server(("127.0.0.1", PORT), backlog=1000))
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", PORT)))
            stack.enter_context(listener.accept()[0])
        found = diag.list_connections()
    assert len(found) == len({each.four_tuple for each in found}) == 2000


class Rehearsed:
    """In place of a netlink socket: answers with what it was given, once each time."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.asked = list(answers), 0

    def send(self, request: bytes) -> None:
        self.asked += 1

    def recv(self, size: int) -> bytes:
        flags_and_code = self.answers.pop(0)
        flags, code = struct.unpack("=Hi", flags_and_code)
        return diag._HEADER.pack(20, diag.NLMSG_DONE, flags, 0, 0) + struct.pack("=i", code)

    def close(self) -> None:
        pass


INTERRUPTED, FINE = struct.pack("=Hi", diag.NLM_F_DUMP_INTR, 0), struct.pack("=Hi", 0, 0)


def rehearse(sockets: SockDiag, *answers: bytes) -> Rehearsed:
    sockets.close()
    sockets._socket = rehearsed = Rehearsed(*answers)  # type: ignore[assignment]
    return rehearsed


def test_an_inconsistent_dump_is_repeated() -> None:
    with SockDiag() as sockets:
        rehearsed = rehearse(sockets, INTERRUPTED, INTERRUPTED, FINE, FINE)
        assert sockets.list_connections() == []
        assert rehearsed.asked == 4


def test_but_not_for_ever() -> None:
    with SockDiag() as sockets:
        rehearsed = rehearse(sockets, *[INTERRUPTED] * 100)
        with pytest.raises(KernelError, match="they change too quickly"):
            sockets.list_connections()
        assert rehearsed.asked == 10


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (-2, HostError, r"this kernel does not tell about its TCP sockets \(sock_diag\) \(modprobe tcp_diag"),
        (-1, PrivilegeError, "sock_diag: not permitted"),
        (-12, KernelError, r"sock_diag: Cannot allocate memory \[ENOMEM\]"),
    ],
)
def test_errors(code: int, error: type[Exception], words: str) -> None:
    with SockDiag() as sockets:
        rehearse(sockets, struct.pack("=Hi", 0, code))
        with pytest.raises(error, match=words):
            sockets.list_connections()


def test_it_asks_where_it_was_made(scene: Scene) -> None:
    with scene.host.entered():
        sockets = SockDiag()
    with sockets:
        assert len(sockets.list_connections()) == 6
    assert netns.identity() != netns.identity(scene.host.netns)
    sockets.close()


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=9)), max_size=6), max_size=8))
def test_attributes_however_they_lie(sequences: list[list[tuple[int, bytes]]]) -> None:
    # Many sequences of the same length, laid out differently: each is read by its own layout.
    for sequence in sequences:
        data = b"".join(
            struct.pack("=HH", 4 + len(value), kind | flag) + value + bytes(-len(value) % 4)
            for (kind, value), flag in zip(sequence, itertools.cycle((0, 0x8000)))
        )
        for kind, value in dict(sequence).items():
            assert diag._attribute(data, kind) == value
        assert diag._attribute(data, 0) is None
        if sequence and len(sequence[-1][1]) % 4:  # the last one without its padding
            assert diag._attribute(data[: -(-len(sequence[-1][1]) % 4)], sequence[-1][0]) == sequence[-1][1]


@pytest.mark.parametrize("data", [b"", b"\1", b"\0\0\0\0", b"\2\0\1\0\5\0\1\0A", b"\xff\xff\1\0AAAA"])
def test_attributes_that_make_no_sense_do_no_harm(data: bytes) -> None:
    assert diag._attribute(data, 2) is None
