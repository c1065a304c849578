"""Hosts behind a DNAT load balancer, and agents on them.

scene = Scene(lan, agents, family=6)               # the balancer gives new connections to `a`
with scene.dial() as sock:                          # through it
    with scene.balancer.apart(port):                # move it
        scene.balancer.repoint(port, scene.b.host)
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
from collections.abc import Iterator

from tests.crowd import ADOPTED
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Host, Lan, LanFactory, ip

__all__ = ["BEHIND", "CLIENT", "Balancer", "Scene", "balanced", "end"]

CLIENT = {4: "10.1.0.1", 6: "fd01::1"}
OUTSIDE = {4: "10.1.0.2", 6: "fd01::2"}  # the balancer's end of the client's network
NET = {4: "10.1.0.0/24", 6: "fd01::/64"}
PORT, BEHIND = 80, 8080  # of the service, and of the hosts behind the balancer


def balanced(lan: LanFactory) -> Lan:
    """The balancer ``lb`` has the floating addresses; the client's route to them goes through it, and theirs back."""
    net = lan("lb", "a", "b", "client")
    lb, client = net.host("lb"), net.host("client")
    for family, vip in ((4, net.vip4), (6, net.vip6)):
        bits, nodad = ("24", "") if family == 4 else ("64", "nodad")
        net.assign(lb, vip)
        ip([f"address add {OUTSIDE[family]}/{bits} dev {lb.dev} {nodad}"], namespace=lb.netns)
        ip([f"address flush dev {client.dev} to {vip}/{bits}"], namespace=client.netns)
        ip([f"address add {CLIENT[family]}/{bits} dev {client.dev} {nodad}"], namespace=client.netns)
        ip([f"route add {vip} via {OUTSIDE[family]}"], namespace=client.netns)
        for backend in (net.host("a"), net.host("b")):
            ip([f"route add {NET[family]} via {end(lb, family)}"], namespace=backend.netns)
    lb.await_neighbours(OUTSIDE[6])
    client.await_neighbours(CLIENT[6])
    lb.sysctl("net.ipv4.ip_forward", 1)
    lb.sysctl("net.ipv6.conf.all.forwarding", 1)
    # All are on one link. Told so by the balancer (ICMP redirect), they would leave it out.
    for name in ("all", lb.dev):
        lb.sysctl(f"net.ipv4.conf.{name}.send_redirects", 0)
    for host in net.hosts.values():
        host.sysctl(f"net.ipv6.conf.{host.dev}.accept_redirects", 0)
    for kind in ("ip", "ip6"):
        lb.run(["nft", f"table {kind} nat {{ chain prerouting {{ type nat hook prerouting priority dstnat; }}; }}"])
    return net


def end(host: Host, family: int) -> str:
    """The host's own address."""
    return host.ip4 if family == 4 else host.ip6


def _written(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Balancer:
    """What ``lb`` does for the one connection of a client."""

    def __init__(self, net: Lan, family: int) -> None:
        self.host, self.family = net.host("lb"), family
        self.kind = "ip" if family == 4 else "ip6"
        self.client, self.vip = CLIENT[family], net.vip4 if family == 4 else net.vip6

    def serve(self, backend: Host) -> None:
        """New connections go there."""
        to = _written(end(backend, self.family), BEHIND)
        self.host.run(["nft", f"add rule {self.kind} nat prerouting tcp dport {PORT} dnat to {to}"])

    @contextlib.contextmanager
    def apart(self, port: int) -> Iterator[None]:
        """Meanwhile nothing passes between the hosts and the client's ``port``."""
        with self.deaf_to(f"daddr {self.client} tcp dport {port}"):
            self.drop(f"saddr {self.client} tcp sport {port}")
            yield

    @contextlib.contextmanager
    def deaf_to(self, what: str) -> Iterator[None]:
        """Meanwhile this does not pass, nor what is dropped besides."""
        chain = f"add chain {self.kind} moving early {{ type filter hook prerouting priority -300; }}"
        self.host.run(["nft", f"add table {self.kind} moving; {chain}"])
        try:
            self.drop(what)
            yield
        finally:
            self.host.run(["nft", "delete table", self.kind, "moving"])

    def drop(self, what: str) -> None:
        """Within `deaf_to`: this does not pass either."""
        self.host.run(["nft", f"add rule {self.kind} moving early {self.kind} {what} drop"])

    def repoint(self, port: int, backend: Host) -> None:
        """The connection's segments go there from now on."""
        there = ["-p", "tcp", "-s", self.client, "-d", self.vip, "--sport", str(port), "--dport", str(PORT)]
        back = ["-r", self.vip, "-q", self.client, "--reply-port-src", str(PORT), "--reply-port-dst", str(port)]
        to = ["--dst-nat", _written(end(backend, self.family), BEHIND)]
        state = ["--state", "ESTABLISHED", "-u", "ASSURED,SEEN_REPLY", "-t", "3600"]
        self.host.run(["conntrack", "-D", "-f", f"ipv{self.family}", *there])
        self.host.run(["conntrack", "-I", *there, *back, *to, *state])


class Scene:
    """A balancer, two agents behind it, and a client's connection, which begins at ``a``."""

    def __init__(self, lan: LanFactory, agents: Agents, family: int = 4, adopt: str = "") -> None:
        self.net, self.family = balanced(lan), family
        self.balancer = Balancer(self.net, family)
        self.balancer.serve(self.net.host("a"))
        how = adopt or f"systemd:{shlex.join(ADOPTED)}"
        self.a, self.b = (
            agents(self.net.host(each), adopt=[f"{self.end(self.net.host(each))}={how}"]) for each in "ab"
        )

    def end(self, host: Host) -> str:
        """The service's end at that host."""
        return _written(end(host, self.family), BEHIND)

    def dial(self) -> socket.socket:
        """The client's connection."""
        with self.net.host("client").entered():
            sock = socket.create_connection((self.balancer.vip, PORT), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def wish(self, sock: socket.socket, source: Agent, destination: Agent) -> list[str]:
        """What to say to ``tcpmig`` so that it moves from one to the other."""
        name = f"{self.end(source.host)},{_written(CLIENT[self.family], sock.getsockname()[1])}"
        old, new = self.end(source.host), self.end(destination.host)
        return ["migrate", name, "--to", destination.address, "--map", f"{old}={new}"]

    def lives(self, host: Host) -> list[str]:
        """The service's connections at that host, each end in its words."""
        lines = host.run(["ss", "-Htn", "state", "connected", f"( sport = :{BEHIND} )"]).stdout.splitlines()
        return [line.split()[3] for line in lines]

    def received(self, host: Host) -> int:
        """Bytes that have come to the service's connections since they are there."""
        said = host.run(["ss", "-Htni", f"( sport = :{BEHIND} )"]).stdout
        return sum(map(int, re.findall(r"bytes_received:(\d+)", said)))

    @staticmethod
    def says(sock: socket.socket, word: bytes) -> bool:
        """The far end echoes."""
        sock.sendall(word)
        return sock.recv(len(word), socket.MSG_WAITALL) == word
