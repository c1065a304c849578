"""Queues back into a restored socket: most fit at once, for the others its buffers are lent more room.

Nothing here knows the order of a restore; `restore` does.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable

from migrate.ici import Ici
from migrate.kernel import segment, sockopt, uapi
from migrate.kernel.nft import MARK
from migrate.tcpstate import REBUILD, TcpState

__all__ = ["RECEIVE", "SEND", "fill", "fill_each", "fill_urgent", "peers_window"]

_CHUNK = 1 << 20  # bytes of a queue given to one send()
_SMALLEST_CHUNK = 1 << 10
_AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUESIZE = 4  # a queued byte's share of SO_SNDBUF and SO_RCVBUF at worst: headers and half-filled pages
SEND, RECEIVE = (socket.SO_SNDBUF, uapi.SO_SNDBUFFORCE), (socket.SO_RCVBUF, uapi.SO_RCVBUFFORCE)


def fill(sock: socket.socket, data: bytes | memoryview, buffer: tuple[int, int], *, before: int = 0) -> None:
    """Write a queue behind the ``before`` bytes that are in its buffer. Most fit, and 64 KiB always do."""
    fill_each(((sock, data, before),), buffer)


def fill_each(queues: Iterable[tuple[socket.socket, bytes | memoryview, int]], buffer: tuple[int, int]) -> None:
    """`fill` for many: (sock, data, before)."""
    for sock, data, before in queues:
        try:
            written = sock.send(data, _AT_ONCE)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN):
                raise
            written = 0
        if written < len(data):
            _fill_enlarged(sock, memoryview(data)[written:], buffer, before + written)


def _fill_enlarged(sock: socket.socket, view: memoryview, buffer: tuple[int, int], before: int) -> None:
    """Write what does not fit into the buffer, which then has its size again and is left for autotuning to change.

    It is made larger only here, after connect(), which computes windows from it. Memory may be short for large
    pieces: they are halved, down to a kilobyte, then the buffer is doubled.
    """
    size = room = sock.getsockopt(socket.SOL_SOCKET, buffer[0])
    lock = sock.getsockopt(socket.SOL_SOCKET, uapi.SO_BUF_LOCK)
    most = _TRUESIZE * (before + len(view))
    if room < most // 2:
        room = _set_size(sock, buffer, most // 2)
    chunk = _CHUNK
    while view:
        try:
            view = view[sock.send(view[:chunk], _AT_ONCE) :]
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN) or (chunk <= _SMALLEST_CHUNK and room >= most):
                raise
            if chunk > _SMALLEST_CHUNK:
                chunk //= 2
            else:
                room = _set_size(sock, buffer, room * 2)
    if room != size:
        _set_size(sock, buffer, size)
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_BUF_LOCK, lock)


def fill_urgent(sock: socket.socket, ici: Ici) -> None:
    """Write the receive queue. Its urgent byte has to arrive, in a segment that says so."""
    before, at, after = (memoryview(ici.received)[part] for part in _around(ici.urgent))
    if before:
        fill(sock, before, RECEIVE)
    seq = (ici.rcv_nxt - REBUILD[TcpState(ici.state)].received_fin - len(after) - 1) & 0xFFFFFFFF
    arriving = segment.Segment(
        ici.four_tuple, seq, ici.snd_una, segment.ACK | segment.URG, peers_window(ici), payload=bytes(at), urgent=1
    )
    with segment.Injector(MARK) as injector:
        injector.inject(arriving.build())
        limit = time.monotonic() + segment.ARRIVES
        while sockopt.queue_end(sock) != seq + 1 & 0xFFFFFFFF and time.monotonic() < limit:
            time.sleep(0)
    if after:
        fill(sock, after, RECEIVE, before=len(before) + 1)


def _around(place: int) -> tuple[slice, slice, slice]:
    return slice(place), slice(place, place + 1), slice(place + 1, None)


def peers_window(ici: Ici) -> int:
    """The peer's window as a segment of its says it."""
    return min(ici.snd_wnd >> max(ici.snd_wscale, 0), 0xFFFF)


def _set_size(sock: socket.socket, buffer: tuple[int, int], size: int) -> int:
    half = min(size // 2, 0x3FFFFFFF)  # the kernel doubles what it is told
    try:
        sock.setsockopt(socket.SOL_SOCKET, buffer[1], half)
    except PermissionError:  # in a user namespace: up to net.core.rmem_max and wmem_max, then
        sock.setsockopt(socket.SOL_SOCKET, buffer[0], half)
    return size
