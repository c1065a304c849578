"""Socket to record: check, dump, thaw, release.

The order of the calls in `dump` is the contract with the kernel:

1. TCP_INFO, from which the state is judged: whatever must be refused is refused before anything is touched.
2. The socket options, before repair mode changes SO_REUSEADDR. Then TCP_REPAIR on: the application's own reads and
   writes fail, so the queues stand still as far as it is concerned. The network does not: hold the connection first
   (`migrate.hold`), or the copy may be stale.
3. Where the queues end. A queue is selected for as short as can be: an application's write() would enter it, and a
   pacing timer would move bytes of a selected send queue on as sent without sending them.
4. Whether the queues hold anything, now that nothing can enter them; if so, once more, with their bytes.
5. Windows, timestamp, options, names. getpeername() comes last: it fails if the connection ended meanwhile.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

from migrate import unconnected
from migrate.errors import Error, Gone, NotFound, Refused, from_oserror
from migrate.fourtuple import unmapped
from migrate.ici import Ici, Queue
from migrate.kernel import options, sockopt, tcpinfo, uapi
from migrate.obstacle import obstacle
from migrate.tcpstate import REBUILD, TcpState, Way

__all__ = [
    "HOST",
    "KERNEL",
    "MOVABLE",
    "Changed",
    "HasFileno",
    "borrowed",
    "check",
    "divided",
    "dump",
    "explained",
    "freeze",
    "leave",
    "leave_out_what_comes_by_itself",
    "plain_queue",
    "read_frozen",
    "receive_queue",
    "release",
    "send_queue",
    "thaw",
]


class HasFileno(Protocol):
    """Whatever has a descriptor: a socket, a file object, an asyncio transport's socket."""

    def fileno(self) -> int: ...


MOVABLE = frozenset(state for state, plan in REBUILD.items() if plan.way is Way.REPAIR)
_FIN_QUEUED = frozenset(state for state, plan in REBUILD.items() if plan.sent_fin and not plan.fin_acked)

_TCP, _MAXSEG = int(socket.IPPROTO_TCP), socket.TCP_MAXSEG  # names of this module are found quicker than others
_TIMESTAMPS, _USEC_TS, _SACK = uapi.TCPI_OPT_TIMESTAMPS, uapi.TCPI_OPT_USEC_TS, uapi.TCPI_OPT_SACK
_WSCALE, _ECN = uapi.TCPI_OPT_WSCALE, uapi.TCPI_OPT_ECN
_ATTEMPTS = 3  # to read two numbers that a write changes together
_REPAIR_QUEUE, _PEEK = uapi.TCP_REPAIR_QUEUE, socket.MSG_PEEK | socket.MSG_DONTWAIT

HOST, KERNEL = os.uname().nodename, os.uname().release

_facts = tcpinfo.reader("state", "options", "wscales", "snd_mss", "rtt", "rttvar", "snd_ssthresh", "snd_cwnd", "advmss")


def check(sock: HasFileno) -> None:
    """Raise Refused, with the reason, if this connection cannot be dumped. Touches nothing."""
    with borrowed(sock) as real:
        _refuse_unless_movable(real)


def dump(sock: HasFileno) -> Ici:
    """The connection's record. The socket stays frozen: then `release` it, or `thaw` it, or close it (silently).

    Raises Refused before anything was touched, Gone if the connection ended meanwhile, PrivilegeError without
    CAP_NET_ADMIN, KernelError. After an error the socket is as it was before.
    """
    if not isinstance(sock, socket.socket):
        with borrowed(sock) as real:
            return dump(real)
    try:
        info = sockopt.tcp_info(sock)
        if info[0] not in MOVABLE:
            _refuse_unless_movable(sock)
            return unconnected.dump(sock, TcpState.from_kernel(info[0]))
        found = options.read(sock)
    except OSError as error:
        raise _why_not(sock, error) from None
    freeze(sock)
    try:
        sent = in_flight(sock)
        with suppress(Changed):
            return _read(sock, info, found, sent)
        return read_frozen(sock, found, sent)  # whoever was just writing has come to an end
    except BaseException as error:
        leave(sock, found)
        if isinstance(error, OSError):
            raise explained(error) from None
        raise


def freeze(sock: socket.socket) -> None:
    """Enter repair mode. Raises Refused, with the socket's own reason, PrivilegeError, NotFound."""
    try:
        sockopt.enter_repair(sock)
    except OSError as error:
        raise _why_not(sock, error) from None


def explained(error: OSError) -> Error:
    """What a failed call on a frozen socket means."""
    if error.errno in (errno.ENOTCONN, errno.ECONNRESET):
        return Gone("the connection ended while it was being dumped")
    return from_oserror("dumping a connection", error)


def in_flight(sock: socket.socket) -> int:
    """Bytes sent and not acknowledged, with a FIN, of a socket in repair mode of which no queue was selected yet.

    Later nobody can tell: while the send queue is selected, whatever makes the kernel send counts all of it as sent,
    and sends nothing. A write that had begun before may be such a thing.
    """
    for _ in range(_ATTEMPTS):
        outstanding = sockopt.outstanding_length(sock)
        sent = outstanding - sockopt.unsent_length(sock) if outstanding else 0
        if sockopt.outstanding_length(sock) == outstanding:
            return sent
    raise Changed("send")


def read_frozen(sock: socket.socket, found: dict[str, options.Value], sent: int) -> Ici:
    """The record of a socket in repair mode, by the documented calls.

    ``found`` are its options, ``sent`` is what `in_flight` said of it at first.
    """
    return _read(sock, sockopt.tcp_info(sock), found, sent)


def _read(sock: socket.socket, info: bytes, found: dict[str, options.Value], in_flight: int) -> Ici:
    """The record of a socket that is in repair mode; on return no queue is selected."""
    state, bits, wscales, mss, rtt, rttvar, ssthresh, cwnd, advmss = _facts(info)
    rmem_alloc, rcvbuf, _ = sockopt.meminfo(sock)
    outstanding = sockopt.outstanding_length(sock)
    write_seq, rcv_nxt = sockopt.queue_ends(sock)
    if sockopt.outstanding_length(sock) != outstanding:  # of which of the two moments write_seq is, nobody knows
        raise Changed("send")
    snd_una, urgent, received = (write_seq - outstanding) & 0xFFFFFFFF, -1, b""
    sent, unsent = send_queue(sock, state, outstanding, in_flight) if outstanding else (b"", b"")
    if rmem_alloc:
        rcv_nxt, urgent, received = receive_queue(sock)
    snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = sockopt.window(sock)
    timestamps = ts_value = 0
    if bits & _TIMESTAMPS:
        timestamps = 2 if bits & _USEC_TS else 1
        ts_value = sockopt.timestamp(sock)
    snd_wscale, rcv_wscale = tcpinfo.scales(wscales) if bits & _WSCALE else (-1, -1)
    mss_clamp = sock.getsockopt(_TCP, _MAXSEG)
    congestion = sockopt.congestion(sock)
    if found:
        leave_out_what_comes_by_itself(found, advmss, rcvbuf)
    local, remote = sock.getsockname(), sock.getpeername()
    # By position, in the order of the record's definition: by name takes ten times as long.
    return Ici(
        4 if len(local) == 2 else 6,
        _packed(local[0]),
        local[1],
        _packed(remote[0]),
        remote[1],
        state,
        snd_una,
        rcv_nxt,
        snd_wl1,
        snd_wnd,
        max_window,
        rcv_wnd,
        rcv_wup,
        mss_clamp,
        mss,
        snd_wscale,
        rcv_wscale,
        bits & _SACK != 0,
        timestamps,
        ts_value,
        1 if bits & _ECN else 0,
        congestion,
        cwnd,
        ssthresh,
        rtt,
        rttvar,
        b"",  # id and epoch are given by whoever moves the connection
        0,
        found,
        urgent,
        b"",
        HOST,
        time.time_ns(),
        KERNEL,
        sent,
        unsent,
        received,
    )


def leave_out_what_comes_by_itself(found: dict[str, options.Value], advmss: int, rcvbuf: int) -> None:
    """What has a field of its own, and sizes that the kernel gives a connection itself (tcp_init_buffer_space)."""
    found.pop("TCP_CONGESTION", None)
    lock = found.get("SO_BUF_LOCK", 0)
    if lock not in (1, 3):  # SOCK_SNDBUF_LOCK, and SOCK_RCVBUF_LOCK as well
        found.pop("SO_SNDBUF", None)  # follows the congestion window
    if lock in (0, 1) and "SO_RCVBUF" not in found:
        clamp = found.get("TCP_WINDOW_CLAMP", 0)
        if clamp == max(2 * advmss, rcvbuf // 2 - advmss) or _measured(clamp, rcvbuf):
            del found["TCP_WINDOW_CLAMP"]


def _measured(clamp: options.Value, rcvbuf: int) -> bool:
    """Whether the kernel gives it that buffer: rcvbuf * ratio / 256, from a half on (tcp_measure_rcv_mss())."""
    if not isinstance(clamp, int) or not rcvbuf // 2 < clamp < rcvbuf:
        return False
    ratio = -(-clamp * 256 // rcvbuf)
    return rcvbuf * ratio >> 8 == clamp


def thaw(sock: HasFileno, record: Ici | None = None) -> None:
    """Back to life here, as if nothing had been.

    Repair mode forgets SO_REUSEADDR, without which the connection could keep its server from binding its port again
    after a restart. It is put back as ``record``, which dump() gave, says; without a record it is set.
    """
    with borrowed(sock) as real:
        try:
            leave(real, {"SO_REUSEADDR": 1} if record is None else record.options)
        except OSError as error:
            raise from_oserror("thawing a connection", error) from None


def leave(sock: socket.socket, found: Mapping[str, options.Value]) -> None:
    """Leave repair mode; ``found`` are the options from before. Raises OSError."""
    if sockopt.state(sock) == TcpState.LISTEN:
        unconnected.thaw_listener(sock)
        return
    sockopt.leave_repair(sock, probe=True)
    if "SO_REUSEADDR" in found:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def release(sock: HasFileno) -> None:
    """Let go without a packet: every owner of the socket sees ECONNABORTED, the peer sees nothing.

    The socket must be frozen. A hold has to stand until the connection lives elsewhere: the peer's next segment
    would draw a RST from here.
    """
    if not isinstance(sock, socket.socket):
        with borrowed(sock) as real:
            return release(real)
    try:
        sockopt.disconnect(sock)
        # In repair mode the application's next call would say EPERM instead of ECONNABORTED.
        sockopt.leave_repair(sock, probe=False)
    except OSError as error:
        raise from_oserror("releasing a connection", error) from None


def send_queue(sock: socket.socket, state: int, outstanding: int, in_flight: int) -> tuple[Queue, Queue]:
    """(the sent part, the unsent part) of ``outstanding`` bytes, which count a FIN as ``in_flight`` does."""
    length = outstanding - (state in _FIN_QUEUED)
    return divided(plain_queue(sock, uapi.TCP_SEND_QUEUE, length) if length > 0 else b"", in_flight)


def divided(queue: bytes, in_flight: int) -> tuple[Queue, Queue]:
    """A send queue's sent part, which has ``in_flight`` bytes or with a FIN one less, and the unsent part."""
    if 0 < in_flight < len(queue):
        whole = memoryview(queue)
        return whole[:in_flight], whole[in_flight:]
    return (queue, b"") if in_flight else (b"", queue)


def plain_queue(sock: socket.socket, which: int, length: int) -> bytes:
    """A queue (uapi.TCP_SEND_QUEUE, TCP_RECV_QUEUE) that has that length, which is not 0.

    Of a receive queue the urgent byte must have been read, and SO_PEEK_OFF must not be set. Raises Refused if it has
    another length: one byte more is asked for to notice growth.
    """
    put = sock.setsockopt
    put(_TCP, _REPAIR_QUEUE, which)
    data = sock.recv(length + 1, _PEEK)
    put(_TCP, _REPAIR_QUEUE, 0)  # TCP_NO_QUEUE
    _require_length(data, length, "send" if which == uapi.TCP_SEND_QUEUE else "receive")
    return data


def receive_queue(sock: socket.socket) -> tuple[int, int, bytes]:
    """(rcv_nxt, where the urgent byte is or -1, what is unread), from the beginning whatever SO_PEEK_OFF says."""
    sockopt.select_queue(sock, uapi.TCP_RECV_QUEUE)
    rcv_nxt = sockopt.queue_end(sock)
    with _whole(sock):
        length, urgent = sockopt.received_length(sock), 0 if sockopt.at_mark(sock) else -1
        data = sockopt.peek(sock, length + 1) if length else b""
        if 0 < len(data) < length:  # what is read ends before the mark
            urgent = len(data)
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_PEEK_OFF, urgent)
            data += sockopt.peek(sock, length - urgent + 1)
        _require_length(data, length, "receive")
    sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)
    return rcv_nxt, urgent, data


@contextmanager
def _whole(sock: socket.socket) -> Iterator[None]:
    """Meanwhile the queue is read from its beginning, and past the urgent byte, which is a byte like others."""
    get, put = sock.getsockopt, sock.setsockopt
    offset, inline = get(socket.SOL_SOCKET, uapi.SO_PEEK_OFF), get(socket.SOL_SOCKET, socket.SO_OOBINLINE)
    if offset >= 0:
        put(socket.SOL_SOCKET, uapi.SO_PEEK_OFF, -1)
    if not inline:
        put(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    try:
        yield
    finally:
        put(socket.SOL_SOCKET, uapi.SO_PEEK_OFF, offset)
        if not inline:
            put(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)


class Changed(Refused):
    """A queue grew while it was read. A process in the midst of a write may add to one of a frozen socket, once."""

    def __init__(self, which: str) -> None:
        super().__init__(f"its {which} queue changed while it was read", hint="hold it first, or try again")


def _require_length(data: bytes, length: int, which: str) -> None:
    if len(data) != length:
        raise Changed(which)


@functools.lru_cache(maxsize=4096)
def _packed(address: str) -> bytes:
    """Network byte order; an IPv4-mapped IPv6 address gives the four bytes that are on the wire."""
    if ":" not in address:
        return socket.inet_aton(address)
    return unmapped(socket.inet_pton(socket.AF_INET6, address.partition("%")[0]))


@contextmanager
def borrowed(sock: HasFileno) -> Iterator[socket.socket]:
    """The object itself if it is a socket; else a socket over the same descriptor, which stays the caller's."""
    if isinstance(sock, socket.socket):
        yield sock
        return
    try:
        over = socket.socket(fileno=sock.fileno())
    except OSError as error:
        if error.errno == errno.EBADF:
            raise NotFound(f"descriptor {sock.fileno()} is not open") from None
        raise Refused(f"descriptor {sock.fileno()} is no socket") from None
    try:
        yield over
    finally:
        over.detach()


def _refuse_unless_movable(sock: socket.socket) -> None:
    if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise Refused("it is no TCP socket")
    try:
        protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        multipath = protocol == uapi.IPPROTO_MPTCP
        if not multipath and protocol != socket.IPPROTO_TCP:
            raise Refused("it is no TCP socket")
        state = sockopt.state(sock)
        upper_layer = "" if multipath else sockopt.upper_layer(sock)
        authenticated = not multipath and sockopt.authenticated(sock)
        refused = obstacle(state, multipath=multipath, upper_layer=upper_layer, authenticated=authenticated)
    except OSError as error:
        raise from_oserror("looking at a connection", error) from None
    if refused is not None:
        raise refused


def _why_not(sock: socket.socket, error: OSError) -> Error:
    """The reason behind a refused TCP_REPAIR: the socket's own, else the missing privilege."""
    if error.errno == errno.EBADF:
        return NotFound("the descriptor is not open")
    try:
        _refuse_unless_movable(sock)
    except Refused as refused:
        return refused
    return from_oserror("TCP_REPAIR", error)
