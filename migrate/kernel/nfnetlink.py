"""The netlink transport of nft.py and nflog.py: a socket, atomic batches, attributes (netlink.h, nfnetlink.h).

A socket of its own and not pyroute2's, for three reasons, measured with 0.9.7: importing it costs 150-250 ms, which
every `dump` would pay; a socket of it takes 1.9 ms and an event loop (this one 0.01 ms, one descriptor); and it opens
one socket *a thread*, lazily, so that a table made in one network namespace could be changed in another by accident.

The kernel works on a message while it is sent, so every reply waits when send() returns: nothing here ever blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from migrate.errors import HostError, KernelError, from_oserror
from migrate.kernel import uapi

__all__ = [
    "NLM_F_APPEND",
    "NLM_F_CREATE",
    "NLM_F_DUMP",
    "NLM_F_EXCL",
    "Netfilter",
    "attribute",
    "attributes",
    "message",
    "nested",
    "text",
    "u16",
    "u32",
    "u64",
]

NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h, as the next three blocks
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x200, 0x400, 0x800

NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11  # include/uapi/linux/netfilter/nfnetlink.h
NFNL_SUBSYS_NFTABLES = 10

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_GENERAL = struct.Struct(">BBH")  # struct nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_ERROR = struct.Struct("=i")
_FLAGS, _FLAGS_OFFSET = struct.Struct("=H"), 6  # where the flags stand in a message

_REPLY = 1 << 16  # bytes; a dump's datagram has 32 KiB at most
_ATTEMPTS = 20  # dumps, until one was not disturbed by somebody's change


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute: at most 65,531 bytes of value, padded to four."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    """A string, zero-terminated."""
    return attribute(kind, value.encode() + b"\0")


def u16(kind: int, value: int) -> bytes:
    """An unsigned number in network order, as all of netfilter's are."""
    return attribute(kind, value.to_bytes(2))


def u32(kind: int, value: int) -> bytes:
    """An unsigned number of 32 bits, network order."""
    return attribute(kind, value.to_bytes(4))


def u64(kind: int, value: int) -> bytes:
    """An unsigned number of 64 bits, network order."""
    return attribute(kind, value.to_bytes(8))


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, value) of each attribute in ``data``, which the kernel wrote; nothing is copied."""
    offset, end = 0, len(data)
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + 3 & ~3


def message(
    kind: int, family: int, *body: bytes, flags: int = 0, subsystem: int = NFNL_SUBSYS_NFTABLES, resource: int = 0
) -> bytes:
    """One request of a netfilter subsystem; ``flags`` are NLM_F_* beyond REQUEST, ``resource`` depends on the kind."""
    return _frame(subsystem << 8 | kind, flags, _GENERAL.pack(family, 0, resource), *body)


def _frame(kind: int, flags: int, *body: bytes) -> bytes:
    whole = b"".join(body)
    return _HEADER.pack(_HEADER.size + len(whole), kind, NLM_F_REQUEST | flags, 0, 0) + whole


def _acknowledging(request: bytes) -> bytes:
    wanted = bytearray(request)
    _FLAGS.pack_into(wanted, _FLAGS_OFFSET, _FLAGS.unpack_from(wanted, _FLAGS_OFFSET)[0] | NLM_F_ACK)
    return bytes(wanted)


_BEGIN = _frame(NFNL_MSG_BATCH_BEGIN, 0, _GENERAL.pack(0, 0, NFNL_SUBSYS_NFTABLES))
_END = _frame(NFNL_MSG_BATCH_END, 0, _GENERAL.pack(0, 0, NFNL_SUBSYS_NFTABLES))


class Netfilter:
    """A NETLINK_NETFILTER socket. It belongs to the network namespace that it was made in, wherever it is used."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        except OSError as error:
            if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
                raise HostError(
                    "this kernel has no netfilter netlink",
                    hint="modprobe nfnetlink, or a kernel with CONFIG_NETFILTER_NETLINK",
                ) from None
            raise from_oserror("opening a netfilter socket", error) from None
        self._socket.setblocking(False)
        self._reply = memoryview(bytearray(_REPLY))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)  # an error does not repeat our 64 KiB

    def close(self) -> None:
        """Close the socket; again does nothing."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._socket.fileno()

    def enlarge_receive_buffer(self, size: int) -> None:
        """Room for ``size`` bytes of messages that come unasked, or what net.core.rmem_max allows."""
        with contextlib.suppress(PermissionError):  # asks for CAP_NET_ADMIN in the *first* user namespace
            self._socket.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, size)
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def commit(self, operation: str, messages: Sequence[bytes]) -> None:
        """All of these nftables requests in one transaction, or none of them.

        Raises KernelError with the first refusal's errno, PrivilegeError, HostError where a message is too large for
        the socket. ``operation`` says in an error what was tried.
        """
        # An error comes in any case; the last one's acknowledgement says that all is done.
        self._send(operation, b"".join((_BEGIN, *messages[:-1], _acknowledging(messages[-1]), _END)))
        self._acknowledged(operation)

    def request(self, operation: str, request: bytes) -> None:
        """One request that is no nftables change. Raises as commit()."""
        self._send(operation, _acknowledging(request))
        self._acknowledged(operation)

    def require_privilege(self, operation: str) -> None:
        """Raises PrivilegeError unless this process may change netfilter here."""
        self._send(operation, _BEGIN + _END)
        self._acknowledged(operation)

    def dump(self, operation: str, request: bytes) -> list[memoryview]:
        """What a GET request lists: the attributes of each entry. Raises as commit()."""
        for _ in range(_ATTEMPTS):
            self._send(operation, request)
            found = self._listed(operation)
            if found is not None:
                return found
        raise KernelError(operation, errno.EINTR, hint="the ruleset changes too quickly; try again")

    def receive(self, buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """The messages of one datagram: (type, flags, rest). Raises BlockingIOError if there is none, OSError."""
        data = buffer[: self._socket.recv_into(buffer)]
        offset, end = 0, len(data)
        while offset + _HEADER.size <= end:
            length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size:
                return
            yield kind, flags, data[offset + _HEADER.size : offset + length]
            offset += length + 3 & ~3

    def _send(self, operation: str, data: bytes) -> None:
        try:
            self._socket.send(data)
            return
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise from_oserror(operation, error) from None
        try:  # it exceeds the send buffer: one transaction is one datagram
            self._enlarge_send_buffer(len(data))
            self._socket.send(data)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise HostError(
                    f"{operation}: one transaction of {len(data)} bytes is more than a socket may send here",
                    hint=f"sysctl net.core.wmem_max={2 * len(data)}",
                ) from None
            raise from_oserror(operation, error) from None

    def _enlarge_send_buffer(self, size: int) -> None:
        with contextlib.suppress(PermissionError):  # as enlarge_receive_buffer()
            self._socket.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, size)
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def _acknowledged(self, operation: str) -> None:
        refused = 0
        for kind, _, rest in self._replies(operation):
            if kind == NLMSG_ERROR and not refused:
                (refused,) = _ERROR.unpack_from(rest)
        if refused:
            raise from_oserror(operation, OSError(-refused, os.strerror(-refused)))

    def _listed(self, operation: str) -> list[memoryview] | None:
        # None: inconsistent, because somebody changed the ruleset meanwhile.
        found: list[memoryview] = []
        consistent = True
        for kind, flags, rest in self._replies(operation):
            consistent = consistent and not flags & NLM_F_DUMP_INTR
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                (code,) = _ERROR.unpack_from(rest)
                if code and consistent:
                    raise from_oserror(operation, OSError(-code, os.strerror(-code)))
            else:
                found.append(memoryview(bytes(rest[_GENERAL.size :])))
        return found if consistent else None

    def _replies(self, operation: str) -> Iterator[tuple[int, int, memoryview]]:
        while True:
            try:
                yield from self.receive(self._reply)
            except BlockingIOError:
                return
            except OSError as error:
                raise from_oserror(operation, error) from None
