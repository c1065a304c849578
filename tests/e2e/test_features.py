"""What a connection may have beyond its state: urgent data, a shut window, another MTU, conntrack, microseconds …"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import pytest

import migrate
from migrate.errors import HostError
from migrate.kernel import sockopt, tcpinfo, uapi
from migrate.kernel.segment import ACK, CWR, ECE, SYN
from migrate.pathstate import Marks
from migrate.tcpstate import TcpState
from tests.e2e.test_states import Field, field
from tests.fix_netns import Host, Lan, ip
from tests.lives import FAMILIES, Life, judge
from tests.waiting import until

__all__ = ["field"]

ECT0 = 2  # RFC 3168

families = pytest.mark.parametrize("family", FAMILIES)


def exchange(life: Life, length: int = 20_000) -> None:
    """Both directions, whole."""
    data = bytes(number % 251 for number in range(length))
    life.send(data)
    life.expected_by_us += data[:10_000]
    life.peer.send(data[:10_000])
    life.deliver()


def ends_well(life: Life) -> None:
    exchange(life)
    judge(life.wire.segments, life.four_tuple, closed=False)


@families
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_urgent_data_that_nobody_has_read(field: Field, family: str, before: int, after: int) -> None:
    with field.life(family) as life:
        life.passive()
        life.peer.send(b"b" * before)
        life.peer.send(b"!", socket.MSG_OOB)
        life.peer.send(b"a" * after)
        life.ours.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        until(lambda: sockopt.received_length(life.ours) == before + 1 + after)
        life.ours.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
        life.move()
        assert life.mover.record and life.mover.record.urgent == before
        assert life.ours.recv(1, socket.MSG_OOB) == b"!"
        if before:
            assert life.ours.recv(100) == b"b" * before, "reading stops at the mark"
        assert sockopt.at_mark(life.ours)
        if after:
            assert life.ours.recv(100) == b"a" * after
        ends_well(life)


@families
def test_a_shut_window_is_probed_from_there(field: Field, family: str) -> None:
    with field.life(family) as life:
        life.passive(lambda sock: sock.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, 4 << 20))
        life.send(b"x" * (2 << 20))
        shut = tcpinfo.reader("unacked", "notsent_bytes")
        until(lambda: shut(sockopt.tcp_info(life.ours))[0] == 0 and shut(sockopt.tcp_info(life.ours))[1] > 0)
        life.move()
        seen = len(life.wire.segments)
        until(
            lambda: [each for each in life.wire.segments[seen:] if each.source == life.four_tuple.local],
            what="a probe of the window",
        )
        life.deliver()
        ends_well(life)


@families
def test_a_smaller_mtu_on_the_way_from_there(field: Field, family: str) -> None:
    mtu, headers, bits = (1300, 72, 128) if family == "ipv6" else (1000, 52, 32)
    with field.life(family) as life:
        life.passive()
        exchange(life)
        there = life.mover.there
        route = f"{life.peer_address}/{bits} dev {there.dev}"
        ip([f"route add {route} mtu lock {mtu}"], namespace=there.netns)
        try:
            life.move()
            exchange(life)
            assert tcpinfo.reader("snd_mss")(sockopt.tcp_info(life.ours))[0] <= mtu - headers
            ends_well(life)
        finally:
            ip([f"route del {route}"], namespace=there.netns)


def conntrack(host: Host) -> Callable[[], object]:
    host.run(["nft", "table inet tracked { chain c { type filter hook input priority 0; ct state invalid drop; }; }"])
    return lambda: host.run(["nft", "delete table inet tracked"])


def strict(host: Host) -> Callable[[], object]:
    for dev in ("all", host.dev):
        host.sysctl(f"net.ipv4.conf.{dev}.rp_filter", 1)
    return lambda: [host.sysctl(f"net.ipv4.conf.{dev}.rp_filter", 0) for dev in ("all", host.dev)]


def policy(host: Host) -> Callable[[], object]:
    """Its routes come from a table that the address chooses."""
    undo = []
    for version, net, address in (("-4", "10.0.0.0/24", Lan.vip4), ("-6", "fd00::/64", Lan.vip6)):
        host.run(["ip", version, "route", "replace", net, "dev", host.dev, "table", "77"])
        host.run(["ip", version, "rule", "add", "from", address, "lookup", "77", "priority", "77"])
        undo.append(["ip", version, "rule", "del", "priority", "77"])
    return lambda: [host.run(command) for command in undo]


HAVE = [
    (how, family) for how in (conntrack, strict, policy) for family in FAMILIES if (how, family) != (strict, "ipv6")
]


@pytest.mark.parametrize("state", [TcpState.ESTABLISHED, TcpState.CLOSE_WAIT], ids=lambda state: state.name)
@pytest.mark.parametrize(("how", "family"), HAVE, ids=lambda value: getattr(value, "__name__", value))
def test_what_hosts_have(
    field: Field, how: Callable[[Host], Callable[[], object]], family: str, state: TcpState
) -> None:
    """IPv6 has no rp_filter."""
    with contextlib.ExitStack() as undo, field.life(family, full=True) as life:
        for host in (life.mover.here, life.mover.there):
            undo.callback(how(host))
        life.passive()
        if state is TcpState.CLOSE_WAIT:
            life.peer.shutdown(socket.SHUT_WR)
            until(lambda: life.state() is state)
        life.fill()
        life.move()
        assert life.state() is state
        life.deliver()
        judge(life.wire.segments, life.four_tuple, closed=False)


@families
@pytest.mark.parametrize("units", [(1, 1), (2, 2), (1, 2), (2, 1)], ids=["ms", "us", "ms to us", "us to ms"])
def test_timestamps_in_both_units(field: Field, units: tuple[int, int], family: str) -> None:
    """The unit is the sender's own affair: the peer echoes numbers, which have to grow."""
    with field.life(family) as life:
        life.passive()
        exchange(life)
        for unit in units:
            with life.mover.here.entered():
                record = migrate.dump(life.ours)
                migrate.release(life.ours)
                life.ours.close()
                record.timestamps = unit
                life.ours = migrate.restore(record)
                life.ours.setblocking(False)
            bits = tcpinfo.reader("options")(sockopt.tcp_info(life.ours))[0]
            assert bool(bits & uapi.TCPI_OPT_USEC_TS) == (unit == 2)
            exchange(life)
            life.move()
            assert life.mover.record and life.mover.record.timestamps == unit
            exchange(life)
        ends_well(life)


def test_fast_open(field: Field) -> None:
    """A connection whose SYN carried data is one like others."""
    with field.life("ipv4") as life:
        for host in field.net.hosts.values():
            host.sysctl("net.ipv4.tcp_fastopen", 0x207)
        life.listen(lambda sock: sock.setsockopt(socket.IPPROTO_TCP, 23, 5))
        assert life.listener
        with life.client.entered():
            life.peer = socket.socket()
        life.peer.bind((life.peer_address, 0))
        life.name(life.listener.getsockname()[1], life.peer.getsockname()[1])
        life.peer.sendto(b"early", socket.MSG_FASTOPEN, life.listener.getsockname())
        life.accept()
        until(lambda: sockopt.received_length(life.ours) == 5)
        syn = next(each for each in life.wire.segments if each.flags & 2)
        assert syn.length == 5
        life.expected_by_us = b"early"
        life.move()
        ends_well(life)


@families
def test_what_came_out_of_order_is_left_to_the_peer(field: Field, family: str) -> None:
    with field.life(family) as life:
        life.passive()
        host = life.mover.here
        rule = f'iifname "{host.dev}" tcp dport {life.four_tuple.local_port} meta length > 1000 numgen inc mod 4 0 drop'
        host.run(["nft", f"table inet loss {{ chain c {{ type filter hook prerouting priority -250; {rule}; }}; }}"])
        try:
            life.expected_by_us = bytes(number % 251 for number in range(14_000))
            life.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, 14_000, 1400):
                life.peer.send(life.expected_by_us[at : at + 1400])
            info = tcpinfo.reader("rcv_ooopack")
            until(lambda: info(sockopt.tcp_info(life.ours))[0] > 0, what="a hole")
            life.move()
        finally:
            host.run(["nft", "delete table inet loss"])
        ends_well(life)


@families
def test_before_the_address_has_come(field: Field, family: str) -> None:
    """The connection waits at the destination while the source still has the address."""
    with field.life(family, full=True) as life, migrate.hold([], netns=life.mover.there.netns) as there:
        life.passive()
        life.fill()
        there.add([life.four_tuple])
        with migrate.hold([life.four_tuple], netns=life.mover.here.netns):
            record = migrate.dump(life.ours)
            with life.mover.there.entered():
                with pytest.raises(HostError, match="does not have the address"):
                    migrate.restore(record, activate=False)
                ours = migrate.restore(record, activate=False, before_address=True)
            migrate.release(life.ours)
            life.ours.close()
            life.mover.move_address()
        there.replay()
        migrate.activate(ours)
        there.lift()
        life.ours = ours
        life.ours.setblocking(False)
        assert not life.ours.getsockopt(socket.IPPROTO_IP, uapi.IP_TRANSPARENT)
        life.deliver()
        ends_well(life)


@families
def test_ecn(field: Field, family: str) -> None:
    """After the move segments are marked as capable, marks of congestion are echoed, and echoes are heard."""
    with field.life(family) as life, contextlib.ExitStack() as undo:
        for host in field.net.hosts.values():
            host.sysctl("net.ipv4.tcp_ecn", 1)
            undo.callback(host.sysctl, "net.ipv4.tcp_ecn", 2)
        life.passive()
        exchange(life)
        life.move(marks=undo.enter_context(Marks()))
        assert life.mover.record and life.mover.record.ecn == 1
        seen = len(life.wire.segments)

        def flagged(sender: bytes, flag: int) -> bool:
            return any(each.flags & flag for each in life.wire.segments[seen:] if each.source == sender)

        ours, peers = life.four_tuple.local, life.four_tuple.remote
        exchange(life)
        sent = [each for each in life.wire.segments[seen:] if each.source == ours and each.length]
        assert sent and all(each.ecn == ECT0 for each in sent)
        assert not flagged(ours, ECE | CWR) and not flagged(peers, ECE | CWR)
        for host, sender, receiver in ((life.client, peers, ours), (life.mover.here, ours, peers)):
            undo.callback(congested(host, family))
            for _ in range(3):  # what is echoed shows in the next segment with data
                exchange(life)
            assert flagged(receiver, ECE) and flagged(sender, CWR)
        ends_well(life)


def congested(host: Host, family: str) -> Callable[[], object]:
    """The host's way out marks large segments."""
    kind = "ip6" if family == "ipv6" else "ip"
    chain = f"chain c {{ type filter hook postrouting priority 0; meta length > 1000 {kind} ecn set ce; }}"
    host.run(["nft", f"table {kind} congested {{ {chain}; }}"])
    return lambda: host.run(["nft", "delete", "table", kind, "congested"])


@families
@pytest.mark.parametrize("first", ["crosses", "moves"])
def test_simultaneous_open(field: Field, family: str, first: str) -> None:
    """The SYNs cross, and then it moves; or SYN_SENT moves, and then they cross."""
    with field.life(family, full=True) as life:
        life.call()
        if first == "moves":
            life.move()
            assert life.state() is TcpState.SYN_SENT
        life.cross()
        if first == "crosses":
            life.fill()
            life.move()
        life.deliver()
        ends_well(life)
        for side in (life.four_tuple.local, life.four_tuple.remote):
            assert {SYN, SYN | ACK} <= {each.flags & (SYN | ACK) for each in life.wire.segments if each.source == side}
