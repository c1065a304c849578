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
import os
import socket
import struct
from fcntl import ioctl

from migrate.kernel import uapi

__all__ = [
    "congestion",
    "disconnect",
    "enter_repair",
    "in_repair",
    "leave_repair",
    "meminfo",
    "peek",
    "queue_end",
    "queue_lengths",
    "repair_options",
    "select_queue",
    "set_queue_start",
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

_TCP = socket.IPPROTO_TCP
_TCP_INFO_BYTES = 232  # up to tcpi_snd_wnd: what Linux 5.4 fills
_INT = struct.Struct("=i")
_UNSIGNED = struct.Struct("=I")
_WINDOW = struct.Struct("=5I")  # struct tcp_repair_window
_MEMINFO = struct.Struct("=9I")  # SK_MEMINFO_*
_OPTION = struct.Struct("=II")  # struct tcp_repair_opt
_FOUR = bytes(4)
_UNSPEC = bytes(16)  # struct sockaddr, sa_family AF_UNSPEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.connect.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def state(sock: socket.socket) -> int:
    """The kernel's number of the TCP state: the first byte of TCP_INFO."""
    return sock.getsockopt(_TCP, socket.TCP_INFO, 1)[0]


def tcp_info(sock: socket.socket) -> bytes:
    """struct tcp_info, raw: `kernel.tcpinfo` reads it."""
    return sock.getsockopt(_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)


def enter_repair(sock: socket.socket) -> None:
    """Repair mode: no segment leaves because of a call on this socket; the application's reads and writes fail."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR, uapi.TCP_REPAIR_ON)


def in_repair(sock: socket.socket) -> bool:
    """Whether it is in repair mode."""
    return sock.getsockopt(_TCP, uapi.TCP_REPAIR) == uapi.TCP_REPAIR_ON


def leave_repair(sock: socket.socket, *, probe: bool) -> None:
    """An ordinary socket again. With ``probe`` a window probe leaves and the peer answers with its window."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR, uapi.TCP_REPAIR_OFF if probe else uapi.TCP_REPAIR_OFF_NO_WP)


def disconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which Python's connect() cannot say: in repair mode the silent way to CLOSE.

    It acts on the socket, not on the descriptor: every owner's next call gives ECONNABORTED, a poll gives ERR and HUP.
    """
    if _libc.connect(sock.fileno(), _UNSPEC, len(_UNSPEC)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def select_queue(sock: socket.socket, queue: int) -> None:
    """Which queue the next repair calls mean: uapi.TCP_SEND_QUEUE, TCP_RECV_QUEUE or TCP_NO_QUEUE."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR_QUEUE, queue)


def queue_end(sock: socket.socket) -> int:
    """The sequence number after the last byte of the selected queue (write_seq or rcv_nxt), 0..2**32-1."""
    return sock.getsockopt(_TCP, uapi.TCP_QUEUE_SEQ) & 0xFFFFFFFF


def set_queue_start(sock: socket.socket, sequence: int) -> None:
    """Where the selected queue begins; only in CLOSE."""
    sock.setsockopt(_TCP, uapi.TCP_QUEUE_SEQ, _UNSIGNED.pack(sequence & 0xFFFFFFFF))


def meminfo(sock: socket.socket) -> tuple[int, ...]:
    """SO_MEMINFO: (rmem_alloc, rcvbuf, wmem_alloc, sndbuf, fwd_alloc, wmem_queued, …) in bytes (sock_diag.h)."""
    return _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, uapi.SO_MEMINFO, 36))


def queue_lengths(sock: socket.socket) -> tuple[int, int]:
    """(unread bytes received, bytes sent or unsent and not acknowledged); the latter counts an unacknowledged FIN."""
    descriptor = sock.fileno()
    received = _INT.unpack(ioctl(descriptor, uapi.SIOCINQ, _FOUR))[0]
    return received, _INT.unpack(ioctl(descriptor, uapi.SIOCOUTQ, _FOUR))[0]


def unsent_length(sock: socket.socket) -> int:
    """Bytes written and never sent; counts an unsent FIN."""
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
    """TCP_REPAIR_WINDOW, in the order that `window` gives. EINVAL where max_window < snd_wnd or rcv_wup lies after rcv_nxt."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR_WINDOW, _WINDOW.pack(*values))


def congestion(sock: socket.socket) -> str:
    """TCP_CONGESTION: the name of the congestion control."""
    return sock.getsockopt(_TCP, socket.TCP_CONGESTION, 16).partition(b"\0")[0].decode("ascii")


def upper_layer(sock: socket.socket) -> str:
    """TCP_ULP: the name of the protocol that the kernel runs above TCP ("tls"), or empty."""
    return sock.getsockopt(_TCP, uapi.TCP_ULP, 16).partition(b"\0")[0].decode("ascii", "replace")


def timestamp(sock: socket.socket) -> int:
    """The value the socket's next segment would carry in its timestamp option, 0..2**32-1."""
    return sock.getsockopt(_TCP, uapi.TCP_TIMESTAMP) & 0xFFFFFFFF


def set_timestamp(sock: socket.socket, value: int) -> None:
    """Go on counting from there. Since Linux 6.7 the low bit chooses the unit: 1 microseconds, 0 milliseconds."""
    sock.setsockopt(_TCP, uapi.TCP_TIMESTAMP, _UNSIGNED.pack(value & 0xFFFFFFFF))


def repair_options(*, mss: int, scales: tuple[int, int] | None, sack: bool, timestamps: bool) -> bytes:
    """What was negotiated, as TCP_REPAIR_OPTIONS takes it. ``scales`` is (ours for sending, ours for receiving)."""
    options = _OPTION.pack(uapi.TCPOPT_MSS, mss)
    if timestamps:
        options += _OPTION.pack(uapi.TCPOPT_TIMESTAMP, 0)
    if sack:
        options += _OPTION.pack(uapi.TCPOPT_SACK_PERMITTED, 0)
    if scales is not None:
        options += _OPTION.pack(uapi.TCPOPT_WINDOW, scales[0] | scales[1] << 16)
    return options


def set_repair_options(sock: socket.socket, options: bytes) -> None:
    """Only in repair mode and in ESTABLISHED, which connect() in repair mode gives at once."""
    sock.setsockopt(_TCP, uapi.TCP_REPAIR_OPTIONS, options)
