"""hold.py: held connections stand still, what arrives is kept and given back, nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import Conflict, HostError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.hold import Hold
from migrate.kernel import sockopt, tcpinfo
from migrate.kernel.nft import HoldTable, tables
from migrate.kernel.segment import Segment
from tests.fix_netns import Host, Lan, LanFactory, ip
from tests.kernel.pairs import KINDS, Pair, flow, pair, unacknowledged, unprivileged
from tests.peers import Peer
from tests.waiting import until

SO_MAX_PACING_RATE = 47  # include/uapi/asm-generic/socket.h


@pytest.fixture
def net(lan: LanFactory) -> Lan:
    """Client and server; the client repeats nothing before ten seconds, so that each repetition is our fault."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    client.sysctl("net.ipv4.tcp_early_retrans", 0)  # no loss probe after two round trips
    routes = [f"route add {address} dev {client.dev} rto_min 10s" for address in (a.ip4, a.ip6)]
    ip(routes, namespace=client.netns)
    return net


@pytest.fixture(params=KINDS)
def ends(net: Lan, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pair(net.host("client"), net.host("a"), request.param) as ends:
        yield ends


@pytest.fixture(autouse=True)
def _nothing_left(lan: LanFactory) -> Iterator[None]:
    gc.collect()
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if is_ours(name))


def is_ours(name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "socket:" in os.readlink(f"/proc/self/fd/{name}")
    return False


def left(host: Host) -> list[str]:
    """The tables of ours that stand in a host."""
    with host.entered():
        return list(tables())


def retransmissions(sock: socket.socket) -> int:
    return tcpinfo.parse(sockopt.tcp_info(sock)).total_retrans


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


WORDS = [b"one", b"two", b"three", b"four"]
SAID = b"".join(WORDS)


def say(sock: socket.socket) -> bytes:
    """Four segments, which GRO may put together; what they say."""
    for word in WORDS:
        sock.sendall(word)
    return SAID


def payload(packets: list[bytes]) -> bytes:
    return b"".join(Segment.parse(packet).payload for packet in packets)


def collected(hold: Hold, name: FourTuple, length: int = len(SAID)) -> list[bytes]:
    """What is kept of that connection once it comes to so many bytes."""

    def enough() -> bool:
        hold.collect()
        return len(payload(hold.kept.get(name, []))) >= length

    until(enough)
    return hold.kept[name]


def test_what_arrives_is_kept_and_replayed_and_the_peer_repeats_nothing(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    with net.capture("client") as wire, Hold([ends.flow], netns=a.netns) as hold:
        said = say(ends.client)
        kept = [Segment.parse(packet) for packet in collected(hold, ends.flow)]
        sent = [segment for segment in wire.segments if segment.outgoing]
        assert b"".join(segment.payload for segment in kept) == said
        assert sum(segment.length for segment in sent) == len(said)
        assert {segment.seq for segment in kept} <= {segment.seq for segment in sent}
        assert all(segment.four_tuple == ends.flow for segment in kept)
        assert not readable(ends.server)
        assert hold.replay() == len(kept)
        assert ends.server.recv(100, socket.MSG_DONTWAIT) == said
        until(lambda: unacknowledged(ends.client) == 0)  # its acknowledgement got out
        assert hold.kept == {}
        assert hold.tuples == {ends.flow: False}
        say(ends.client)
        collected(hold, ends.flow)
    assert left(a) == []
    assert ends.server.recv(100) == SAID
    ends.server.sendall(SAID)
    assert ends.client.recv(100) == SAID
    until(lambda: unacknowledged(ends.server) == 0)
    assert wire.retransmissions == wire.rsts == []
    assert retransmissions(ends.client) == retransmissions(ends.server) == 0
    assert hold.lost == hold.dropped == 0


def test_nothing_leaves_while_both_sides_are_held(net: Lan, ends: Pair) -> None:
    a = net.host("a")

    def outgoing() -> int:
        return len([segment for segment in wire.segments if segment.outgoing])

    with net.capture(a) as wire, Hold([ends.flow], netns=a.netns, outgoing=False) as hold:
        ends.server.sendall(b"an answer still gets out")
        assert ends.client.recv(100) == b"an answer still gets out"
        until(hold.collect)
        hold.replay()  # the client's acknowledgement
        until(lambda: unacknowledged(ends.server) == 0)
        hold.add([ends.flow])
        before = outgoing()
        ends.server.sendall(b"held")
        say(ends.client)
        collected(hold, ends.flow)
        assert outgoing() == before
        hold.remove([ends.flow])
        assert ends.client.recv(100) == b"held"
        assert ends.server.recv(100) == SAID
        assert hold.tuples == {}
    assert left(a) == []


def failed(*peers: Peer) -> bool:
    return any(peer._errors for peer in peers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bulk_stream_survives_holds_of_all_kinds(lan: LanFactory, kind: str) -> None:
    """Both directions at once, with segments as large as GRO makes them, at a pace that leaves time for the holds."""
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    size, pace = 20_000_000, 15_000_000
    with pair(client, a, kind) as ends, Hold(netns=a.netns) as hold:
        for sock in (ends.client, ends.server):
            sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pace)
        one = Peer(ends.client, send=size, receive=size, seed=1)
        two = Peer(ends.server, send=size, receive=size, seed=2)

        def moved() -> int:
            return one.received + two.received

        def over() -> bool:
            return moved() == 2 * size or failed(one, two)

        def goes_on() -> bool:
            return moved() > before or over()

        largest = rounds = before = 0
        while not over():
            hold.add([ends.flow], outgoing=bool(rounds % 2))
            select.select([hold], [], [], 0.02)
            hold.collect()
            largest = max(largest, 0, *(len(packet) for packet in hold.kept.get(ends.flow, [])))
            if rounds % 3:
                hold.replay()
            hold.remove([ends.flow])
            before = moved()
            until(goes_on)
            rounds += 1
        one.join()
        two.join()
    assert one.received_digest == two.sent_digest
    assert two.received_digest == one.sent_digest
    assert rounds >= 4  # each way to hold with each way to let go
    assert largest > 3000
    assert hold.dropped == 0


def test_full_packets_over_lo_come_through_although_nflog_cuts_them(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    size = 40_000_000
    with pair(a, a, "IPv4") as ends, Hold(netns=a.netns) as hold:
        one = Peer(ends.client, send=size, receive=0)
        two = Peer(ends.server, receive=size)
        cut = 0
        while cut == 0 and two.received < size and not failed(one, two):
            hold.add([ends.flow], outgoing=False)
            select.select([hold], [], [], 0.02)
            hold.collect()
            cut += sum(len(packet) == 65_531 for packet in hold.kept.get(ends.flow, []))
            hold.remove([ends.flow])
        two.join()
        one.join()
    assert two.received_digest == one.sent_digest
    assert cut > 0
    assert hold.dropped == 0


def test_what_another_host_kept_comes_first_and_waits_for_the_address(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    with Hold([ends.flow], netns=a.netns) as hold:
        ends.client.sendall(b"older")
        collected(hold, ends.flow, 5)
        older = hold.take([ends.flow])
        assert hold.kept == {}
        ends.client.sendall(b"newer")
        collected(hold, ends.flow, 5)
        hold.keep(packet for packets in older.values() for packet in packets)
        assert payload(hold.kept[ends.flow]) == b"oldernewer"
        a.run(["ip", "address", "flush", "dev", a.dev])
        for attempt in (hold.replay, lambda: hold.remove([ends.flow])):
            with pytest.raises(HostError, match="no address of this host"):
                attempt()
        assert hold.tuples == {ends.flow: False}
        assert payload(hold.kept[ends.flow]) == b"oldernewer"
        addresses = [f"address add {a.ip4}/24 dev {a.dev}", f"address add {a.ip6}/64 dev {a.dev} nodad"]
        ip(addresses, namespace=a.netns)

        def replayed() -> int:
            with contextlib.suppress(HostError):  # the kernel makes the route of a new IPv6 address a little later
                return hold.replay()
            return 0

        assert until(replayed) == 2
        assert ends.server.recv(100) == b"oldernewer"
        until(lambda: unacknowledged(ends.client) == 0)
    assert retransmissions(ends.client) == 0


@pytest.mark.parametrize("count", [1, 30], ids=["one", "many"])
def test_no_reset_goes_to_the_peer_of_a_connection_that_is_elsewhere(net: Lan, count: int) -> None:
    client, a = net.host("client"), net.host("a")
    with contextlib.ExitStack() as stack, net.capture(client) as wire:
        gone = [stack.enter_context(pair(client, a, KINDS[number % 3])) for number in range(count)]
        stays = stack.enter_context(pair(client, a, "IPv4"))
        hold = stack.enter_context(Hold([each.flow for each in (*gone, stays)], netns=a.netns))
        for each in gone:
            sockopt.enter_repair(each.server)
            each.server.close()  # silently
        for each in (*gone, stays):
            each.client.sendall(b"to whom?")
            collected(hold, each.flow, 8)
        hold.remove([gone[0].flow])
        hold.lift()
        assert stays.server.recv(100) == b"to whom?"
        until(lambda: unacknowledged(stays.client) == 0)
        assert wire.rsts == []
        assert hold.dropped == count
        assert left(a) == []


def test_what_is_too_much_is_dropped_and_counted(net: Lan) -> None:
    a = net.host("a")
    with pair(net.host("client"), a, "IPv4") as ends, Hold([ends.flow], netns=a.netns, limit=250) as hold:

        def send(dropped: int) -> None:
            ends.client.sendall(bytes(100))  # 152 bytes with its headers
            until(lambda: hold.collect() or hold.dropped == dropped)

        for dropped in range(3):
            send(dropped)
        assert [len(packet) for packet in hold.kept[ends.flow]] == [152]
        assert hold.dropped == 2
        hold.discard()
        assert hold.kept == {}
        ends.client.sendall(bytes(100))  # there is room again
        collected(hold, ends.flow, 100)
        assert hold.dropped == 2


def test_damaged_and_foreign_packets_are_not_replayed(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    with Hold([ends.flow], netns=a.netns) as hold:
        ends.client.sendall(b"hello")
        (packet,) = collected(hold, ends.flow, 5)
        damaged = Segment.parse(packet).build()[:-1] + b"0"
        hold.discard()
        hold.keep([b"noise", b"", packet[:30], damaged])
        assert hold.dropped == 3
        assert hold.replay() == 0
        assert hold.dropped == 4
        assert not readable(ends.server)
        hold.keep([packet])
        assert hold.replay() == 1
        assert ends.server.recv(100) == b"hello"


def test_a_forked_child_can_finish(net: Lan, ends: Pair) -> None:
    """As the command line's guard does: it is forked before anything is held."""
    a = net.host("a")
    hold = Hold(netns=a.netns)
    listens, says = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(says)
            os.read(listens, 1)
            status = 0 if hold.tuples == {ends.flow: True} else 2
            hold.lift()
        finally:
            os._exit(status)
    os.close(listens)
    hold.add([ends.flow])
    said = say(ends.client)
    hold.disown()
    hold.lift()  # no more this process's to lift
    assert hold.fileno() == -1
    assert len(left(a)) == 1
    assert not readable(ends.server)
    os.close(says)
    assert os.waitpid(child, 0)[1] == 0
    assert left(a) == []
    assert ends.server.recv(100) == said
    until(lambda: unacknowledged(ends.client) == 0)
    assert retransmissions(ends.client) == 0


def test_a_dead_owners_hold_is_adopted_by_its_name(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    program = (
        "import sys, time; from migrate.fourtuple import FourTuple; from migrate.hold import Hold\n"
        "hold = Hold([FourTuple.parse(sys.argv[1])], name='agent'); print('held', flush=True); time.sleep(60)"
    )
    owner = a.popen([sys.executable, "-c", program, str(ends.flow)], stdout=subprocess.PIPE)
    assert owner.stdout
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(Conflict, match="in use by another process"):
        Hold.adopt("agent", netns=a.netns)
    with pytest.raises(Conflict, match="there is a table tcpmig-hold-agent already"):
        Hold(name="agent", netns=a.netns)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with Hold.adopt("agent", netns=a.netns) as hold:
        assert hold.name == "agent"
        assert hold.tuples == {ends.flow: True}
        said = say(ends.client)
        collected(hold, ends.flow)
        assert not readable(ends.server)
    assert ends.server.recv(100) == said
    assert left(a) == []
    with pytest.raises(NotFound, match="no table tcpmig-hold-agent here"):
        Hold.adopt("agent", netns=a.netns)


def test_one_thread_holds_both_ends_in_two_namespaces(net: Lan, ends: Pair) -> None:
    client, a = net.host("client"), net.host("a")
    there = flow(ends.client)
    assert there == ends.flow.reversed()
    with Hold([ends.flow], netns=a.netns, outgoing=False) as one, Hold([there], netns=client.netns) as two:
        two.add([there], outgoing=False)
        said, answer = say(ends.client), b"answer"
        ends.server.sendall(answer)
        collected(one, ends.flow)
        collected(two, there, len(answer))
        two.replay()
        one.replay()
        assert ends.client.recv(100) == answer
        assert ends.server.recv(100) == said
    assert left(a) == left(client) == []


def test_a_hold_ends_after_its_time_unless_it_is_refreshed(net: Lan) -> None:
    a = net.host("a")
    with pair(net.host("client"), a, "IPv4") as ends, Hold([ends.flow], netns=a.netns, timeout=0.5) as hold:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            hold.refresh()
            time.sleep(0.1)
        ends.client.sendall(b"hello")
        collected(hold, ends.flow, 5)
        assert not readable(ends.server)
        hold.refresh(0.001)
        with a.entered(), HoldTable.adopt(hold.name) as table:
            until(lambda: not table.elements())
        ends.client.sendall(b" again")  # and soon the client repeats what was held
        assert ends.server.recv(11, socket.MSG_WAITALL) == b"hello again"


def test_a_flushed_ruleset_does_not_keep_it_from_ending(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    with Hold([ends.flow], netns=a.netns) as hold:
        said = say(ends.client)
        collected(hold, ends.flow)
        a.run(["nft", "flush", "ruleset"])
        with pytest.raises(NotFound, match="is gone"):
            hold.add([ends.flow])
    assert ends.server.recv(100) == said


def test_an_error_within_leaves_nothing_behind(net: Lan, ends: Pair) -> None:
    a = net.host("a")
    with pytest.raises(ZeroDivisionError), Hold([ends.flow], netns=a.netns):
        raise ZeroDivisionError
    bad = FourTuple(ends.flow.local, 80, b"", 80)
    with pytest.raises(UsageError):
        Hold([ends.flow, bad], netns=a.netns)
    with pytest.raises(NotFound, match="no network namespace 'tcpmig-none'"):
        Hold(netns="tcpmig-none")
    hold = Hold(netns=a.netns)
    hold.lift()
    hold.lift()
    hold.disown()
    assert hold.fileno() == -1
    assert left(a) == []


def test_privilege_is_asked_for() -> None:
    assert unprivileged(Hold).startswith("PrivilegeError: ")


def test_an_ordinary_user_holds_in_a_namespace_of_his_own(lan: LanFactory) -> None:
    """Where user namespaces are allowed: with what SO_RCVBUFFORCE and SO_SNDBUFFORCE refuse there."""
    program = (
        "import socket, subprocess; from migrate.hold import Hold; from tests.kernel.pairs import flow\n"
        "subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)\n"
        "with socket.create_server(('127.0.0.1', 0)) as listener:\n"
        "    client = socket.create_connection(listener.getsockname()); server = listener.accept()[0]\n"
        "with client, server, Hold([flow(server)], outgoing=False) as hold:\n"
        "    client.sendall(b'hello')\n"
        "    while not hold.collect(): pass\n"
        "    hold.replay()\n"
        "    assert server.recv(5) == b'hello'\n"
    )
    (a,) = lan("a").hosts.values()
    a.run(["unshare", "-Urn", sys.executable, "-c", program], cwd=Path(__file__).parents[2])
