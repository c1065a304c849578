"""TCP_REPAIR and its family (include/uapi/linux/tcp.h, net/ipv4/tcp.c): each call one small function.

All need CAP_NET_ADMIN in the user namespace that owns the socket's network namespace. OSError leaves here as it
comes: what a failure means depends on the caller's step, and the caller says so.

::

    send queue                               receive queue
    snd_una           snd_nxt    write_seq   copied_seq        rcv_nxt
       |--- sent ---------|--- unsent --|       |--- received ----|
       |<----- SIOCOUTQ --------------->|       |<--- SIOCINQ --->|
                          |<OUTQNSD --->|
    TCP_QUEUE_SEQ reads write_seq and rcv_nxt; in CLOSE it sets where a queue will begin.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct
from fcntl import ioctl

from migrate.kernel import uapi

__all__ = [
    "at_mark",
    "authenticated",
    "begin_queues",
    "congestion",
    "disconnect",
    "enter_repair",
    "in_repair",
    "leave_repair",
    "meminfo",
    "outstanding_length",
    "peek",
    "queue_end",
    "queue_ends",
    "received_length",
    "repair_options",
    "select_queue",
    "set_congestion",
    "set_repair_options",
    "set_timestamp",
    "set_window",
    "state",
    "tcp_info",
    "timestamp",
    "unsent_length",
    "upper_layer",
    "window",
]

_TCP, _SOL = int(socket.IPPROTO_TCP), socket.SOL_SOCKET
_TCP_INFO_BYTES = 232  # up to tcpi_snd_wnd: what Linux 5.4 fills
# Names of this module are found quicker than others.
_REPAIR, _QUEUE, _SEQ = uapi.TCP_REPAIR, uapi.TCP_REPAIR_QUEUE, uapi.TCP_QUEUE_SEQ
_REPAIR_OPTIONS, _REPAIR_WINDOW, _TIMESTAMP = uapi.TCP_REPAIR_OPTIONS, uapi.TCP_REPAIR_WINDOW, uapi.TCP_TIMESTAMP
_INT = struct.Struct("=i")
_WINDOW = struct.Struct("=5I")  # struct tcp_repair_window
_pack_window = _WINDOW.pack
_meminfo = struct.Struct("=II12xI").unpack_from  # three of SK_MEMINFO_*
_OPTION = struct.Struct("=II")  # struct tcp_repair_opt
_AO_INFO_BYTES = 104  # of struct tcp_ao_info_opt
_FOUR = bytes(4)
_UNSPEC = bytes(16)  # struct sockaddr, sa_family AF_UNSPEC

# PyDLL: these calls never wait, so the interpreter lock is kept. No argtypes: declaring them doubles a call's cost.
_libc = ctypes.PyDLL(None, use_errno=True)
_connect = _libc.connect
_setsockopt = ctypes.PyDLL(None).setsockopt  # keeps no errno: what fails is called again, to say why


def state(sock: socket.socket) -> int:
    """The kernel's number of the TCP state: the first byte of TCP_INFO."""
    return sock.getsockopt(_TCP, socket.TCP_INFO, 1)[0]


def tcp_info(sock: socket.socket) -> bytes:
    """struct tcp_info, raw: `kernel.tcpinfo` reads it."""
    return sock.getsockopt(_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)


def enter_repair(sock: socket.socket) -> None:
    """Repair mode: no segment leaves because of a call on this socket; the application's reads and writes fail."""
    sock.setsockopt(_TCP, _REPAIR, 1)  # TCP_REPAIR_ON


def in_repair(sock: socket.socket) -> bool:
    """Whether it is in repair mode."""
    return sock.getsockopt(_TCP, uapi.TCP_REPAIR) == uapi.TCP_REPAIR_ON


def leave_repair(sock: socket.socket, *, probe: bool) -> None:
    """An ordinary socket again. With ``probe`` a window probe leaves and the peer answers with its window."""
    sock.setsockopt(_TCP, _REPAIR, 0 if probe else -1)  # TCP_REPAIR_OFF, TCP_REPAIR_OFF_NO_WP


def disconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which Python's connect() cannot say: in repair mode the silent way to CLOSE.

    It acts on the socket, not on the descriptor: every owner's next call gives ECONNABORTED, a poll gives ERR and HUP.
    """
    if _connect(sock.fileno(), _UNSPEC, 16) < 0:
        raise _failure()


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def select_queue(sock: socket.socket, queue: int) -> None:
    """Which queue the next repair calls mean: uapi.TCP_SEND_QUEUE, TCP_RECV_QUEUE or TCP_NO_QUEUE."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR_QUEUE, queue)


def queue_ends(sock: socket.socket) -> tuple[int, int]:
    """(write_seq, rcv_nxt): the ends of both queues, one look; on return no queue is selected."""
    get, put = sock.getsockopt, sock.setsockopt
    put(_TCP, _QUEUE, 2)  # TCP_SEND_QUEUE
    write_seq = get(_TCP, _SEQ) & 0xFFFFFFFF
    put(_TCP, _QUEUE, 1)  # TCP_RECV_QUEUE
    rcv_nxt = get(_TCP, _SEQ) & 0xFFFFFFFF
    put(_TCP, _QUEUE, 0)  # TCP_NO_QUEUE
    return write_seq, rcv_nxt


def begin_queues(sock: socket.socket, write_seq: int, rcv_nxt: int) -> None:
    """Enter repair mode and say where both queues begin, 0..2**32-1; only in CLOSE. Selects the receive queue."""
    put = sock.setsockopt  # takes an int with the same 32 bits: as bytes they cost it a microsecond
    put(_TCP, _REPAIR, 1)  # TCP_REPAIR_ON
    put(_TCP, _QUEUE, 2)  # TCP_SEND_QUEUE
    put(_TCP, _SEQ, write_seq - (write_seq >> 31 << 32))
    put(_TCP, _QUEUE, 1)  # TCP_RECV_QUEUE
    put(_TCP, _SEQ, rcv_nxt - (rcv_nxt >> 31 << 32))


def queue_end(sock: socket.socket) -> int:
    """The sequence number after the last byte of the selected queue (write_seq or rcv_nxt), 0..2**32-1."""
    return sock.getsockopt(_TCP, uapi.TCP_QUEUE_SEQ) & 0xFFFFFFFF


def meminfo(sock: socket.socket) -> tuple[int, int, int]:
    """Of SO_MEMINFO (sock_diag.h): rmem_alloc, rcvbuf and wmem_queued, bytes.

    rmem_alloc or wmem_queued of 0 means an empty queue; more may be bookkeeping or segments out of order.
    """
    return _meminfo(sock.getsockopt(_SOL, uapi.SO_MEMINFO, 36))


def received_length(sock: socket.socket) -> int:
    """SIOCINQ: bytes received in order and not read."""
    length: int = _INT.unpack(ioctl(sock.fileno(), uapi.SIOCINQ, _FOUR))[0]
    return length


def at_mark(sock: socket.socket) -> bool:
    """SIOCATMARK: the next byte to be read is the urgent one."""
    mark: int = _INT.unpack(ioctl(sock.fileno(), uapi.SIOCATMARK, _FOUR))[0]
    return mark != 0


def outstanding_length(sock: socket.socket) -> int:
    """SIOCOUTQ: write_seq - snd_una, so it counts a FIN that is not acknowledged."""
    length: int = _INT.unpack(ioctl(sock.fileno(), uapi.SIOCOUTQ, _FOUR))[0]
    return length


def unsent_length(sock: socket.socket) -> int:
    """SIOCOUTQNSD: bytes written and never sent; counts an unsent FIN."""
    length: int = _INT.unpack(ioctl(sock.fileno(), uapi.SIOCOUTQNSD, _FOUR))[0]
    return length


def peek(sock: socket.socket, length: int) -> bytes:
    """The selected queue's bytes, at most ``length``; the queue stays as it is.

    A receive queue is looked at from its beginning whatever SO_PEEK_OFF the application set.
    """
    return sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def window(sock: socket.socket) -> tuple[int, ...]:
    """TCP_REPAIR_WINDOW: (snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup), windows in bytes; only in repair mode."""
    return _WINDOW.unpack(sock.getsockopt(_TCP, uapi.TCP_REPAIR_WINDOW, 20))


def set_window(sock: socket.socket, values: tuple[int, int, int, int, int]) -> None:
    """TCP_REPAIR_WINDOW, as `window` gives it. EINVAL where max_window < snd_wnd or rcv_wup lies after rcv_nxt."""
    packed = _pack_window(*values)
    if _setsockopt(sock.fileno(), _TCP, _REPAIR_WINDOW, packed, 20):
        sock.setsockopt(_TCP, _REPAIR_WINDOW, packed)


def congestion(sock: socket.socket) -> str:
    """TCP_CONGESTION: the name of the congestion control."""
    return _text(sock.getsockopt(_TCP, socket.TCP_CONGESTION, 16))


def set_congestion(sock: socket.socket, name: str) -> bool:
    """Whether this host has that congestion control and allows it."""
    try:
        sock.setsockopt(_TCP, socket.TCP_CONGESTION, name.encode("ascii"))
    except (FileNotFoundError, PermissionError):
        return False
    return True


@functools.lru_cache
def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "replace")


def upper_layer(sock: socket.socket) -> str:
    """TCP_ULP: the name of the protocol that the kernel runs above TCP ("tls"), or empty."""
    return _text(sock.getsockopt(_TCP, uapi.TCP_ULP, 16))


def authenticated(sock: socket.socket) -> bool:
    """Whether it has keys of TCP-AO (RFC 5925)."""
    try:
        sock.getsockopt(_TCP, uapi.TCP_AO_INFO, _AO_INFO_BYTES)
    except OSError:  # ENOENT, and ENOPROTOOPT where the kernel has no TCP-AO
        return False
    return True


def timestamp(sock: socket.socket) -> int:
    """The value the socket's next segment would carry in its timestamp option, 0..2**32-1."""
    return sock.getsockopt(_TCP, uapi.TCP_TIMESTAMP) & 0xFFFFFFFF


def set_timestamp(sock: socket.socket, value: int) -> None:
    """Go on counting from there. Since Linux 6.7 the low bit chooses the unit: 1 microseconds, 0 milliseconds."""
    sock.setsockopt(_TCP, _TIMESTAMP, (value & 0xFFFFFFFF) - (value << 1 & 0x100000000))


@functools.lru_cache(maxsize=1024)
def repair_options(mss: int, snd_wscale: int, rcv_wscale: int, sack: bool, timestamps: bool) -> bytes:
    """What was negotiated, as TCP_REPAIR_OPTIONS takes it; scales of -1 mean that scaling was not."""
    options = _OPTION.pack(uapi.TCPOPT_MSS, mss)
    if timestamps:
        options += _OPTION.pack(uapi.TCPOPT_TIMESTAMP, 0)
    if sack:
        options += _OPTION.pack(uapi.TCPOPT_SACK_PERMITTED, 0)
    if snd_wscale >= 0:
        options += _OPTION.pack(uapi.TCPOPT_WINDOW, snd_wscale | rcv_wscale << 16)
    return options


def set_repair_options(sock: socket.socket, options: bytes) -> None:
    """Only in repair mode and in ESTABLISHED, which connect() in repair mode gives at once."""
    if _setsockopt(sock.fileno(), _TCP, _REPAIR_OPTIONS, options, len(options)):
        sock.setsockopt(_TCP, _REPAIR_OPTIONS, options)
