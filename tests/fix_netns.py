"""Hosts as network namespaces on a bridge: the fixture ``lan``.

::

    def test_something(lan):
        net = lan("client", "a", "b")
        a = net.host("a")                  # .netns .dev .mac .ip4 .ip6
        net.assign(a, net.vip4)            # the floating address
        a.run(["ss", "-tn"])               # a command in that host
        server = a.popen(["cat"])          # ended with the test at the latest
        with a.entered():                  # this thread's new sockets belong to that host
            socket.create_server((a.ip4, 80))
        with net.capture("client") as wire:
            ...
        assert not wire.rsts and not wire.retransmissions

Every LAN has a bridge of its own, so all use the same addresses: 10.0.0.1/24 and fd00::1/64 for the first host and so
on, 10.0.0.100 and fd00::100 float. Names carry this process's id; what a killed run left behind is swept at the start.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from migrate.kernel import netns
from tests.capture import Capture
from tests.waiting import until

PREFIX = "tcpmig"
NAMED = Path("/run/netns")  # where iproute2 binds the names
DEV = "eth0"  # in every host
VIP4, VIP6 = "10.0.0.100", "fd00::100"

_count = itertools.count(1)

SYSCTLS = {
    # Received packets queue on one CPU. A veth queues on the sender's, and a sender that moves to another overtakes
    # itself: TCP retransmits what nobody lost. New in Linux 6.3; before, a few runs in a thousand see that happen.
    "net.core.rps_default_mask": "1",
    # No duplicate address detection, which makes an IPv6 address wait a second; no router's advice.
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_ra": "0",
    # New namespaces inherit the machine's preference; this one every kernel has and lets a namespace choose.
    "net.ipv4.tcp_congestion_control": "reno",
}
NEWER = {"net.core.rps_default_mask"}  # settings that an older kernel may lack


def ip(lines: Iterable[str], *, namespace: str | None = None) -> None:
    """Give iproute2 a batch; raises with its words on the first line that fails."""
    with netns.entered(namespace):
        done = subprocess.run(
            ["ip", "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"ip -batch in {namespace or 'this namespace'}: {done.stderr.strip()}")


def configure(sysctls: Mapping[str, str]) -> None:
    """Set the ``net.*`` settings of this thread's namespace."""
    for name, value in sysctls.items():
        file = Path("/proc/sys", *name.split("."))
        if file.exists() or name not in NEWER:
            file.write_text(value)


@dataclass
class Host:
    """One network namespace with a device on the LAN's bridge."""

    name: str
    netns: str
    ip4: str
    ip6: str
    dev: str = DEV
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """This thread is in the host meanwhile; sockets and processes it makes belong there and stay there."""
        return netns.entered(self.netns)

    def run(
        self, command: Sequence[str | Path], *, check: bool = True, timeout: float = 60, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output as text. A failure raises with what it said."""
        with self.entered():
            done = subprocess.run(
                command, check=False, timeout=timeout, **{"capture_output": True, "text": True, **more}
            )
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {command} gave {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def popen(self, command: Sequence[str | Path], **more: Any) -> subprocess.Popen[Any]:
        """Start a command; ``pid`` is the program's own. If it still runs when the test ends it is killed."""
        with self.entered():
            process = subprocess.Popen(command, **more)
        self.processes.append(process)
        return process

    def sysctl(self, name: str, value: str | int | None = None) -> str:
        """Read or set a ``net.*`` setting of this host."""
        with self.entered():
            file = Path("/proc/sys", *name.split("."))
            if value is not None:
                file.write_text(str(value))
            return file.read_text().strip()

    @property
    def mac(self) -> str:
        """The link-layer address of its device."""
        match = re.search(r"link/ether (\S+)", self.run(["ip", "link", "show", "dev", self.dev]).stdout)
        assert match
        return match[1]

    def await_neighbours(self, address: str) -> None:
        """Wait until the host answers neighbour solicitations for an IPv6 address it was given.

        The kernel joins the address's multicast group in a work item of its own (addrconf_dad_work), also without
        duplicate address detection; who asks before that gets no answer and asks again a second later.
        """
        group = "ff0200000000000000000001ff" + socket.inet_pton(socket.AF_INET6, address)[-3:].hex()
        with self.entered():
            until(lambda: group in Path("/proc/thread-self/net/igmp6").read_text(), what=f"{address} answers")

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            pipes: list[IO[Any] | None] = [process.stdin, process.stdout, process.stderr]
            for pipe in filter(None, pipes):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Lan:
    """Hosts on one bridge; the bridge stands in a namespace of its own."""

    vip4, vip6 = VIP4, VIP6

    def __init__(self, names: Sequence[str], *, mtu: int = 1500) -> None:
        stem = f"{PREFIX}-{os.getpid()}-{next(_count)}"
        self.bridge_netns = f"{stem}-bridge"
        self.bridge = "br0"
        self.hosts = {
            name: Host(name, f"{stem}-{name}", f"10.0.0.{i}", f"fd00::{i:x}") for i, name in enumerate(names, 1)
        }
        try:
            self._build(mtu)
        except BaseException:
            self.close()
            raise

    def _build(self, mtu: int) -> None:
        ip(f"netns add {name}" for name in self._namespaces())
        for name in self._namespaces():
            with netns.entered(name):
                configure(SYSCTLS)
        with netns.entered(self.bridge_netns):
            configure({"net.ipv6.conf.default.disable_ipv6": "1"})
        # A veth whose index equals its peer's looks like no virtual device to the kernel's link watch, which then takes
        # a second to notice its carrier (linkwatch_urgent_event): so the ports count from 100.
        ip(
            f"link add name {self.port(host)} index {index} mtu {mtu} netns {self.bridge_netns} type veth "
            f"peer name {host.dev} mtu {mtu} netns {host.netns}"
            for index, host in enumerate(self.hosts.values(), 100)
        )
        for host in self.hosts.values():
            ip(
                [
                    "link set lo up",
                    f"link set dev {host.dev} up",
                    f"address add {host.ip4}/24 dev {host.dev}",
                    f"address add {host.ip6}/64 dev {host.dev} nodad",
                ],
                namespace=host.netns,
            )
        # Multicast snooping would drop neighbour solicitations until it has learnt who listens.
        ip(
            [
                f"link add name {self.bridge} up mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                *(f"link set dev {self.port(host)} up master {self.bridge}" for host in self.hosts.values()),
            ],
            namespace=self.bridge_netns,
        )
        self._await_ready()

    def _await_ready(self) -> None:
        for host in self.hosts.values():
            host.await_neighbours(host.ip6)
        with netns.entered(self.bridge_netns):
            show = ["bridge", "link"]
            until(lambda: subprocess.check_output(show, text=True).count("state forwarding") == len(self.hosts))

    def _namespaces(self) -> list[str]:
        return [self.bridge_netns, *(host.netns for host in self.hosts.values())]

    def host(self, name: str) -> Host:
        """The host of that name."""
        return self.hosts[name]

    def port(self, host: Host | str) -> str:
        """The name of a host's port, in ``bridge_netns``."""
        return host if isinstance(host, str) else host.name

    def assign(self, host: Host | str, address: str) -> None:
        """Give an address to a host, without announcing it."""
        host = self._address("add", host, address)
        if ":" in address:
            host.await_neighbours(address)

    def withdraw(self, host: Host | str, address: str) -> None:
        """Take an address from a host."""
        self._address("del", host, address)

    def _address(self, verb: str, host: Host | str, address: str) -> Host:
        host = self.host(host) if isinstance(host, str) else host
        prefix, nodad = (64, "nodad") if ":" in address else (24, "")
        ip([f"address {verb} {address}/{prefix} dev {host.dev} {nodad if verb == 'add' else ''}"], namespace=host.netns)
        return host

    def capture(self, host: Host | str) -> Capture:
        """Context manager that captures the TCP segments on a host's wire: ``.segments .rsts .retransmissions``."""
        host = self.host(host) if isinstance(host, str) else host
        return Capture(host.netns, host.dev)

    def close(self) -> None:
        """End the processes, remove the namespaces; the links vanish with them."""
        for host in self.hosts.values():
            host.close()
        ip(f"netns del {name}" for name in self._namespaces() if (NAMED / name).exists())


LanFactory = Callable[..., Lan]


@pytest.fixture
def lan() -> Iterator[LanFactory]:
    """``lan("client", "a", "b", mtu=1500)`` makes a :class:`Lan`; several may be made."""
    with contextlib.ExitStack() as made:

        def make(*names: str, mtu: int = 1500) -> Lan:
            net = Lan(names, mtu=mtu)
            made.callback(net.close)
            return net

        yield make


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    sweep()


def sweep() -> None:
    """Remove the namespaces of runs that were killed."""
    stale = []
    for name in os.listdir(NAMED) if NAMED.is_dir() else []:
        owner = re.match(rf"{PREFIX}-(\d+)-", name)
        if owner and not Path("/proc", owner[1]).exists():
            stale.append(name)
    ip(f"netns del {name}" for name in stale)
