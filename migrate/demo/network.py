"""Three hosts on a bridge: network namespaces without a name, each held by a process that ends when this one does.

So nothing is left behind, whatever ends this process, and an ordinary user in a user namespace needs no /run/netns.
"""

from __future__ import annotations

import ctypes
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from migrate.errors import HostError
from migrate.kernel import netns

__all__ = ["ADDRESS", "DEVICE", "Host", "Network", "ResetCounter", "program"]

ADDRESS = "10.0.0.100"  # floats
DEVICE = "eth0"  # in every host

_SETTINGS = {
    # Received packets queue on one CPU. A veth queues on the sender's, and a sender that moves to another overtakes
    # itself: TCP retransmits what nobody lost. New in Linux 6.3.
    "core/rps_default_mask": "1",
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
}
# A host that carries the address on lo must not answer ARP for it, nor speak of it in its own questions.
_SILENT_ON_LO = {"ipv4/conf/all/arp_ignore": "1", "ipv4/conf/all/arp_announce": "2"}

_ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h
_SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
_SOL_PACKET, _PACKET_STATISTICS = 263, 6  # include/linux/socket.h, include/uapi/linux/if_packet.h
# Classic BPF (include/uapi/linux/filter.h), an Ethernet frame: accept IPv4, TCP, no later fragment, RST set.
_RST_FILTER = (
    (0x28, 0, 0, 12),  # ldh  EtherType
    (0x15, 0, 8, 0x0800),
    (0x30, 0, 0, 23),  # ldb  protocol
    (0x15, 0, 6, socket.IPPROTO_TCP),
    (0x28, 0, 0, 20),  # ldh  fragment offset
    (0x45, 4, 0, 0x1FFF),
    (0xB1, 0, 0, 14),  # ldxb length of the IP header
    (0x50, 0, 0, 27),  # ldb  TCP flags
    (0x45, 0, 1, 0x04),
    (0x06, 0, 0, 1),  # accept
    (0x06, 0, 0, 0),
)


def program(name: str, package: str) -> str:
    """Where a program is. Raises HostError with the Debian package that has it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise HostError(f"the demo needs {name}, which is not installed", hint=f"as root: apt-get install {package}")
    return found


class Host(NamedTuple):
    """One network namespace with a device on the bridge; ``netns`` is its name for `migrate.kernel.netns`."""

    name: str
    netns: str
    address: str

    def start(self, command: Sequence[str | Path], **more: object) -> subprocess.Popen[bytes]:
        """Start a program here, in a process group of its own: Ctrl-C is for us to handle."""
        with netns.entered(self.netns):
            return subprocess.Popen(command, process_group=0, **more)  # type: ignore[call-overload,no-any-return]

    def ip(self, *lines: str) -> None:
        """Run lines of an ``ip -batch`` here. Raises HostError with iproute2's words."""
        with netns.entered(self.netns):
            done = subprocess.run(
                [program("ip", "iproute2"), "-batch", "-"],
                input="\n".join(lines),
                text=True,
                capture_output=True,
                check=False,
            )
        if done.returncode:
            raise HostError(f"building the demo's network: {done.stderr.strip()}", hint="tcpmig check")

    def set(self, settings: dict[str, str]) -> None:
        """Change this host's /proc/sys/net; what this kernel does not have is passed over."""
        with netns.entered(self.netns):
            for name, value in settings.items():
                file = Path("/proc/sys/net", name)
                if file.exists():
                    file.write_text(value)

    def retransmissions(self) -> int:
        """TCP segments this host has sent again so far."""
        with netns.entered(self.netns):
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])


class Network:
    """``client``, ``a`` with the floating address, and ``b`` that carries it on lo. A context manager."""

    def __init__(self) -> None:
        with ExitStack() as opened:
            self._switch = _host(opened, "switch", "")
            self.client = _host(opened, "client", "10.0.0.1")
            self.a = _host(opened, "A", "10.0.0.2")
            self.b = _host(opened, "B", "10.0.0.3")
            self._build()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def hosts(self) -> tuple[Host, Host, Host]:
        """All three."""
        return self.client, self.a, self.b

    def _build(self) -> None:
        for host in (self._switch, *self.hosts):
            host.set(_SETTINGS)
        self.b.set(_SILENT_ON_LO)
        # A veth whose index equals its peer's does not look virtual to the kernel's link watch, which then takes a
        # second to notice its carrier (linkwatch_urgent_event): so the ports count from 100.
        self._switch.ip(
            "link add name br0 up type bridge stp_state 0 forward_delay 0",
            *(
                f"link add name {host.name} index {index} type veth peer name {DEVICE} netns {host.netns[4:]}\n"
                f"link set dev {host.name} up master br0"
                for index, host in enumerate(self.hosts, 100)
            ),
        )
        for host in self.hosts:
            host.ip("link set lo up", f"link set dev {DEVICE} up", f"address add {host.address}/24 dev {DEVICE}")
        self.a.ip(f"address add {ADDRESS}/32 dev {DEVICE}")
        self.b.ip(f"address add {ADDRESS}/32 dev lo")


class ResetCounter:
    """Counts the RST segments that pass a host's device, either way. A context manager."""

    def __init__(self, host: Host) -> None:
        program = b"".join(struct.pack("=HBBI", *line) for line in _RST_FILTER)
        buffer = ctypes.create_string_buffer(program, len(program))
        with netns.entered(host.netns):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)  # protocol 0: nothing arrives yet
        with ExitStack() as failed:
            failed.callback(self._socket.close)
            description = struct.pack("@HP", len(_RST_FILTER), ctypes.addressof(buffer))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, description)
            self._socket.bind((DEVICE, _ETH_P_ALL))
            failed.pop_all()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def count(self) -> int:
        """So far."""
        packets, _ = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._count += packets  # reading it resets it
        return self._count


def _host(opened: ExitStack, name: str, address: str) -> Host:
    # Ends with its standard input, so at the latest with us.
    command = [program("unshare", "util-linux"), "--net", "sh", "-c", "echo; exec cat"]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )
    opened.callback(holder.communicate)
    assert holder.stdout is not None
    if holder.stdout.read(1) != b"\n":
        _, words = holder.communicate()
        raise HostError(
            f"no network namespace can be made here: {words.decode(errors='replace').strip()}",
            hint="run as root with CAP_SYS_ADMIN (docker run --privileged)",
        )
    return Host(name, f"pid:{holder.pid}", address)
