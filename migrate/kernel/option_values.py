"""One option's value: from the kernel into a record's form, and back. What each `Kind` means is in the table.

OSError leaves here as it comes: often it only says that this kernel has no such option.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

from migrate.kernel.option_table import Kind, Option, Value

__all__ = ["call", "get", "md5_key", "option_memory", "put"]

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # include/uapi/asm-generic/socket.h
_SO_MEMINFO = 55
_FORCE = {"SO_SNDBUF": _SO_SNDBUFFORCE, "SO_RCVBUF": _SO_RCVBUFFORCE}
_MEMINFO = struct.Struct("=9I")  # include/uapi/linux/sock_diag.h: SK_MEMINFO_*
_OPTMEM = 6  # SK_MEMINFO_OPTMEM

_INT = struct.Struct("=i")
_LINGER = struct.Struct("=ii")  # struct linger: on or off, seconds
_TIMEVAL = struct.Struct("@ll")
_LONG = struct.Struct("@L")
_FLOWLABEL = struct.Struct("=16sIBBHHHI")  # struct in6_flowlabel_req
_FL_GET, _FL_SHARED_BY_ANY, _FL_CREATE = 0, 255, 1
_MD5SIG = struct.Struct("=128sBBHI80s")  # struct tcp_md5sig: address, flags, prefix, length of the key, device, key
_FILTER, _FILTER_IN_RECORD = struct.Struct("=HBBI"), struct.Struct(">HBBI")  # struct sock_filter
_MOST_FILTER = 4096  # BPF_MAXINSNS
_MOST_STRING = 16  # TCP_CA_NAME_MAX, IFNAMSIZ
_LONGEST = 1024  # bytes that the interpreter's getsockopt takes

_T = TypeVar("_T", int, bytes)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def get(sock: socket.socket, option: Option) -> Value:
    """The value, as a record carries it. Raises OSError."""
    return _GET[option.kind](sock, option)


def put(sock: socket.socket, option: Option, value: Value) -> None:
    """Set it. Raises OSError; TypeError, ValueError, OverflowError or struct.error for a value of another form."""
    if option.kind in _RAW:
        sock.setsockopt(option.level, option.number, _RAW[option.kind](value))
    else:
        _PUT[option.kind](sock, option, value)


def call(option: Option, value: Value) -> tuple[int, int, bytes] | None:
    """Level, number and value of the setsockopt(2) that sets it; None if one does not do. Raises as `put`.

    That of a buffer's size needs CAP_NET_ADMIN in the initial user namespace; `put` can do without, up to a limit.
    """
    if option.kind is Kind.SIZE:
        return option.level, _FORCE[option.name], _INT.pack((_as(int, value) + 1) // 2)  # the kernel doubles it
    return (option.level, option.number, _RAW[option.kind](value)) if option.kind in _RAW else None


def option_memory(sock: socket.socket) -> int:
    """Bytes charged to the socket for filters, extension headers, keys: none of them is there if this is 0."""
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[_OPTMEM])


def md5_key(remote: bytes, key: bytes) -> bytes:
    """The value of TCP_MD5SIG: ``remote`` is the peer's address, 4 or 16 bytes, ``key`` up to 80 bytes (RFC 2385)."""
    if len(remote) == 4:
        address = struct.pack("=HH4s", socket.AF_INET, 0, remote)
    else:
        address = struct.pack("=HHI16s", socket.AF_INET6, 0, 0, remote)
    if len(key) > 80:
        raise ValueError(f"a TCP MD5 key has at most 80 bytes, not {len(key)}")
    return _MD5SIG.pack(address, 0, 0, len(key), 0, key)


def _get_int(sock: socket.socket, option: Option) -> Value:
    return sock.getsockopt(option.level, option.number)


def _get_dscp(sock: socket.socket, option: Option) -> Value:
    return sock.getsockopt(option.level, option.number) & 0xFC


def _get_rate(sock: socket.socket, option: Option) -> Value:
    return int(_LONG.unpack(sock.getsockopt(option.level, option.number, _LONG.size))[0])


def _get_timeval(sock: socket.socket, option: Option) -> Value:
    seconds, microseconds = _TIMEVAL.unpack(sock.getsockopt(option.level, option.number, _TIMEVAL.size))
    return int(seconds * 1_000_000 + microseconds)


def _get_linger(sock: socket.socket, option: Option) -> Value:
    on, seconds = _LINGER.unpack(sock.getsockopt(option.level, option.number, _LINGER.size))
    return int(seconds) if on else -1


def _get_string(sock: socket.socket, option: Option) -> Value:
    return sock.getsockopt(option.level, option.number, _MOST_STRING).partition(b"\0")[0]


def _get_bytes(sock: socket.socket, option: Option) -> Value:
    return sock.getsockopt(option.level, option.number, _LONGEST)


def _get_label(sock: socket.socket, option: Option) -> Value:
    """The label that connect(2) used. The kernel shows it only while IPV6_FLOWINFO_SEND is on."""
    try:
        return int(sock.getpeername()[2]) & 0xFFFFF
    except OSError:  # not connected
        return 0


def _get_filter(sock: socket.socket, option: Option) -> Value:
    """SO_GET_FILTER counts in instructions, not bytes: the interpreter's own getsockopt would write past its buffer."""
    length = ctypes.c_uint32(_MOST_FILTER)
    buffer = ctypes.create_string_buffer(_MOST_FILTER * _FILTER.size)
    if _libc.getsockopt(sock.fileno(), option.level, option.number, buffer, ctypes.byref(length)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    program = memoryview(buffer)[: length.value * _FILTER.size]
    return b"".join(_FILTER_IN_RECORD.pack(*step) for step in _FILTER.iter_unpack(program))


def _get_lost(sock: socket.socket, option: Option) -> Value:
    raise OSError(errno.ENOPROTOOPT, "the kernel does not tell")


def _put_size(sock: socket.socket, option: Option, value: Value) -> None:
    """The kernel doubles what it is given; without CAP_NET_ADMIN in the initial user namespace up to a limit."""
    size = _as(int, value)
    try:
        sock.setsockopt(option.level, _FORCE[option.name], (size + 1) // 2)
    except PermissionError:
        sock.setsockopt(option.level, option.number, (size + 1) // 2)
        if sock.getsockopt(option.level, option.number) < size:
            raise


def _int(value: Value) -> bytes:
    return _INT.pack(_as(int, value))


def _bytes(value: Value) -> bytes:
    return _as(bytes, value)


def _rate(value: Value) -> bytes:
    return _LONG.pack(_as(int, value))


def _timeval(value: Value) -> bytes:
    return _TIMEVAL.pack(*divmod(_as(int, value), 1_000_000))


def _linger(value: Value) -> bytes:
    seconds = _as(int, value)
    return _LINGER.pack(seconds >= 0, max(seconds, 0))


def _string(value: Value) -> bytes:
    return _as(bytes, value) + b"\0"


def _label(value: Value) -> bytes:
    """Lease the label, shared with all. Any unicast address will do as its destination: nothing compares it."""
    label = socket.htonl(_as(int, value))
    loopback = socket.inet_pton(socket.AF_INET6, "::1")
    return _FLOWLABEL.pack(loopback, label, _FL_GET, _FL_SHARED_BY_ANY, _FL_CREATE, 0, 0, 0)


def _put_filter(sock: socket.socket, option: Option, value: Value) -> None:
    program = b"".join(_FILTER.pack(*step) for step in _FILTER_IN_RECORD.iter_unpack(_as(bytes, value)))
    buffer = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(
        option.level, option.number, struct.pack("@HP", len(program) // _FILTER.size, ctypes.addressof(buffer))
    )


def _put_lost(sock: socket.socket, option: Option, value: Value) -> None:
    raise OSError(errno.ENOPROTOOPT, f"{option.name} cannot be carried")


def _as(form: type[_T], value: Value) -> _T:
    if not isinstance(value, form):
        raise TypeError(f"{value!r} is no {form.__name__}")
    return value


_GET: dict[Kind, Callable[[socket.socket, Option], Value]] = {
    Kind.INT: _get_int,
    Kind.HOPS: _get_int,
    Kind.DSCP: _get_dscp,
    Kind.SIZE: _get_int,
    Kind.CLAMP: _get_int,
    Kind.RATE: _get_rate,
    Kind.TIMEVAL: _get_timeval,
    Kind.LINGER: _get_linger,
    Kind.STRING: _get_string,
    Kind.DEVICE: _get_string,
    Kind.BYTES: _get_bytes,
    Kind.STICKY: _get_bytes,
    Kind.LABEL: _get_label,
    Kind.FILTER: _get_filter,
    Kind.LOST: _get_lost,
}
_RAW: dict[Kind, Callable[[Value], bytes]] = {
    Kind.INT: _int,
    Kind.HOPS: _int,
    Kind.DSCP: _int,
    Kind.CLAMP: _int,
    Kind.RATE: _rate,
    Kind.TIMEVAL: _timeval,
    Kind.LINGER: _linger,
    Kind.STRING: _string,
    Kind.DEVICE: _string,
    Kind.BYTES: _bytes,
    Kind.STICKY: _bytes,
    Kind.LABEL: _label,
}
_PUT: dict[Kind, Callable[[socket.socket, Option, Value], None]] = {
    Kind.SIZE: _put_size,
    Kind.FILTER: _put_filter,
    Kind.LOST: _put_lost,
}
