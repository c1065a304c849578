"""kernel/nft.py, ForwardTable: single flows of an address live on another host, the others stay."""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from migrate.errors import HostError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.kernel import nf_tables
from migrate.kernel.nft import ForwardTable, tables
from migrate.steer.forward import Forward
from tests.fix_netns import Host, Lan, LanFactory, ip
from tests.kernel.pairs import unprivileged
from tests.waiting import until

PORT = 80
FAMILIES = [4, 6]


class Service:
    """One address on host a; b and c carry it too, where no ARP tells of it. Who answers says its name."""

    def __init__(self, net: Lan, family: int, stack: contextlib.ExitStack) -> None:
        self.net, self.client = net, net.host("client")
        self.family = socket.AF_INET if family == 4 else socket.AF_INET6
        self.vip = net.vip4 if family == 4 else net.vip6
        net.assign("a", self.vip)
        for name in ("b", "c"):
            host = net.host(name)
            host.sysctl("net.ipv4.conf.all.arp_ignore", 1)
            host.sysctl("net.ipv4.conf.all.arp_announce", 2)
            ip([f"address add {self.vip} dev lo {'nodad' if family == 6 else ''}"], namespace=host.netns)
        self.listeners = {name: stack.enter_context(self._listen(net.host(name))) for name in ("a", "b", "c")}

    def _listen(self, host: Host) -> socket.socket:
        with host.entered():
            listener = socket.create_server((self.vip, PORT), family=self.family)
        listener.settimeout(5)
        return listener

    def flow(self, port: int) -> FourTuple:
        """The connection from that port of the client, as the service names it."""
        own = self.client.ip4 if self.family == socket.AF_INET else self.client.ip6
        return FourTuple(self._packed(self.vip), PORT, self._packed(own), port)

    def hop(self, name: str) -> bytes:
        """The packed address of that host itself."""
        host = self.net.host(name)
        return self._packed(host.ip4 if self.family == socket.AF_INET else host.ip6)

    def _packed(self, address: str) -> bytes:
        return socket.inet_pton(self.family, address)

    def forwarding(self) -> ForwardTable:
        """The table of a's device."""
        a = self.net.host("a")
        with a.entered():
            return ForwardTable(a.dev)

    @contextlib.contextmanager
    def connected(self, port: int, name: str) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A connection from that port of the client that must reach that host."""
        with self.client.entered():
            here = socket.socket(self.family)
        with here:
            here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            here.bind(("", port))
            here.settimeout(5)
            here.connect((self.vip, PORT))
            with self.listeners[name].accept()[0] as there:
                there.settimeout(5)
                assert there.getpeername()[1] == port
                yield here, there

    def answers(self, port: int) -> str:
        """Who answers to a connection from that port."""
        with self.client.entered():
            here = socket.socket(self.family)
        with here:
            here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST at close: the port is free
            here.bind(("", port))
            here.settimeout(5)
            here.connect((self.vip, PORT))
            # The end of the handshake may still be on its way to whoever accepts.
            accepting, _, _ = select.select(self.listeners.values(), (), (), 5)
            (name,) = (name for name, listener in self.listeners.items() if listener in accepting)
            there, peer = self.listeners[name].accept()
            there.close()
            assert peer[1] == port
            return name


@pytest.fixture(params=FAMILIES, ids=["IPv4", "IPv6"])
def service(lan: LanFactory, request: pytest.FixtureRequest) -> Iterator[Service]:
    with contextlib.ExitStack() as stack:
        yield Service(lan("client", "a", "b", "c"), request.param, stack)


def test_single_flows_go_to_the_next_host_and_the_others_stay(service: Service) -> None:
    with service.forwarding() as table:
        assert service.answers(5001) == "a"
        table.add({service.flow(5001): service.hop("b"), service.flow(5002): service.hop("c")})
        assert [service.answers(port) for port in (5001, 5002, 5003)] == ["b", "c", "a"]
        table.add({service.flow(5001): service.hop("c"), service.flow(5003): service.hop("c")})
        assert [service.answers(port) for port in (5001, 5002, 5003)] == ["c", "c", "c"]
        table.remove([service.flow(5001), service.flow(5009)])
        assert [service.answers(port) for port in (5001, 5002)] == ["a", "c"]
        assert table.entries() == {service.flow(port): service.hop("c") for port in (5002, 5003)}
    assert service.answers(5002) == "c"  # it outlives its owner
    with service.forwarding() as table:
        assert table.entries() == {service.flow(port): service.hop("c") for port in (5002, 5003)}
        table.delete()
    assert service.answers(5002) == "a"
    with service.net.host("a").entered():
        assert tables() == {}


def test_a_forwarded_connection_carries_data_both_ways(service: Service) -> None:
    data = random.Random(4).randbytes(3_000_000)
    with service.forwarding() as table, service.net.capture("client") as wire:
        table.add({service.flow(5001): service.hop("b")})
        with service.connected(5001, "b") as (here, there), service.connected(5002, "a") as other:
            for one, two in ((here, there), (there, here), other):
                sender = threading.Thread(target=one.sendall, args=(data,))
                sender.start()
                digest = hashlib.sha256()
                left = len(data)
                while left:
                    block = two.recv(left)
                    assert block
                    digest.update(block)
                    left -= len(block)
                sender.join()
                assert digest.digest() == hashlib.sha256(data).digest()
    assert wire.rsts == []


def test_what_has_ended_shows(service: Service) -> None:
    flows = {service.flow(port): service.hop("b") for port in (5001, 5002, 5003)}
    with service.forwarding() as table:
        table.add(flows)
        with service.connected(5001, "b") as (here, there), service.connected(5002, "b") as (other, _):
            assert table.over(linger=0) == []
            here.shutdown(socket.SHUT_WR)
            assert there.recv(1) == b""
            there.sendall(b"half a connection is one")
            assert here.recv(4) == b"half"
            assert table.over() == []
            assert table.over(linger=0) == [service.flow(5001)]
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it ends with RST
            assert set(table.over(idle=0, linger=0)) == set(flows)
        until(lambda: set(table.over(linger=0)) == {service.flow(5001), service.flow(5002)})
        with service.connected(5002, "b"):  # another connection with the same numbers
            assert table.over(linger=0) == [service.flow(5001)]
        table.remove(table.over(linger=0))
        table.add({service.flow(5001): service.hop("c")})
        assert service.flow(5001) not in table.over(linger=0), "it remembers the one before"


def test_nothing_for_days_is_the_end(service: Service) -> None:
    with service.forwarding() as table:
        table.add({service.flow(port): service.hop("b") for port in (5001, 5002)})
        with service.connected(5001, "b") as (here, there):
            for ip_version in "46":  # as if the timeouts had run down
                service.net.host("a").run(["nft", "flush", "set", "netdev", table.name, f"active{ip_version}"])
            assert set(table.over()) == {service.flow(5001), service.flow(5002)}
            here.sendall(b"word")
            assert there.recv(4) == b"word"
            assert table.over() == [service.flow(5002)]
            with service.net.host("a").entered(), Forward() as forward:
                assert forward.sweep() == [service.flow(5002)]
                assert list(forward.given()) == [service.flow(5001)]
            here.sendall(b"word")
            assert there.recv(4) == b"word"


def test_several_may_change_the_table(service: Service) -> None:
    one, two, three = (service.flow(port) for port in (5001, 5002, 5003))
    b, c = service.hop("b"), service.hop("c")
    with service.forwarding() as mine, service.forwarding() as yours:
        mine.add({one: b, two: b})
        yours.add({one: c, three: c})  # unknown to `yours`: it looks again
        assert mine.entries() == {one: c, two: b, three: c}
        mine.remove([one])
        yours.remove([one, two])
        mine.add({three: b})
        mine.add({three: b})
        yours.add({three: c, two: c})
        assert mine.entries() == yours.entries() == {two: c, three: c}


def test_a_device_that_went_and_came_back_is_served_again(lan: LanFactory) -> None:
    net = lan("client", "a", "b")
    a = net.host("a")
    flow = FourTuple.parse("10.0.0.100:80,10.0.0.1:5001")
    ip(["link add name x0 type veth peer name x1", "link set x0 up", "link set x1 up"], namespace=a.netns)
    with a.entered():
        with ForwardTable("x0", via=a.dev) as table:
            assert table.name == "tcpmig-forward-x0-eth0"
            table.add({flow: bytes((10, 0, 0, 3))})
        ip(["link del x0", "link add name x0 type veth peer name x1", "link set x0 up"], namespace=a.netns)
        with ForwardTable("x0", via=a.dev) as table:
            assert list(table.entries()) == [flow]
        rules = a.run(["nft", "list", "table", "netdev", "tcpmig-forward-x0-eth0"]).stdout
    assert [line.strip() for line in rules.splitlines() if "device" in line] == [
        'type filter hook ingress device "x0" priority -500; policy accept;',
        'fwd ip to ip daddr . tcp dport . ip saddr . tcp sport map @flows4 device "eth0"',
        'fwd ip6 to ip6 daddr . tcp dport . ip6 saddr . tcp sport map @flows6 device "eth0"',
    ]


def test_bad_input_changes_nothing(service: Service) -> None:
    good, b = service.flow(5001), service.hop("b")
    other = bytes(20 - len(b))
    with service.forwarding() as table:
        table.add({good: b})
        for bad in ({service.flow(5002): other}, {service.flow(5002)._replace(local=other): b}):
            with pytest.raises(UsageError):
                table.add({good: service.hop("c"), **bad})
        assert table.entries() == {good: b}
        table.add({})
        table.remove([])
        service.net.host("a").run(["nft", "flush", "ruleset"])
        for attempt in (lambda: table.add({good: service.hop("c")}), lambda: table.remove([good]), table.entries):
            with pytest.raises(NotFound, match="is gone"):
                attempt()


def test_what_cannot_be_is_explained(lan: LanFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = lan("a").hosts.values()
    with a.entered():
        for arguments in (("eth9",), (a.dev, "eth9")):
            with pytest.raises(NotFound, match="no device 'eth9' here"):
                ForwardTable(*arguments)
        monkeypatch.setattr(nf_tables, "forward", lambda *_: nf_tables._expression("nofwd"))
        with pytest.raises(HostError, match="CONFIG_NFT_FWD_NETDEV"):
            ForwardTable(a.dev)
        assert tables() == {}
    assert unprivileged(lambda: ForwardTable("lo")).startswith("PrivilegeError: ")
