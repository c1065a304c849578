"""Which way a packet to an address would go, asked of the kernel: one small request of rtnetlink(7), some 4 µs.

Source: include/uapi/linux/rtnetlink.h and netlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import NamedTuple, Self

from migrate.errors import HostError, from_oserror

__all__ = ["Route", "Routes"]

NETLINK_ROUTE, NLMSG_ERROR, NLM_F_REQUEST = 0, 2, 1
RTM_GETROUTE, RTN_LOCAL, RTA_DST, RTA_OIF, RTA_MARK = 26, 2, 1, 4, 16

_NLMSG = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_RTMSG = struct.Struct("=BB5xB4x")  # of struct rtmsg: family, bits of the destination, type
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_INT = struct.Struct("=i")


class Route(NamedTuple):
    """``local`` if the address is this host's; ``device`` is an interface's index."""

    local: bool
    device: int


class Routes:
    """A socket of the network namespace that it was made in."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        except OSError as error:
            raise from_oserror("opening a netlink socket", error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; again does nothing."""
        self._socket.close()

    def find(self, address: bytes, mark: int = 0) -> Route:
        """For a packed address and packets with that mark. Raises HostError if there is no route."""
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        body = _RTMSG.pack(family, 8 * len(address), 0)
        body += _ATTRIBUTE.pack(4 + len(address), RTA_DST) + address + _ATTRIBUTE.pack(8, RTA_MARK)
        body += mark.to_bytes(4, sys.byteorder)
        try:
            self._socket.send(_NLMSG.pack(_NLMSG.size + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + body)
            answer = self._socket.recv(4096)
        except OSError as error:
            raise from_oserror("looking up a route", error) from None
        at = _NLMSG.size
        if _NLMSG.unpack_from(answer)[1] == NLMSG_ERROR:
            (code,) = _INT.unpack_from(answer, at)
            raise HostError(f"no way to {socket.inet_ntop(family, address)}: {os.strerror(-code)}", hint="see ip route")
        local = _RTMSG.unpack_from(answer, at)[2] == RTN_LOCAL
        at += _RTMSG.size
        while at + _ATTRIBUTE.size <= len(answer):
            length, kind = _ATTRIBUTE.unpack_from(answer, at)
            if kind == RTA_OIF:
                return Route(local, _INT.unpack_from(answer, at + _ATTRIBUTE.size)[0])
            at += max(length + 3 & ~3, _ATTRIBUTE.size)
        return Route(local, 0)
