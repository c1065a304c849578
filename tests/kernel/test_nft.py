"""kernel/nft.py: what the tables do to real connections, and that every change is whole."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from migrate.errors import Conflict, HostError, KernelError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.kernel import nf_tables, nft_table
from migrate.kernel.nflog import Listener
from migrate.kernel.nft import MARK, GuardTable, HoldTable, sweep, tables
from tests.capture import Segment
from tests.fix_netns import Host, LanFactory
from tests.kernel.pairs import KINDS, echo, pair, unprivileged
from tests.waiting import until

V4 = FourTuple.parse("10.0.0.1:80,10.0.0.9:53972")
V6 = FourTuple.parse("[fd00::1]:80,[fd00::9]:53972")


def many(count: int, *, version: int = 4) -> list[FourTuple]:
    """As many different connections."""
    first = bytes((10, 1)) if version == 4 else bytes((0xFD,)) + bytes(13)
    ends = (divmod(number, 60_000) for number in range(count))
    return [FourTuple(first + b"\0\1", 80, first + bytes((0, 2 + high)), 1000 + low) for high, low in ends]


@pytest.fixture
def host(lan: LanFactory) -> Host:
    return lan("a").host("a")


@contextlib.contextmanager
def holding(host: Host, name: str = "x") -> Iterator[tuple[HoldTable, Listener]]:
    with host.entered():
        listener = Listener()
        table = HoldTable.create(name, listener.group)
    with listener, contextlib.closing(table):
        yield table, listener
        table.delete()


def silent(sock: socket.socket) -> bool:
    """Whether nothing comes within a while in which a segment crosses the wire a thousand times."""
    return not select.select([sock], [], [], 0.1)[0]


def listed(host: Host) -> str:
    return host.run(["nft", "list", "ruleset"]).stdout


# The hold


def test_the_rules_are_what_they_should_be_in_the_words_of_nft(host: Host) -> None:
    with holding(host) as (table, listener):
        table.add([V4], 60)
        table.add([V6], 3600, outgoing=False)
        lines = [line.strip() for line in listed(host).splitlines()]
    group = f"log group {listener.group} queue-threshold 1 drop"
    assert lines[0] == "table inet tcpmig-hold-x {"
    rules = [line for line in lines if line.endswith(("accept", "drop")) or line.startswith("type filter")]
    assert rules == [
        "type filter hook prerouting priority raw; policy accept;",
        f"meta mark {MARK:#x} accept",
        f"ip daddr . tcp dport . ip saddr . tcp sport @held4 {group}",
        f"ip6 daddr . tcp dport . ip6 saddr . tcp sport @held6 {group}",
        f"ip daddr . tcp dport . ip saddr . tcp sport @arriving4 {group}",
        f"ip6 daddr . tcp dport . ip6 saddr . tcp sport @arriving6 {group}",
        "type filter hook output priority raw; policy accept;",
        f"meta mark {MARK:#x} accept",
        "ip saddr . tcp sport . ip daddr . tcp dport @held4 drop",
        "ip6 saddr . tcp sport . ip6 daddr . tcp dport @held6 drop",
    ]
    held = [line.split(" expires ")[0] for line in lines if line.startswith("elements")]
    assert held == [
        "elements = { 10.0.0.1 . 80 . 10.0.0.9 . 53972 timeout 1m",
        "elements = { fd00::1 . 80 . fd00::9 . 53972 timeout 1h",
    ]
    assert listed(host) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_connection_stands_still_from_both_sides(lan: LanFactory, kind: str) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with pair(client, a, kind) as ends, pair(client, a, kind) as other, holding(a) as (table, listener):
        table.add([ends.flow], 60)
        with net.capture(a) as wire:
            ends.client.sendall(b"to the server")
            ends.server.sendall(b"to the client")
            assert silent(ends.server)
            assert silent(ends.client)
            echo(other)
            kept: list[bytes] = []

            def ours() -> list[Segment]:
                return [s for s in wire.segments if ends.flow.remote_port in (s.source_port, s.destination_port)]

            def all_kept() -> bool:  # the client may be repeating itself meanwhile
                kept.extend(listener.read())
                return 0 < len(kept) == len(ours())

            until(all_kept)
            assert not any(segment.outgoing for segment in ours())
        assert all(packet.endswith(b"to the server") for packet in kept)
        table.remove([ends.flow])
        assert ends.server.recv(100) == b"to the server"
        assert ends.client.recv(100) == b"to the client"


def test_the_sides_are_held_and_let_go_one_by_one(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with pair(client, a, "IPv4") as ends, holding(a) as (table, listener):
        table.add([ends.flow], 60, outgoing=False)
        ends.client.sendall(b"question")
        assert silent(ends.server)
        assert len(until(listener.read)) >= 1
        ends.server.sendall(b"answer")
        assert ends.client.recv(10) == b"answer"
        table.add([ends.flow], 60, outgoing=True)
        ends.server.sendall(b"more")
        assert silent(ends.client)
        assert table.elements()[ends.flow].outgoing
        table.add([ends.flow], 60, outgoing=False)
        assert ends.client.recv(10) == b"more"
        assert silent(ends.server)
        assert [held.outgoing for held in table.elements().values()] == [False]


def test_marked_segments_pass_both_ways(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with pair(client, a, "IPv4") as ends, holding(a) as (table, _):
        table.add([ends.flow], 60)
        ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        ends.server.sendall(b"marked")
        assert ends.client.recv(10) == b"marked"
        a.run(["nft", "add table netdev t; add chain netdev t in { type filter hook ingress device eth0 priority 0; }; "
               f"add rule netdev t in meta mark set {MARK:#x}"])  # fmt: skip
        ends.client.sendall(b"marked too")
        assert ends.server.recv(10) == b"marked too"


def test_a_hold_ends_by_itself(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with pair(client, a, "IPv4") as ends, holding(a) as (table, _):
        started = time.monotonic()
        table.add([ends.flow], 0.5)
        ends.client.sendall(b"hello")
        assert ends.server.recv(5) == b"hello"
        assert time.monotonic() - started >= 0.5
        assert table.elements() == {}


def test_a_hold_outlives_its_killed_owner_and_then_ends(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    with pair(client, a, "IPv4") as ends:
        program = (
            "import sys, time; from migrate.fourtuple import FourTuple; from migrate.kernel.nft import HoldTable\n"
            "from migrate.kernel.nflog import Listener\n"
            "listener = Listener(); table = HoldTable.create('dead', listener.group)\n"
            "table.add([FourTuple.parse(sys.argv[1])], 1.5); print('held', flush=True); time.sleep(60)"
        )
        owner = a.popen([sys.executable, "-c", program, str(ends.flow)], stdout=subprocess.PIPE)
        assert owner.stdout
        assert owner.stdout.readline() == b"held\n"
        held = time.monotonic()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with a.entered():
            assert sweep() == []  # it still holds
            ends.client.sendall(b"hello")
            assert silent(ends.server)
            assert ends.server.recv(5) == b"hello"
            assert time.monotonic() - held > 1
            assert until(sweep) == ["tcpmig-hold-dead"]
        assert listed(a) == ""


def test_thousands_are_held_renewed_and_let_go_exactly(host: Host) -> None:
    with holding(host) as (table, _):
        both = many(10_000) + many(3000, version=6)
        table.add(both, 100)
        assert table.elements().keys() == set(both)
        table.add(both[::2], 1000, outgoing=False)
        table.remove(both[::3])
        expected = {each: number % 2 == 1 for number, each in enumerate(both) if number % 3}
        assert table.members == expected
        found = table.elements()
        assert {each: held.outgoing for each, held in found.items()} == expected
        assert all((held.left > 500) is not held.outgoing for held in found.values())
        table.refresh(5000)
        assert {each: held.outgoing for each, held in table.elements().items()} == expected
        assert all(held.left > 4000 for held in table.elements().values())
        table.remove(both)
        assert not table.elements()
        assert not table.members


def test_more_than_a_socket_may_send_is_refused_whole_and_says_what_helps(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(host) as (table, _):
        table._netfilter._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # whatever the host's default
        monkeypatch.setattr(type(table._netfilter), "_enlarge_send_buffer", lambda *_: None)
        with pytest.raises(HostError, match=r"sysctl net.core.wmem_max=\d{6}"):
            table.add(many(3000), 60)
        assert not table.elements()
        assert not table.members
        monkeypatch.undo()
        table.add(many(3000), 60)
        assert table.elements().keys() == set(many(3000))


def test_one_bad_element_changes_nothing(host: Host) -> None:
    with holding(host) as (table, _):
        table.add([V4], 60)
        for bad in (
            FourTuple(V4.local, 80, V6.remote, 80),
            FourTuple(V6.local, 80, V4.remote, 80),
            FourTuple(b"", 80, b"", 80),
            FourTuple(V4.local, 0x10000, V4.remote, 80),
            FourTuple(V4.local, 80, V4.remote, -1),
        ):
            with pytest.raises(UsageError):
                table.add([*many(5000), bad], 60)
        place = nf_tables.Place(table.family, table.name, "held4")
        _, good = next(nft_table.keys(many(5000)))
        requests = [*nf_tables.add_elements(place, good), *nf_tables.delete_elements(place, [bytes(16)])]
        with pytest.raises(KernelError, match="ENOENT"):
            table._netfilter.commit("a test", requests)
        assert table.elements().keys() == table.members.keys() == {V4}


def test_what_has_expired_or_was_never_held_can_be_removed_and_renewed(host: Host) -> None:
    with holding(host) as (table, _):
        table.add([V4], 0.001)
        table.add([V6], 60)
        until(lambda: V4 not in table.elements())
        table.remove([V4, V6, *many(3)])
        assert table.elements() == {}
        table.add([V4, V6], 0.001)
        until(lambda: not table.elements())
        table.refresh(60)
        assert table.elements().keys() == {V4, V6}
        table.add([], 60)
        table.remove([])
        assert table.elements().keys() == {V4, V6}


def test_a_flushed_ruleset_is_noticed(host: Host) -> None:
    with holding(host) as (table, _):
        table.add([V4], 60)
        host.run(["nft", "flush", "ruleset"])
        for attempt in (lambda: table.add([V6], 60), lambda: table.remove([V4]), table.elements, table.reload):
            with pytest.raises(NotFound, match=r"table tcpmig-hold-x is gone \(somebody flushed"):
                attempt()
        assert table.members == {V4: True}


def test_names_are_taken_once_and_adopted(host: Host) -> None:
    with holding(host, "agent-1") as (table, listener), host.entered():
        table.add([V4], 60)
        table.add([V6], 60, outgoing=False)
        with pytest.raises(Conflict, match="there is a table tcpmig-hold-agent-1 already"):
            HoldTable.create("agent-1", 1)
        with pytest.raises(NotFound, match="no table tcpmig-hold-agent-2"):
            HoldTable.adopt("agent-2")
        with pytest.raises(UsageError, match="no name for a table"):
            HoldTable.create("a b", 1)
        table.close()
        with HoldTable.adopt("agent-1") as adopted:
            assert adopted.group == listener.group
            assert adopted.members == {V4: True, V6: False}
            adopted.remove([V4])
            assert adopted.elements().keys() == {V6}
        assert tables() == {"tcpmig-hold-agent-1": f"tcpmig: hold, NFLOG group {listener.group}"}
        HoldTable.adopt("agent-1").delete()
        assert tables() == {}
        adopted.delete()  # of what is gone: nothing to do


def test_sweeping_takes_what_holds_nothing_and_has_no_listener(host: Host) -> None:
    host.run(["nft", "add table inet tcpmig-hold-foreign; add table inet other; add table ip tcpmig-hold-ip"])
    with host.entered():
        for name, group in (("empty", 1), ("full", 2), ("heard", 3)):
            with HoldTable.create(name, group) as table:
                if name == "full":
                    table.add([V6], 60, outgoing=False)
        GuardTable(V4.local).close()
        with Listener(3):
            assert sweep() == ["tcpmig-hold-empty"]
        assert sweep() == ["tcpmig-hold-heard"]
        assert sweep() == []
    left = ["tcpmig-guard-0a000001", "tcpmig-hold-foreign", "tcpmig-hold-full", "tcpmig-hold-ip"]
    with host.entered():
        assert sorted(tables()) == left


def test_what_nftables_lacks_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf_tables, "log", lambda group: nf_tables._expression("nolog"))
    with host.entered():
        with pytest.raises(HostError, match="CONFIG_NFT_LOG"):
            HoldTable.create("x", 1)
        assert tables() == {}


def test_privilege_is_asked_for() -> None:
    for attempt in (lambda: HoldTable.create("x", 1), lambda: GuardTable(bytes(4)), sweep):
        assert unprivileged(attempt).startswith("PrivilegeError: ")


def test_one_change_is_quick(host: Host) -> None:
    """In time on a processor, which the machine's load does not change, and with room above what is usual."""

    def milliseconds(*steps: Callable[[], object]) -> list[float]:
        times = []
        for step in steps:
            started = time.thread_time()
            step()
            times.append((time.thread_time() - started) * 1000)
        return times

    with holding(host) as (table, _):
        lot = many(10_000)
        single = [milliseconds(lambda: table.add([V4], 60), lambda: table.remove([V4])) for _ in range(50)]
        batch = [milliseconds(lambda: table.add(lot, 60), lambda: table.remove(lot)) for _ in range(5)]
    for limit, times in ((0.3, single), (75, batch)):
        for step in zip(*times, strict=True):
            assert statistics.median(step) < limit
