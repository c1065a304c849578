"""How a connection is named: four-tuples and endpoints, as text and as packed addresses."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

from migrate.errors import UsageError

__all__ = ["MAPPED", "Endpoint", "FourTuple", "endpoint_text", "parse_endpoint", "unmapped"]

MAPPED = b"\0" * 10 + b"\xff\xff"  # ::ffff:0:0/96, RFC 4291 section 2.5.5.2

Endpoint = tuple[bytes, int | None]
"""A packed address, empty for any, and a port, None for any."""


def unmapped(address: bytes) -> bytes:
    """The packed address as it is on the wire: an IPv4-mapped IPv6 address gives its 4 bytes."""
    return address[12:] if len(address) == 16 and address.startswith(MAPPED) else address


class FourTuple(NamedTuple):
    """A TCP four-tuple: packed addresses (4 or 16 bytes, network byte order) and ports, the local end first.

    It says what is on the wire: both ends of an IPv4-mapped IPv6 socket are 4 bytes long.
    """

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int

    @classmethod
    def parse(cls, text: str) -> FourTuple:
        """From ``LOCAL,REMOTE``: ``10.0.0.1:80,10.0.0.9:53972``. IPv4-mapped ends give 4 bytes. Raises UsageError."""
        ends = text.split(",")
        if len(ends) != 2:
            raise _misspelt(text, "a connection is two ends with one comma between them", _CONNECTION)
        (local, local_port), (remote, remote_port) = map(parse_endpoint, ends)
        if local_port is None or remote_port is None:
            raise _misspelt(text, "each end of a connection has a port", _CONNECTION)
        if not local or len(local) != len(remote):
            raise _misspelt(
                text, "both ends of a connection are IPv4 addresses, or both are IPv6 addresses", _CONNECTION
            )
        return cls(local, local_port, remote, remote_port)

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.local) == 4 else 6

    def __str__(self) -> str:
        if len(self.local) == 4:
            local, remote = socket.inet_ntoa(self.local), socket.inet_ntoa(self.remote)
            return f"{local}:{self.local_port},{remote}:{self.remote_port}"
        local, remote = (socket.inet_ntop(socket.AF_INET6, address) for address in (self.local, self.remote))
        return f"[{local}]:{self.local_port},[{remote}]:{self.remote_port}"

    def reversed(self) -> FourTuple:
        """The same connection as the peer names it."""
        return FourTuple(self.remote, self.remote_port, self.local, self.local_port)


_CONNECTION = "write 10.0.0.1:80,10.0.0.9:53972 or [fd00::1]:80,[fd00::9]:53972"
_ENDPOINT = "write 10.0.0.1:80, [fd00::1]:80, or the address alone"


def parse_endpoint(text: str) -> Endpoint:
    """Packed address, and port or None, of ``10.0.0.1:80``, ``[fd00::1]:80``, ``10.0.0.1``, ``[fd00::1]``.

    ``*`` stands for any address and gives no bytes. Raises UsageError.
    """
    if text.startswith("["):
        address, bracket, after = text[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise _misspelt(text, "an IPv6 address ends with ']', and then comes ':PORT' or nothing", _ENDPOINT)
        packed, colon, port = _packed(socket.AF_INET6, address, text), after[:1], after[1:]
    else:
        address, colon, port = text.partition(":")
        if ":" in port:
            raise _misspelt(text, "an IPv6 address stands in brackets", _ENDPOINT)
        packed = b"" if address == "*" else _packed(socket.AF_INET, address, text)
    if not colon:
        return packed, None
    if not re.fullmatch("0|[1-9][0-9]{0,4}", port) or int(port) > 0xFFFF:
        raise _misspelt(text, f"{port!r} is no port number", _ENDPOINT)
    return packed, int(port)


def endpoint_text(end: Endpoint) -> str:
    """What `parse_endpoint` reads as this endpoint."""
    address, port = end
    if len(address) == 16:
        shown = f"[{socket.inet_ntop(socket.AF_INET6, address)}]"
    else:
        shown = socket.inet_ntoa(address) if address else "*"
    return shown if port is None else f"{shown}:{port}"


def _packed(family: socket.AddressFamily, address: str, text: str) -> bytes:
    if "%" in address:
        raise _misspelt(text, "a zone names an interface of one host, it means nothing on another", _ENDPOINT)
    try:
        return unmapped(socket.inet_pton(family, address))
    except (OSError, ValueError):
        kind = "IPv6" if family == socket.AF_INET6 else "IPv4"
        raise _misspelt(text, f"{address!r} is no {kind} address", _ENDPOINT) from None


def _misspelt(text: str, why: str, right: str) -> UsageError:
    return UsageError(f"{text!r}: {why}", hint=right)
