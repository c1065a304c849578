"""sock_diag(7): the TCP sockets of a network namespace, by a filtered dump or by exact look-up.

A reader of its own, on struct, because a listing stands before every move: it costs what `ss` costs. The layouts are
those of include/uapi/linux/inet_diag.h and netlink.h. No privilege is needed, except to see marks.

Entries in SYN_RECEIVED and TIME_WAIT are listed like the rest. They are small records of the kernel's without inode,
owner and descriptor; so is a connection that its owner closed and that waits in FIN_WAIT_2.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from socket import ntohs
from typing import NamedTuple, Self

from migrate.errors import Error, HostError, KernelError, from_oserror
from migrate.fourtuple import MAPPED, FourTuple
from migrate.tcpstate import TcpState

__all__ = ["Connection", "Endpoint", "Extension", "SockDiag", "find", "list_connections"]

NETLINK_SOCK_DIAG = 4  # include/uapi/linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLA_TYPE_MASK = 0x3FFF

SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21  # include/uapi/linux/sock_diag.h

INET_DIAG_REQ_BYTECODE = 1  # include/uapi/linux/inet_diag.h
INET_DIAG_BC_S_COND, INET_DIAG_BC_D_COND = 7, 8
INET_DIAG_INFO, INET_DIAG_CONG, INET_DIAG_SKMEMINFO = 2, 4, 7
INET_DIAG_MARK, INET_DIAG_MD5SIG, INET_DIAG_ULP_INFO, INET_ULP_INFO_NAME = 15, 18, 19, 1
NO_COOKIE = 0xFFFF_FFFF_FFFF_FFFF

_INT = struct.Struct("=i")
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_CONDITION = struct.Struct("=BBHBBxxi")  # inet_diag_bc_op, inet_diag_hostcond
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")  # inet_diag_req_v2 with its inet_diag_sockid
# nlmsghdr and inet_diag_msg with its inet_diag_sockid, for IPv4 and IPv6; ports come in network order
_REPLY4 = struct.Struct("=IHH8x" + "xBBxHH4s12x4s12xIQIIIII")
_REPLY6 = struct.Struct("=IHH8x" + "xBBxHH16s16sIQIIIII")

_BUFFER = 65536  # the kernel fills 32 KiB at most
_AT_ONCE = 64  # exact look-ups in one message: the answers have room in any receive buffer
_ATTEMPTS = 10  # dumps until one is consistent
_STATES = [TcpState.CLOSED, *TcpState]  # by number; number 0 does not occur
_EVERY_STATE = sum(1 << state for state in TcpState)


class Extension(enum.IntFlag):
    """What to ask for beyond what comes unasked (``idiag_ext``)."""

    INFO = 1 << INET_DIAG_INFO - 1
    CONGESTION = 1 << INET_DIAG_CONG - 1
    MEMORY = 1 << INET_DIAG_SKMEMINFO - 1


class Endpoint(NamedTuple):
    """One end to filter by: addresses that begin with the first bits of ``address``, and a port.

    ``address`` is packed, 4 or 16 bytes in network order, or empty for any; 4 bytes match IPv4-mapped IPv6 sockets too.
    ``prefix_length`` counts bits, None means all of them. ``port`` None means any.
    """

    address: bytes = b""
    port: int | None = None
    prefix_length: int | None = None


class Connection(NamedTuple):
    """One socket, as the kernel describes it."""

    four_tuple: FourTuple  # as on the wire: IPv4-mapped addresses are 4 bytes long
    family: int  # the socket's: 4 or 6; 6 with 4-byte addresses is an IPv4-mapped socket
    state: TcpState
    timer: int  # 0 none, 1 retransmission, 2 keepalive, 3 TIME_WAIT, 4 zero window probe
    expires: int  # milliseconds until that timer fires
    recv_queue: int  # bytes not read yet; a listener's: connections not accepted yet
    send_queue: int  # bytes not acknowledged yet, and the FIN; a listener's: its backlog
    uid: int
    inode: int  # 0: no process has it
    cookie: int  # never used again while the host is up
    interface: int  # index of the device it is bound to, or 0
    attributes: bytes  # netlink attributes, as they came

    def attribute(self, kind: int) -> bytes | None:
        """The payload of the INET_DIAG_* attribute of that number, None if there is none."""
        return _attribute(self.attributes, kind)

    @property
    def info(self) -> bytes:
        """Struct tcp_info, for `migrate.kernel.tcpinfo`, if Extension.INFO was asked for; empty without an inode."""
        return self.attribute(INET_DIAG_INFO) or b""

    @property
    def congestion(self) -> str:
        """The name of the congestion control, if Extension.CONGESTION was asked for."""
        return _text(self.attribute(INET_DIAG_CONG))

    @property
    def memory(self) -> tuple[int, ...]:
        """The SK_MEMINFO_* numbers of linux/sock_diag.h in their order, bytes, if Extension.MEMORY was asked for."""
        raw = self.attribute(INET_DIAG_SKMEMINFO) or b""
        return struct.unpack(f"={len(raw) // 4}I", raw)

    @property
    def mark(self) -> int:
        """SO_MARK; 0 also where this process lacks CAP_NET_ADMIN."""
        return int.from_bytes(self.attribute(INET_DIAG_MARK) or b"", sys.byteorder)

    @property
    def signed(self) -> bool:
        """Whether it has keys of TCP_MD5SIG, if Extension.INFO was asked for; False also without CAP_NET_ADMIN."""
        return self.attribute(INET_DIAG_MD5SIG) is not None

    @property
    def ulp(self) -> str:
        """The upper layer protocol, if Extension.INFO was asked for: "tls" (kTLS), "mptcp" (a subflow of it), or ""."""
        return _text(_attribute(self.attribute(INET_DIAG_ULP_INFO) or b"", INET_ULP_INFO_NAME))


class SockDiag:
    """A sock_diag socket for any number of questions about the network namespace that it was made in. Not for two
    threads at once.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        except OSError as error:
            raise _explained(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; doing so again is harmless."""
        self._socket.close()

    def list_connections(
        self,
        *,
        states: Iterable[TcpState] | None = None,
        local: Endpoint | None = None,
        remote: Endpoint | None = None,
        family: int | None = None,
        extensions: int = 0,
    ) -> list[Connection]:
        """The sockets that match; the kernel does the matching.

        ``states`` None means all but LISTEN; ``family`` 4 or 6 is the socket's; ``extensions`` are bits of `Extension`.
        Sockets in CLOSED are in no table of the kernel's and never appear. Raises HostError, KernelError.
        """
        mask = _EVERY_STATE & ~(1 << TcpState.LISTEN) if states is None else sum(1 << state for state in set(states))
        program = _assemble(local, remote)
        found: dict[int, Connection] = {}
        for number in (4, 6):
            if family in (None, number) and not (number == 4 and _is_ipv6(local, remote)):
                found |= self._dump(number, mask, extensions, program)
        return list(found.values())

    def find(self, four_tuple: FourTuple, *, extensions: int = 0) -> Connection | None:
        """That connection, in whatever state, or None. Raises HostError, KernelError.

        Costs microseconds if it is there. If not, all sockets are searched, as the exact look-up of the kernel passes
        over those that are bound to a device.
        """
        local, local_port, remote, remote_port = four_tuple
        try:
            found = self._ask(NLM_F_REQUEST, _exactly(four_tuple, extensions))
        except FileNotFoundError:
            found = {}
        except OSError as error:
            raise _explained(error) from None
        for connection in found.values():  # one; where no connection is, the listener that would get the segment
            if connection.four_tuple == four_tuple:
                return connection
        here, there = Endpoint(local, local_port), Endpoint(remote, remote_port)
        return next(iter(self.list_connections(local=here, remote=there, extensions=extensions)), None)

    def exists(self, four_tuple: FourTuple) -> bool:
        """Whether that connection is here: the exact look-up alone, which passes over sockets that are bound to a
        device. Raises HostError, KernelError.
        """
        return bool(self.existing([four_tuple]))

    def existing(self, tuples: Sequence[FourTuple]) -> set[FourTuple]:
        """Those of ``tuples`` that `exists` says are here, some 4 µs each."""
        found: set[FourTuple] = set()
        for start in range(0, len(tuples), _AT_ONCE):
            asked = tuples[start : start + _AT_ONCE]
            wrong = 0
            try:
                self._socket.send(b"".join(_numbered(number, _exactly(each, 0)) for number, each in enumerate(asked)))
                for _ in asked:  # all answers wait when send() returns
                    answer = self._socket.recv(_BUFFER, socket.MSG_DONTWAIT)
                    _, kind, _, number, _ = _HEADER.unpack_from(answer)
                    if kind == NLMSG_ERROR:
                        (code,) = _INT.unpack_from(answer, _HEADER.size)
                        wrong = wrong if code == -errno.ENOENT else -code
                    # Where no connection is, the kernel gives the listener that would get the segment.
                    elif answer[_HEADER.size + 1] != TcpState.LISTEN:
                        found.add(asked[number])
            except OSError as error:
                raise _explained(error) from None
            if wrong:
                raise _explained(OSError(wrong, os.strerror(wrong)))
        return found

    def forget_time_wait(self, four_tuple: FourTuple) -> None:
        """End that TIME_WAIT before its time, if there is one; no segment leaves. Raises PrivilegeError, KernelError.

        In any other state the kernel would reset the connection (SOCK_DESTROY), so that one is left alone.
        """
        connection = self.find(four_tuple)
        if connection is None or connection.state is not TcpState.TIME_WAIT:
            return
        try:
            self._ask(NLM_F_REQUEST | NLM_F_ACK, _exactly(four_tuple, 0), SOCK_DESTROY)
        except FileNotFoundError:
            pass  # its time was over
        except OSError as error:
            raise _explained(error) from None

    def _dump(self, family: int, states: int, extensions: int, program: bytes) -> dict[int, Connection]:
        number = socket.AF_INET if family == 4 else socket.AF_INET6
        request = _REQUEST.pack(number, socket.IPPROTO_TCP, extensions, states, b"", b"", b"", b"", 0, 0)
        if program:
            request += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(program), INET_DIAG_REQ_BYTECODE) + program
        for _ in range(_ATTEMPTS):
            try:
                return self._ask(NLM_F_REQUEST | NLM_F_DUMP, request)
            except InterruptedError:
                continue
            except OSError as error:
                raise _explained(error) from None
        raise KernelError("listing sockets", errno.EINTR, hint="they change too quickly; try again")

    def _ask(self, flags: int, request: bytes, message: int = SOCK_DIAG_BY_FAMILY) -> dict[int, Connection]:
        # One request and all of its answer. By cookie, since a hash bucket that changes during a dump can show a socket
        # twice. Raises OSError: the kernel's, and InterruptedError where the kernel says the dump is inconsistent.
        # This loop is what a listing costs, so it makes no call that it can do without.
        header = _HEADER.pack(_HEADER.size + len(request), message, flags, 0, 0)
        self._socket.send(header + request)
        found: dict[int, Connection] = {}
        flags_seen, more, new = 0, True, tuple.__new__
        while more:
            data, offset = self._socket.recv(_BUFFER), 0
            size = len(data)
            data += bytes(_REPLY6.size)  # so that a short message at the end unpacks like the rest
            while offset < size:
                ipv4 = data[offset + _HEADER.size] == socket.AF_INET
                (
                    length, kind, message_flags, state, timer, local_port, remote_port, local, remote,
                    interface, cookie, expires, recv_queue, send_queue, uid, inode,
                ) = (_REPLY4 if ipv4 else _REPLY6).unpack_from(data, offset)  # fmt: skip
                end = offset + length
                flags_seen |= message_flags
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    (code,) = _INT.unpack_from(data, offset + _HEADER.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    more = False
                else:
                    if not ipv4 and local.startswith(MAPPED):
                        local, remote = local[12:], remote[12:]
                    four_tuple = new(FourTuple, (local, ntohs(local_port), remote, ntohs(remote_port)))
                    found[cookie] = new(Connection, (
                        four_tuple, 4 if ipv4 else 6, _STATES[state], timer, expires, recv_queue, send_queue,
                        uid, inode, cookie, interface, data[offset + _REPLY6.size : end],
                    ))  # fmt: skip
                    more = flags & NLM_F_DUMP != 0
                offset = end + 3 & ~3
        if flags_seen & NLM_F_DUMP_INTR:
            raise InterruptedError(errno.EINTR, "inconsistent dump")
        return found


def _numbered(number: int, request: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, number, 0) + request


def list_connections(
    *,
    states: Iterable[TcpState] | None = None,
    local: Endpoint | None = None,
    remote: Endpoint | None = None,
    family: int | None = None,
    extensions: int = 0,
) -> list[Connection]:
    """`SockDiag.list_connections` in this thread's network namespace."""
    with SockDiag() as diag:
        return diag.list_connections(states=states, local=local, remote=remote, family=family, extensions=extensions)


def _exactly(four_tuple: FourTuple, extensions: int) -> bytes:
    """The question for one connection, in whatever state."""
    local, local_port, remote, remote_port = four_tuple
    return _REQUEST.pack(
        socket.AF_INET if len(local) == 4 else socket.AF_INET6,
        socket.IPPROTO_TCP,
        extensions,
        _EVERY_STATE,
        local_port.to_bytes(2, "big"),
        remote_port.to_bytes(2, "big"),
        local,
        remote,
        0,
        NO_COOKIE,
    )


def find(four_tuple: FourTuple, *, extensions: int = 0) -> Connection | None:
    """`SockDiag.find` in this thread's network namespace."""
    with SockDiag() as diag:
        return diag.find(four_tuple, extensions=extensions)


def _is_ipv6(*ends: Endpoint | None) -> bool:
    return any(end is not None and len(end.address) == 16 for end in ends)


def _assemble(local: Endpoint | None, remote: Endpoint | None) -> bytes:
    # A chain of conditions for the kernel's filter machine (net/ipv4/inet_diag.c, inet_diag_bc_run): each steps to the
    # next if it holds, else 4 bytes past the end, which rejects.
    program = b""
    for code, end in ((INET_DIAG_BC_D_COND, remote), (INET_DIAG_BC_S_COND, local)):
        if end is not None and (end.address or end.port is not None):
            family = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 16: socket.AF_INET6}[len(end.address)]
            bits = 8 * len(end.address) if end.prefix_length is None else end.prefix_length
            port = -1 if end.port is None else end.port
            size = _CONDITION.size + len(end.address)
            reject = size + len(program) + 4
            program = _CONDITION.pack(code, size, reject, family, bits, port) + end.address + program
    return program


class _Layout(NamedTuple):
    """Where the attributes lie in one sequence of them."""

    headers: struct.Struct  # unpacks the headers and skips what they announce
    words: tuple[int, ...]  # the headers, each as one number
    places: dict[int, slice]  # payloads by type


_layouts: dict[int, _Layout] = {}  # by length of the sequence: the last one seen


def _attribute(data: bytes, wanted: int) -> bytes | None:
    # All sockets of a dump have much the same attributes. To see that they lie as in the last sequence of this length
    # takes one call, a third of what it takes to walk from each to the next.
    layout = _layouts.get(len(data))
    if layout is None or layout.headers.unpack_from(data) != layout.words:
        layout = _layouts[len(data)] = _walk(data)
    place = layout.places.get(wanted)
    return None if place is None else data[place]


def _walk(data: bytes) -> _Layout:
    places, headers, offset = {}, "=", 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        payload = slice(offset + _ATTRIBUTE.size, offset + length)
        places[kind & NLA_TYPE_MASK] = payload
        following = min(offset + max(length, _ATTRIBUTE.size) + 3 & ~3, len(data))
        headers += f"I{following - payload.start}x"
        offset = following
    compiled = struct.Struct(headers)
    return _Layout(compiled, compiled.unpack_from(data), places)


def _text(raw: bytes | None) -> str:
    return (raw or b"").rstrip(b"\0").decode("ascii", "replace")


def _explained(error: OSError) -> Error:
    if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
        return HostError(
            "this kernel does not tell about its TCP sockets (sock_diag)",
            hint="modprobe tcp_diag, or a kernel with CONFIG_INET_DIAG and CONFIG_INET_TCP_DIAG",
        )
    return from_oserror("sock_diag", error)
