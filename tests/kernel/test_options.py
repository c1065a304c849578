"""Socket options: every row of the table is set, read, moved to another socket and compared.

Sockets are asked both ways, the long one and by fingerprint; a socket is rebuilt as a restore does it, in repair mode.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import KernelError
from migrate.kernel import bpf, fingerprint, option_values, options, sockmem, uapi
from migrate.kernel.btf import Btf
from migrate.kernel.option_table import BY_NAME, LEFT_OUT, OPTIONS, Kind, LeftOut, Option, Phase
from tests.fix_netns import Host, Lan

ROOT = Path(__file__).parents[2]
SIZES = {"SO_SNDBUF", "SO_RCVBUF", "TCP_WINDOW_CLAMP"}
ADDRESSES = {"4": "127.0.0.1", "6": "::1", "mapped": "::ffff:127.0.0.1"}
SO_ATTACH_BPF = 50  # include/uapi/asm-generic/socket.h
PHASES = (Phase.BEFORE_BIND, Phase.BEFORE_CONNECT, Phase.IN_REPAIR, Phase.AFTER_REPAIR)

ROWS: list[Option | LeftOut] = [*OPTIONS, *LEFT_OUT]


@pytest.fixture(scope="module")
def here() -> Iterator[Host]:
    """A network namespace; the module's sockets are made in it."""
    net = Lan(["here"])
    try:
        with net.host("here").entered():
            yield net.host("here")
    finally:
        net.close()


@pytest.fixture(autouse=True)
def _in_a_cgroup(request: pytest.FixtureRequest) -> None:
    if "SO_RESERVE_MEM" in request.node.name:
        request.getfixturevalue("reservable")


@pytest.fixture(scope="module")
def prepared(here: Host) -> Iterator[options._Reader]:
    """A reader that recognises sockets by their fingerprints."""
    reader = options._Reader()
    if not reader.prepare():
        pytest.skip("fingerprints need CAP_BPF and CAP_PERFMON in the initial user namespace")
    yield reader
    reader.forget()


def read_many(reader: options._Reader, socks: Sequence[socket.socket]) -> list[dict[str, options.Value]]:
    """As `bulk` does it: one look at all, where there are fingerprints."""
    fingerprints = reader.ready(len(socks))
    if fingerprints is None:
        return [reader.ask(sock, True) for sock in socks]
    looks = fingerprints.take_many([sock.fileno() for sock in socks])
    return [reader.recognise(fingerprints, sock, look) for sock, look in zip(socks, looks, strict=True)]


@pytest.fixture(params=["the long way", "by fingerprint"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> options._Reader:
    """How sockets are asked in this test."""
    if request.param == "the long way":
        reader = options._Reader()
        reader.able = False
    else:
        reader = request.getfixturevalue("prepared")
        reader.memory.until = 0.0  # what another test taught it
    monkeypatch.setattr(options, "_reader", reader)
    return reader


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def connected(here: Host) -> Iterator[Callable[..., Pair]]:
    """``connected("mapped")`` makes a connection: the two sockets."""
    with contextlib.ExitStack() as made:

        def make(family: str, *, prepare: Callable[[socket.socket], None] = lambda _: None, flow: int = 0) -> Pair:
            address = ADDRESSES[family]
            kind = socket.AF_INET if family == "4" else socket.AF_INET6
            with socket.socket(kind) as listener:
                listener.bind(("", 0))
                listener.listen()
                client = made.enter_context(socket.socket(kind))
                prepare(client)
                name = (address, listener.getsockname()[1])
                client.connect(name if family == "4" else (*name, flow, 0))
                server = made.enter_context(listener.accept()[0])
            return client, server

        yield make


@contextlib.contextmanager
def rebuilt(like: socket.socket, found: Mapping[str, options.Value]) -> Iterator[tuple[socket.socket, list[str]]]:
    """A connection to nobody, made as a restore makes it, with those options; and what could not be set."""
    address = like.getsockname()[0]
    with socket.socket(like.family) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_REPAIR, uapi.TCP_REPAIR_ON)
        left = options.apply(sock, found, Phase.BEFORE_BIND)
        sock.bind((address, 0))
        left += options.apply(sock, found, Phase.BEFORE_CONNECT)
        more = (options.flowinfo(found), 0) if like.family == socket.AF_INET6 else ()
        sock.connect((address, 9, *more))
        left += options.apply(sock, found, Phase.IN_REPAIR)
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_REPAIR, uapi.TCP_REPAIR_OFF_NO_WP)
        left += options.apply(sock, found, Phase.AFTER_REPAIR)
        try:
            yield sock, left
        finally:  # nobody answers: leave in silence
            sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_REPAIR, uapi.TCP_REPAIR_ON)


def settle(sock: socket.socket, option: Option) -> None:
    """Give the socket the option's sample; skip where kernel or user namespace do not have it."""
    try:
        option_values.put(sock, option, option.sample)
    except PermissionError:
        pytest.skip(f"{option.name} needs a capability in the initial user namespace")
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOENT):
            raise
        pytest.skip(f"this kernel has no {option.name}, or not for this process")


def walk(*, connected: bool) -> list[Any]:
    """Each row of the table that can be read, with each kind of socket that can have it."""
    return [
        pytest.param(option, family, id=f"{option.name}-{family}")
        for option in OPTIONS
        for family in ADDRESSES
        if option.readable and option.family in (0, 4 if family == "4" else 6)
        if not (connected and option.phase is Phase.UNCONNECTED)
        if not (option.kind is Kind.LABEL and (family != "6" or not connected))  # of IPv6, and of connections
        if not (option.name == "IPV6_V6ONLY" and family == "mapped")  # it would be none
    ]


@pytest.mark.parametrize(("option", "family"), walk(connected=True))
def test_an_option_of_a_connection_moves(option: Option, family: str, connected: Any, way: options._Reader) -> None:
    if option.kind is Kind.LABEL:  # can be had only before connect

        def label(sock: socket.socket) -> None:
            settle(sock, option)
            settle(sock, BY_NAME["IPV6_FLOWINFO_SEND"])

        sock, _ = connected(family, prepare=label, flow=option.sample)
    else:
        sock, _ = connected(family)
        assert option.name not in options.read(sock) or option.kind is Kind.SIZE
        settle(sock, option)
    value = option_values.get(sock, option)
    found = options.read(sock)
    assert found[option.name] == value
    assert value == option.sample
    with rebuilt(sock, found) as (again, left):
        assert left == []
        assert option_values.get(again, option) == value
        assert options.read(again) == found


@pytest.mark.parametrize(("option", "family"), walk(connected=True))
def test_values_of_an_option_are_told_apart(
    option: Option, family: str, connected: Any, prepared: options._Reader
) -> None:
    if not isinstance(option.sample, int) or option.kind is Kind.LABEL or family == "mapped":
        return
    sock, _ = connected(family)
    settle(sock, option)
    for value in (option.sample, option.sample + 1, option.sample + 4, option.sample << 8):
        with contextlib.suppress(OSError, TypeError, struct.error):  # more than it may be
            option_values.put(sock, option, value)
        now = option_values.get(sock, option)
        assert prepared.read(sock, True).get(option.name, now) == now


@pytest.mark.parametrize(("option", "family"), walk(connected=False))
def test_an_option_of_a_listening_socket_moves(option: Option, family: str, here: Host) -> None:
    kind = socket.AF_INET if family == "4" else socket.AF_INET6
    address = ADDRESSES[family]
    with socket.socket(kind) as sock, socket.socket(kind) as again:
        assert options.read(sock, connected=False) == {}
        settle(sock, option)
        found = options.read(sock, connected=False)
        if option.name == "IP_OPTIONS":  # without a route, TCP_MAXSEG then reads as less than the least that may be set
            found.pop("TCP_MAXSEG", None)
        assert found[option.name] == option_values.get(sock, option)
        assert options.apply(again, found, Phase.UNCONNECTED) == []
        assert options.read(again, connected=False).items() >= found.items()
        again.bind((address, 0))
        again.listen()
        if option.name != "TCP_QUICKACK":  # listen resets it
            assert options.read(again, connected=False)[option.name] == found[option.name]


@pytest.mark.parametrize("family", ADDRESSES)
def test_all_options_at_once(family: str, connected: Any, way: options._Reader) -> None:
    sock, _ = connected(family)
    for option in OPTIONS:
        if option.phase is not Phase.UNCONNECTED and option.kind is not Kind.LABEL:
            with contextlib.suppress(OSError):  # the walk tells which and why
                option_values.put(sock, option, option.sample)
    found = options.read(sock)
    assert len(found) > (100 if family != "4" else 70)
    with rebuilt(sock, found) as (again, left):
        assert left == []
        assert options.read(again) == found
    option_values.put(sock, BY_NAME["SO_LINGER"], 0)  # its last segments have nowhere to go


@pytest.mark.parametrize("family", ADDRESSES)
def test_a_connection_that_nobody_touched_has_nothing_but_sizes(
    family: str, connected: Any, way: options._Reader
) -> None:
    for sock in connected(family):
        assert set(options.read(sock)) <= {"SO_SNDBUF"}


@pytest.mark.parametrize("family", ADDRESSES)
def test_what_traffic_changes_by_itself(family: str, connected: Any, way: options._Reader) -> None:
    client, server = connected(family)
    for _ in range(50):
        client.sendall(bytes(10_000))
        server.recv(10_000, socket.MSG_WAITALL)
        server.sendall(b"yes")
        client.recv(3)
    for sock in (client, server):
        found = options.read(sock)
        assert set(found) <= SIZES | {"TCP_QUICKACK"}
        with rebuilt(sock, found) as (again, left):
            assert left == []
            # The kernel doubles what it is given, autotuning knows odd numbers, too.
            sizes = {name: found[name] for name in ("SO_SNDBUF", "SO_RCVBUF") if name in found}
            even: dict[str, options.Value] = {
                name: size + size % 2 for name, size in sizes.items() if isinstance(size, int)
            }
            assert options.read(again) == found | even


def test_lingering_that_was_turned_off_is_not_set(connected: Any, way: options._Reader) -> None:
    sock, _ = connected("4")
    before = options.read(sock)
    for seconds, expected in ((0, 0), (5, 5), (-1, None)):
        option_values.put(sock, BY_NAME["SO_LINGER"], seconds)
        assert options.read(sock).get("SO_LINGER") == expected
    assert options.read(sock) == before


@pytest.mark.parametrize("family", ADDRESSES)
def test_congestion_notification_is_no_type_of_service(
    family: str, here: Host, connected: Any, way: options._Reader
) -> None:
    usual = here.sysctl("net.ipv4.tcp_ecn")
    here.sysctl("net.ipv4.tcp_ecn", 1)
    try:
        client, server = connected(family)
        client.sendall(b"marked as capable")
        server.recv(100)
        row = BY_NAME["IP_TOS" if family != "6" else "IPV6_TCLASS"]
        assert client.getsockopt(row.level, row.number) & 3  # what the kernel made of it by itself
        assert set(options.read(client)) <= {"SO_SNDBUF"}
        option_values.put(client, row, 0x40)
        found = options.read(client)
        assert found[row.name] == 0x40
        with rebuilt(client, found) as (again, left):
            assert left == []
            assert options.read(again) == found
    finally:
        here.sysctl("net.ipv4.tcp_ecn", usual)


def test_both_ways_agree_on_sockets_of_all_kinds(connected: Any, prepared: options._Reader) -> None:
    socks = [sock for family in ADDRESSES for _ in range(20) for sock in connected(family)]
    for place, sock in enumerate(socks):
        for option in OPTIONS[place % 7 :: 7 + place % 11]:
            with contextlib.suppress(OSError):
                option_values.put(sock, option, option.sample)
    long = options._Reader()
    long.able = False
    assert read_many(prepared, socks) == read_many(long, socks)
    assert read_many(prepared, socks[::-1]) == read_many(long, socks[::-1])


def test_sockets_with_everything_set_are_recognised(connected: Any, prepared: options._Reader) -> None:
    socks = [connected("6")[1] for _ in range(10)]
    for sock in socks:
        for option in OPTIONS:
            if option.phase is not Phase.UNCONNECTED and option.kind is not Kind.LABEL:
                with contextlib.suppress(OSError):  # the walk tells which and why
                    option_values.put(sock, option, option.sample)
    prepared.memory.until, before = 0.0, prepared.asked
    first, *others = read_many(prepared, socks)
    assert len(first) > 100 and others == [first] * 9
    assert prepared.asked == before + 1
    for sock in socks:
        option_values.put(sock, BY_NAME["SO_LINGER"], 0)  # its last segments have nowhere to go


def test_one_socket_is_asked_for_all_that_are_like_it(connected: Any, prepared: options._Reader) -> None:
    socks = [connected("4")[1] for _ in range(40)]
    prepared.memory.until, before = 0.0, prepared.asked
    assert read_many(prepared, socks) == [options.read(socks[0])] * 40
    assert prepared.asked == before + 1
    socks[7].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found = read_many(prepared, socks)
    assert [place for place, one in enumerate(found) if one.get("TCP_NODELAY")] == [7]
    assert prepared.asked == before + 2


def test_every_option_shows_in_a_fingerprint_on_this_kernel(prepared: options._Reader) -> None:
    assert prepared.fingerprint is not None
    absent = {option.name for option in OPTIONS if option.name not in answered()}
    assert prepared.fingerprint.unproven <= absent


def answered() -> set[str]:
    """The options that a socket of both families answers."""
    names = set()
    with socket.socket(socket.AF_INET6) as six, socket.socket() as four:
        for option in OPTIONS:
            with contextlib.suppress(OSError):
                option_values.get(four if option.family == 4 else six, option)
                names.add(option.name)
    return names


def test_a_socket_that_changes_while_it_is_asked_teaches_nothing(
    connected: Any, prepared: options._Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing, like = connected("4")[1], connected("4")[1]
    ask = prepared.ask

    def changed(sock: socket.socket, connected: bool) -> dict[str, options.Value]:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ask(sock, connected)

    prepared.memory.until = 0.0
    monkeypatch.setattr(prepared, "ask", changed)
    assert prepared.read(changing, True)["TCP_NODELAY"] == 1
    monkeypatch.undo()
    assert "TCP_NODELAY" not in prepared.read(like, True)


@pytest.mark.parametrize(
    "fields",
    [{"sock.no_such_field": "SO_MARK"}, {"sock.sk_uid": "SO_MARK"}, {}],
    ids=["the kernel lacks the field", "the field holds something else", "nobody knows the field"],
)
def test_an_option_that_shows_in_no_fingerprint_is_asked_for(
    fields: dict[str, str], connected: Any, prepared: options._Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {field: names for field, names in fingerprint.FIELDS.items() if field != "sock.sk_mark"}
    monkeypatch.setattr(fingerprint, "FIELDS", rest | fields)
    reader = options._Reader()
    assert reader.prepare() and reader.fingerprint
    assert reader.fingerprint.unproven >= {"SO_MARK"}
    marked, plain = connected("4")[1], connected("4")[1]
    marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
    try:
        assert [found.get("SO_MARK") for found in read_many(reader, [marked, plain, marked])] == [7, None, 7]
    finally:
        reader.forget()


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ("fingerprint.FIELDS", fingerprint.FIELDS | {"sock.sk_ino": ""}),  # differs from socket to socket
        ("fingerprint.SIZE_FIELDS", ("sock.sk_rcvbuf", "sock.sk_sndbuf", "tcp_sock.window_clamp")),
        ("fingerprint.SIZE_FIELDS", ("sock.sk_sndbuf", "sock.sk_rcvbuf", "sock.no_such_field")),
        ("sockmem.PATH", ("task_struct.mm", *sockmem.PATH[1:])),
    ],
)
def test_fields_that_are_not_what_they_should_be_are_noticed(
    table: str, wrong: Any, here: Host, prepared: options._Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"migrate.kernel.{table}", wrong)
    reader = options._Reader()
    assert not reader.prepare()
    assert reader.fingerprint is None
    with socket.socket() as sock:
        assert options.read(sock, connected=False) == {}


def test_what_lies_outside_of_the_socket_is_asked_of_each(
    here: Host, connected: Any, prepared: options._Reader
) -> None:
    here.run(["ip", "link", "add", "before0", "type", "veth"])
    first, second = connected("4")
    for sock in (first, second):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"before0")
    assert prepared.read(first, True)["SO_BINDTODEVICE"] == b"before0"
    here.run(["ip", "link", "set", "before0", "name", "after0"])
    assert [found["SO_BINDTODEVICE"] for found in read_many(prepared, [first, second])] == [b"after0", b"after0"]


def test_a_socket_of_another_namespace_is_compared_with_one_of_there(
    lan: Any, connected: Any, way: options._Reader
) -> None:
    host = lan("there").host("there")
    host.sysctl("net.ipv4.tcp_keepalive_time", 100)
    with host.entered():
        listener = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(listener.getsockname())
    with listener, sock:
        assert set(options.read(sock)) <= {"SO_SNDBUF"}
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7200)  # what is usual here
        assert options.read(sock)["TCP_KEEPIDLE"] == 7200
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 100)  # what is usual there
        assert "TCP_KEEPIDLE" not in options.read(sock)
        ours = connected("4")[0]
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 100)
        assert options.read(ours)["TCP_KEEPIDLE"] == 100


def test_changed_settings_of_the_host_are_noticed(here: Host, connected: Any, way: options._Reader) -> None:
    sock, _ = connected("4")
    before = options.read(sock)
    usual = here.sysctl("net.ipv4.tcp_keepalive_time")
    try:
        here.sysctl("net.ipv4.tcp_keepalive_time", 99)
        way.memory.until = 0.0  # a second later
        assert options.read(sock) == before
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(usual))
        assert options.read(sock)["TCP_KEEPIDLE"] == int(usual)
    finally:
        here.sysctl("net.ipv4.tcp_keepalive_time", usual)


@pytest.mark.parametrize("lock", [0, 1, 2, 3])
def test_buffers_are_locked_as_before(lock: int, connected: Any, way: options._Reader) -> None:
    sock, _ = connected("4")
    for name in ("SO_SNDBUF", "SO_RCVBUF"):
        option_values.put(sock, BY_NAME[name], 400_000)
    sock.setsockopt(socket.SOL_SOCKET, uapi.SO_BUF_LOCK, lock)
    found = options.read(sock)
    assert (found["SO_SNDBUF"], found["SO_RCVBUF"], found.get("SO_BUF_LOCK", 0)) == (400_000, 400_000, lock)
    with rebuilt(sock, found) as (again, left):
        assert left == []
        assert again.getsockopt(socket.SOL_SOCKET, uapi.SO_BUF_LOCK) == lock
        assert again.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 400_000


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_sets_only_what_is_its(phase: Phase, here: Host) -> None:
    every = {option.name: option.sample for option in OPTIONS if option.readable and option.family != 6}
    del every["IP_OPTIONS"]  # changes what TCP_MAXSEG reads as
    with socket.socket() as sock:
        options.apply(sock, every, phase)
        found = options.read(sock, connected=False)
    assert found
    assert {BY_NAME[name].phase for name in found} == {phase}


def test_nothing_to_set_is_no_work(here: Host) -> None:
    sock = socket.socket()
    sock.close()
    assert [options.apply(sock, {}, phase) for phase in Phase] == [[]] * 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SO_INVENTED_TOMORROW", 1),
        ("SO_MARK", b"mark"),
        ("SO_MARK", 1 << 40),
        ("SO_MARK", "1"),
        ("SO_LINGER", "long"),
        ("SO_LINGER", 1 << 40),
        ("SO_SNDBUF", 1 << 80),
        ("SO_RCVTIMEO", 1 << 99),
        ("SO_MAX_PACING_RATE", -1),
        ("SO_BINDTODEVICE", "nosuchdevice0"),
        ("SO_BINDTODEVICE", "snowman ☃"),
        ("SO_ATTACH_FILTER", b"no filter"),
        ("SO_ATTACH_FILTER", bytes(8)),
        ("SO_ATTACH_BPF", 1),
        ("TCP_CONGESTION", "nosuch"),
        ("TCP_CONGESTION", 1),
        ("TCP_FASTOPEN_CONNECT", 1),
        ("IP_OPTIONS", bytes(400)),
        ("IPV6_TCLASS", 1),
    ],
)
def test_what_cannot_be_set_is_named(name: str, value: options.Value, connected: Any) -> None:
    sock, _ = connected("4")
    with rebuilt(sock, {name: value, "SO_KEEPALIVE": 1}) as (again, left):
        assert left == [name]
        assert again.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_a_closed_socket_is_an_error(here: Host, way: options._Reader) -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(KernelError, match="Bad file descriptor"):
        options.read(sock)
    with pytest.raises(KernelError, match="SO_MARK: Bad file descriptor"):
        options.apply(sock, {"SO_MARK": 1}, Phase.BEFORE_BIND)


def ebpf_filter() -> int:
    """A descriptor of an eBPF socket filter that lets everything pass."""
    licence, code = ctypes.create_string_buffer(b"GPL"), bpf.put(0, -1) + bpf.leave()
    source = ctypes.create_string_buffer(code)
    attributes = struct.pack("=IIQQ24x", 1, 2, ctypes.addressof(source), ctypes.addressof(licence))
    try:
        return bpf.command(5, attributes)  # BPF_PROG_LOAD of BPF_PROG_TYPE_SOCKET_FILTER
    except PermissionError:
        pytest.skip("needs CAP_BPF in the initial user namespace")


def test_an_ebpf_filter_is_seen_and_cannot_be_carried(connected: Any, way: options._Reader) -> None:
    sock, _ = connected("4")
    program = ebpf_filter()
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
    os.close(program)
    assert options.read(sock)["SO_ATTACH_BPF"] == 1


def test_filters_are_told_apart_however_alike_the_sockets_are(connected: Any, way: options._Reader) -> None:
    socks = [connected("4")[1] for _ in range(5)]
    program = ebpf_filter()
    socks[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
    os.close(program)
    filters = [struct.pack(">HBBI", 0x06, 0, 0, most) for most in (1000, 2000, 3000)]  # accept so many bytes
    for sock, code in zip(socks[1:], filters, strict=False):
        option_values.put(sock, BY_NAME["SO_ATTACH_FILTER"], code)
    for order in (1, -1):
        way.memory.until = 0.0
        found = read_many(way, socks[::order])[::order]
        assert [one.get("SO_ATTACH_FILTER") for one in found] == [None, *filters, None]
        assert [one.get("SO_ATTACH_BPF") for one in found] == [1, None, None, None, None]


def test_a_long_filter_moves_whole(connected: Any, way: options._Reader) -> None:
    """SO_GET_FILTER counts instructions: what takes it for bytes overwrites its own memory."""
    sock, _ = connected("4")
    program = struct.pack(">HBBI", 0x00, 0, 0, 1) * 4000 + struct.pack(">HBBI", 0x06, 0, 0, 0xFFFFFFFF)
    option_values.put(sock, BY_NAME["SO_ATTACH_FILTER"], program)
    assert options.read(sock)["SO_ATTACH_FILTER"] == program


def test_md5_keys_are_given_by_the_user(here: Host) -> None:
    key = {"TCP_MD5SIG": option_values.md5_key(socket.inet_aton("127.0.0.1"), b"secret")}
    other = {"TCP_MD5SIG": option_values.md5_key(socket.inet_aton("127.0.0.1"), b"guess")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if options.apply(listener, key, Phase.UNCONNECTED):
            pytest.skip("this kernel has no TCP_MD5SIG")
        for keys, reached in ((key, True), (other, False)):
            with socket.socket() as client:
                assert options.apply(client, keys, Phase.BEFORE_CONNECT) == []
                client.settimeout(0.3 if not reached else 10)
                assert (client.connect_ex(listener.getsockname()) == 0) is reached


def test_what_only_the_user_knows_can_be_set(here: Host) -> None:
    with socket.socket() as sock:
        if options.apply(sock, {"SO_BUSY_POLL_BUDGET": 16}, Phase.IN_REPAIR):
            pytest.skip("this kernel has no SO_BUSY_POLL_BUDGET, or not for this process")


def test_threads_do_not_mix_their_answers(
    connected: Any, prepared: options._Reader, request: pytest.FixtureRequest
) -> None:
    kinds = {mark: [connected("4")[0] for _ in range(10)] for mark in range(1, 5)}
    for mark, socks in kinds.items():
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    wrong: list[object] = []

    def look(mark: int, socks: list[socket.socket]) -> None:
        for _ in range(200):
            found = {one["SO_MARK"] for one in read_many(prepared, socks)}
            if found != {mark}:
                wrong.append(found)

    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=look, args=kind) for kind in kinds.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_asks_for_itself(prepared: options._Reader, tmp_path: Path) -> None:
    program = """
import os, socket
from migrate.kernel import options
assert options.prepare()
listener = socket.create_server(("127.0.0.1", 0))
sock = socket.create_connection(listener.getsockname())
sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
before, descriptors = options.read(sock), len(os.listdir("/proc/self/fd"))
child = os.fork()
if not child:
    assert options._reader.fingerprint is None
    assert len(os.listdir("/proc/self/fd")) < descriptors
    os._exit(options.read(sock) != before)
assert os.waitpid(child, 0)[1] == 0
assert options.read(sock) == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT)


def test_fingerprints_come_once_they_pay_off(
    connected: Any, prepared: options._Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, _ = connected("4")
    monkeypatch.setattr(options, "PAYS_OFF", 5)
    reader = options._Reader()
    for _ in range(5):
        reader.read(sock, True)
        assert reader.fingerprint is None
    reader.read(sock, True)
    assert reader.fingerprint is not None
    reader.forget()


# The table itself


def test_names_and_numbers_stand_once() -> None:
    rows = [(row.name, row.level, row.number) for row in ROWS]
    assert len({(level, number) for _, level, number in rows}) == len(rows)
    assert len({(name, level) for name, level, _ in rows}) == len(rows)
    assert len(BY_NAME) == len(OPTIONS)


def test_rows_stand_in_the_order_in_which_they_are_set() -> None:
    phases = [option.phase for option in OPTIONS]
    assert phases == sorted(phases)


def test_numbers_are_those_of_the_interpreter() -> None:
    for row in ROWS:
        assert getattr(socket, row.name, row.number) == row.number


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_table_knows_every_option_that_the_kernel_answers(family: socket.AddressFamily, here: Host) -> None:
    known = {(row.level, row.number) for row in ROWS}
    levels = {socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6}
    unknown = []
    with socket.socket(family) as sock:
        for level, number in sorted({(level, number) for level in levels for number in range(256)} - known):
            with contextlib.suppress(OSError):
                sock.getsockopt(level, number, 256)
                unknown.append((level, number))
    assert unknown == []


def test_layouts_are_found() -> None:
    btf = Btf()
    assert btf.place("tcp_sock.inet_conn").offset == 0
    assert btf.place("sock_common.skc_flags").size == struct.calcsize("L")
    nodelay = btf.place("tcp_sock.nonagle")
    assert nodelay.size == 1 and nodelay.mask.bit_count() < 8
    deep = btf.place("inet_connection_sock.icsk_ack.pingpong")
    assert deep.offset > btf.place("inet_connection_sock.icsk_ack").offset
    for path in ("sock.no_such_member", "no_such_structure.member", "sock"):
        with pytest.raises(LookupError, match=path):
            btf.place(path)


def test_what_is_no_btf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "btf"
    file.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="no BTF"):
        Btf(str(file))


def test_the_documentation_is_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "draw-options", "--check"], check=True)
