"""What the tables of nft.py have in common: connections as set keys, rules that match them, a table's life.

Keys are ``local address . local port . remote address . remote port``, each part filled up to four bytes, whichever
way the segment goes. Every change is one transaction.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Self

from migrate.errors import Error, HostError, KernelError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.kernel import nf_tables as nf
from migrate.kernel.nfnetlink import Netfilter

__all__ = ["PREFIX", "PRIORITY_RAW", "VERSIONS", "Ip", "Table", "keys", "load_key", "only_tcp", "tables"]

PREFIX = "tcpmig-"

# NF_IP_PRI_RAW: before conntrack (-200), so that this meets a held segment once, when it is replayed. Where conntrack
# is in use fragments are put together earlier still (-400); elsewhere they would pass, but TCP sends none.
PRIORITY_RAW = -300

_LISTINGS = 20  # until two agree

_LACKING = errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT
_REMEDY = (
    "modprobe nf_tables nft_log nfnetlink_log nft_fwd_netdev, or a kernel with CONFIG_NF_TABLES_INET, "
    "CONFIG_NF_TABLES_NETDEV, CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG and CONFIG_NFT_FWD_NETDEV"
)


class Ip(NamedTuple):
    """What differs between the IP versions."""

    version: int
    protocol: int  # NFPROTO_*
    ethertype: bytes
    source: int  # offset of the source address in the header; the destination's follows
    size: int  # of an address
    type: int  # of an address, for `nft list`
    key: struct.Struct

    @property
    def key_type(self) -> tuple[int, int]:
        """(type, bytes) of the sets' keys."""
        return nf.concatenated(self.type, nf.TYPE_INET_SERVICE, self.type, nf.TYPE_INET_SERVICE), self.key.size


VERSIONS = (
    Ip(4, nf.NFPROTO_IPV4, b"\x08\x00", 12, 4, nf.TYPE_IPADDR, struct.Struct("!4sH2x4sH2x")),
    Ip(6, nf.NFPROTO_IPV6, b"\x86\xdd", 8, 16, nf.TYPE_IP6ADDR, struct.Struct("!16sH2x16sH2x")),
)


def keys(tuples: Collection[FourTuple]) -> Iterator[tuple[Ip, list[bytes]]]:
    """The keys by IP version, those that occur. Raises UsageError for a tuple of no version."""
    left = len(tuples)
    for ip in VERSIONS:
        size, pack = ip.size, ip.key.pack
        try:
            found = [pack(a, p, b, q) for a, p, b, q in tuples if len(a) == size == len(b)] if left else []
        except struct.error:
            raise UsageError("a port is a number from 0 to 65535") from None
        left -= len(found)
        if found:
            yield ip, found
    if left:
        raise UsageError("the two addresses of a connection are both of 4 or both of 16 bytes")


def load_key(ip: Ip, *, arriving: bool) -> list[bytes]:
    """Expressions: the segment's key into the registers from 0 on."""
    words = ip.size // 4
    source, destination = ip.source, ip.source + ip.size
    local, remote = (destination, source) if arriving else (source, destination)
    local_port, remote_port = (2, 0) if arriving else (0, 2)
    return [
        nf.payload(nf.NETWORK_HEADER, local, ip.size, nf.register(0)),
        nf.payload(nf.TRANSPORT_HEADER, local_port, 2, nf.register(words)),
        nf.payload(nf.NETWORK_HEADER, remote, ip.size, nf.register(words + 1)),
        nf.payload(nf.TRANSPORT_HEADER, remote_port, 2, nf.register(2 * words + 1)),
    ]


def only_tcp(family: int, ip: Ip) -> list[bytes]:
    """Expressions: go on with TCP over this IP version only."""
    if family == nf.NFPROTO_NETDEV:
        version = nf.meta(nf.META_PROTOCOL, nf.register(0)), nf.compare(nf.register(0), ip.ethertype)
    else:
        version = nf.meta(nf.META_NFPROTO, nf.register(0)), nf.compare(nf.register(0), bytes((ip.protocol,)))
    tcp = bytes((socket.IPPROTO_TCP,))
    return [*version, nf.meta(nf.META_L4PROTO, nf.register(0)), nf.compare(nf.register(0), tcp)]


class Table:
    """A table of ours, and the netlink socket that changes it. Closing leaves the table where it is."""

    family: int

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[\w.@-]{1,200}", name, re.ASCII):
            raise UsageError(f"{name!r} is no name for a table")
        self.name = name
        self._netfilter = Netfilter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; again does nothing."""
        self._netfilter.close()

    def delete(self) -> None:
        """Remove the table, if it is still there, and close; once closed it does nothing.

        The table is gone in 0.05 ms; the closing of a netlink socket waits 10 to 20 ms for the kernel's worker.
        """
        if self._netfilter.fileno() < 0:
            return
        try:
            self._netfilter.commit(f"removing table {self.name}", [nf.del_table(self.family, self.name)])
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        finally:
            self.close()

    def _build(self, requests: Sequence[bytes]) -> None:
        # Make the table; what the kernel cannot find now is part of itself.
        try:
            self._netfilter.commit(f"making table {self.name}", requests)
        except Error as error:
            self.close()
            if isinstance(error, KernelError) and error.errno in _LACKING:
                raise HostError(f"making table {self.name}: nftables here lacks something", hint=_REMEDY) from None
            raise

    def _gone(self) -> NotFound:
        return NotFound(f"table {self.name} is gone", hint="somebody flushed the ruleset of nftables")

    def _place(self, name: str, ip: Ip) -> nf.Place:
        return nf.Place(self.family, self.name, f"{name}{ip.version}")

    def _elements(self, name: str, ip: Ip) -> list[tuple[FourTuple, bytes, int]]:
        # What that set holds: connection, a map's data, milliseconds left. While the kernel moves a set that has grown
        # to a larger hash table, a listing in several messages may pass over some: so until two of them agree.
        messages, found = self._list(name, ip)
        for _ in range(_LISTINGS if messages > 1 else 0):
            before = {each for each, _, _ in found}
            _, found = self._list(name, ip)
            if before == {each for each, _, _ in found}:
                break
        return found

    def _list(self, name: str, ip: Ip) -> tuple[int, list[tuple[FourTuple, bytes, int]]]:
        # In how many messages, and what.
        try:
            entries = self._netfilter.dump(f"listing table {self.name}", nf.get_elements(self._place(name, ip)))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            raise self._gone() from None
        return len(entries), [
            (FourTuple(*ip.key.unpack(key)), data, left)
            for entry in entries
            for key, data, left in nf.element_entries(entry)
        ]


def tables(family: int = nf.NFPROTO_UNSPEC) -> dict[str, str]:
    """Our tables in this network namespace, of one family or of all: name and comment."""
    netfilter = Netfilter()
    try:
        found = dict(map(nf.table_entry, netfilter.dump("listing nftables tables", nf.get_tables(family))))
    finally:
        netfilter.close()
    return {name: comment for name, comment in found.items() if name.startswith(PREFIX)}
