"""A long and narrow path between a test LAN's client and its other hosts, which reach it through a router.

netem is not everywhere. So the client's port leaves the bridge, the bridge's namespace becomes a router, and what
arrives at either end of the gap between the two is carried over by a process, after a delay, and no faster than a
bottleneck with a queue of limited length. The router is near the hosts: it learns at once where an address has gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from migrate.kernel import netns
from tests.fix_netns import Lan, configure, ip

__all__ = ["CLIENT", "Line", "long_path"]

CLIENT, ROUTER, NETWORK = "10.1.0.1", "10.1.0.254", "10.0.0.0/24"

_ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23  # include/uapi/linux/if_packet.h
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_VNET_HDR = 10  # struct virtio_net_hdr: checksums and segments that are still to be made go across as they are
_LARGEST = 1 << 17


class Line(NamedTuple):
    """One direction."""

    delay: float  # seconds
    rate: float = 1e12  # bytes a second
    queue: float = 1e12  # bytes; what does not fit is lost


@contextlib.contextmanager
def long_path(net: Lan, towards: Line, away: Line) -> Iterator[int]:
    """Put it before the client of ``net``: ``towards`` the client, and ``away`` from it.

    Gives the carrying process's id: nothing comes out at either end while that is stopped.
    """
    port = net.port("client")
    ip(
        [
            f"link set dev {port} nomaster",
            "link add name near type veth peer name far",
            "link set dev near up",
            "link set dev far up",
            f"address add {ROUTER}/24 dev far",
            f"address add 10.0.0.254/24 dev {net.bridge}",
        ],
        namespace=net.bridge_netns,
    )
    with netns.entered(net.bridge_netns):
        # The router's own addresses are also on ports that only carry frames: it must not answer for them there.
        configure({"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.arp_ignore": "1"})
    client = net.host("client")
    commands = [f"address add {CLIENT}/24 dev {client.dev}", f"route add {NETWORK} via {ROUTER} src {CLIENT}"]
    ip([f"address del {client.ip4}/24 dev {client.dev}", *commands], namespace=client.netns)
    for host in net.hosts.values():
        if host is not client:
            ip(["route add default via 10.0.0.254"], namespace=host.netns)
    with netns.entered(net.bridge_netns), _tap(port) as end, _tap("near") as hosts:
        process = multiprocessing.get_context("fork").Process(
            target=_carry, args=[((hosts, end, towards), (end, hosts, away))], daemon=True
        )
        process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def _tap(device: str) -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
    tap.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 32 << 20)
    tap.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    tap.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    tap.bind((device, _ETH_P_ALL))
    tap.setblocking(False)
    return tap


def _carry(lines: tuple[tuple[socket.socket, socket.socket, Line], ...]) -> None:
    waiting: list[deque[tuple[float, bytes]]] = [deque() for _ in lines]
    free = [0.0] * len(lines)  # when the bottleneck will have sent what it has
    poll = select.poll()
    for source, _, _ in lines:
        poll.register(source, select.POLLIN)
    while True:
        due = min((queue[0][0] for queue in waiting if queue), default=None)
        poll.poll(None if due is None else max((due - time.monotonic()) * 1000, 0))
        for number, (source, sink, line) in enumerate(lines):
            now = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = source.recv(_LARGEST)
                    free[number] = max(free[number], now)
                    if (free[number] - now) * line.rate < line.queue:
                        free[number] += (len(frame) - _VNET_HDR) / line.rate
                        waiting[number].append((free[number] + line.delay, frame))
            while waiting[number] and waiting[number][0][0] <= time.monotonic():
                sink.send(waiting[number].popleft()[1])
