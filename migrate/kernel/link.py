"""rtnetlink(7) through pyroute2: the addresses of devices, and host routes that carry an initial congestion window.

pyroute2 runs an event loop of its own in the calling thread, which fails where one runs already, and opens a socket for
every thread that uses it, in whatever network namespace that thread is in. So `Links` gives it a thread to itself, in
the right namespace. Importing it costs 150 ms and more: open a `Links` before the clock of a move is running.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

from migrate.errors import KernelError, NotFound, from_oserror
from migrate.kernel import netns

__all__ = ["Address", "AddressWatch", "Links"]

NETLINK_ROUTE = 0  # include/uapi/linux/netlink.h
RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x10, 0x100  # include/uapi/linux/rtnetlink.h
IFA_F_NODAD, IFA_F_TENTATIVE = 0x02, 0x40  # include/uapi/linux/if_addr.h
ROUTE_PROTOCOL = 0xB5  # rtm_protocol: numbers above RTPROTO_STATIC are free; tells our routes from those of others

_LARGEST = 65536  # bytes of what the kernel tells at once

T = TypeVar("T")


class Address(NamedTuple):
    """An address of this host; ``address`` is packed, 4 or 16 bytes in network order."""

    device: str
    address: bytes
    prefix_length: int
    tentative: bool  # duplicate address detection still runs (IPv6): nothing can be bound to it yet


class AddressWatch:
    """Readable (`fileno`) when a device of this thread's network namespace was given an address, or has lost one.

    A context manager. The kernel tells it after the change, in order; see RTMGRP_IPV4_IFADDR in rtnetlink(7).
    """

    def __init__(self) -> None:
        """Raises KernelError, PrivilegeError."""
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
            self._socket.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
        except OSError as error:
            raise from_oserror("watching addresses", error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; doing so again is harmless."""
        self._socket.close()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def read(self) -> bytes:
        """What was told so far, as the kernel wrote it, each packed address in it somewhere. Never waits.

        Who asks the kernel afterwards sees what came of it.
        """
        told = b""
        while True:
            try:
                told += self._socket.recv(_LARGEST)
            except BlockingIOError:
                return told
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more came than there is room for
                    raise from_oserror("watching addresses", error) from None


class Links:
    """The devices of one network namespace: of this thread's, or of the named one, as `migrate.kernel.netns` names it.

    A context manager, for any thread, also one that runs an event loop. Addresses are packed, in network order; a
    ``prefix_length`` of None means all bits. Everything raises PrivilegeError or KernelError where the kernel refuses,
    NotFound where there is no such device.
    """

    def __init__(self, namespace: str | None = None) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rtnetlink")
        self._routes: Any = None
        self._closing = contextlib.ExitStack()
        try:
            self._do("opening rtnetlink", lambda: self._open(namespace))
        except BaseException:
            self._thread.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; doing so again is harmless."""
        if self._routes is not None:
            self._routes = None
            self._thread.submit(self._closing.close).result()
            self._thread.shutdown()

    def index(self, device: str) -> int:
        """The index of the device of that name."""
        return self._do("looking up a device", lambda: _index(device))

    def addresses(self) -> list[Address]:
        """All addresses of all devices."""
        return self._do("listing addresses", self._addresses)

    def add_address(self, device: str, address: bytes, prefix_length: int | None = None) -> bool:
        """Give the device an address, usable at once (no duplicate address detection). False if it had it already."""
        return self._changes(
            f"adding an address to {device}",
            lambda: self._routes.addr("add", **_address(device, address, prefix_length), flags=IFA_F_NODAD),
            harmless=errno.EEXIST,
        )

    def remove_address(self, device: str, address: bytes, prefix_length: int | None = None) -> bool:
        """Take an address from the device. False if it has none of that prefix length."""
        return self._changes(
            f"removing an address from {device}",
            lambda: self._routes.addr("del", **_address(device, address, prefix_length)),
            harmless=errno.EADDRNOTAVAIL,
        )

    def add_host_route(self, remote: bytes, initcwnd: int) -> bool:
        """Connections to ``remote`` that start, or are restored, from now on begin with ``initcwnd`` segments.

        The host route takes the way that leads there now. False if there is a route to just this host already.
        """
        return self._changes(
            "adding a host route", lambda: self._add_host_route(remote, initcwnd), harmless=errno.EEXIST
        )

    def remove_host_route(self, remote: bytes) -> bool:
        """Undo `add_host_route`. False if there is no such route of ours."""
        return self._changes(
            "removing a host route",
            lambda: self._routes.route("del", dst=_host(remote), proto=ROUTE_PROTOCOL),
            harmless=errno.ESRCH,
        )

    def _do(self, operation: str, call: Callable[[], T]) -> T:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            return self._thread.submit(call).result()
        except NetlinkError as error:
            raise from_oserror(operation, OSError(error.code, str(error))) from None
        except OSError as error:
            raise from_oserror(operation, error) from None

    def _changes(self, operation: str, call: Callable[[], object], *, harmless: int) -> bool:
        try:
            self._do(operation, call)
        except KernelError as error:
            if error.errno != harmless:
                raise
            return False
        return True

    # What follows runs in the thread.

    def _open(self, namespace: str | None) -> None:
        from pyroute2 import IPRoute

        with contextlib.ExitStack() as opened:
            opened.enter_context(netns.entered(namespace))
            self._routes = opened.enter_context(IPRoute())
            self._closing = opened.pop_all()

    def _addresses(self) -> list[Address]:
        found = []
        for message in self._routes.get_addr():
            text = message.get("local") or message.get("address")
            family = socket.AF_INET6 if ":" in text else socket.AF_INET
            flags = message.get("flags")
            device = socket.if_indextoname(message["index"])
            tentative = bool(flags & IFA_F_TENTATIVE)
            found.append(Address(device, socket.inet_pton(family, text), message["prefixlen"], tentative))
        return found

    def _add_host_route(self, remote: bytes, initcwnd: int) -> None:
        (way,) = self._routes.route("get", dst=_text(remote))
        hop = {name: way.get(name) for name in ("oif", "gateway", "prefsrc") if way.get(name)}
        self._routes.route("add", dst=_host(remote), proto=ROUTE_PROTOCOL, metrics={"initcwnd": initcwnd}, **hop)


def _address(device: str, address: bytes, prefix_length: int | None) -> dict[str, object]:
    bits = 8 * len(address) if prefix_length is None else prefix_length
    return {"index": _index(device), "address": _text(address), "prefixlen": bits}


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def _host(address: bytes) -> str:
    return f"{_text(address)}/{8 * len(address)}"


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError:
        raise NotFound(f"there is no device {device!r}", hint="`ip link` shows them") from None
