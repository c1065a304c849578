"""The calls of sockopt.py on up to `MOST` sockets at once, by io_uring: a third of what they cost one by one.

Each returns None if all went well; else the places of those where something failed, and errno. Of them nothing else is
known: what they were to be given has to be tried again one by one, and says then what is wrong.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence

from migrate.errors import HostError
from migrate.fourtuple import MAPPED
from migrate.kernel import sockopt, uapi
from migrate.kernel.uring import Program, Ring, Values, bind, connect, setsockopt

__all__ = ["FEW", "MOST", "Batch", "Failures", "negotiated", "rest", "shared", "sockaddr"]

FEW = 8  # sockets below which getting ready is not worth its time
MOST = 64  # sockets of which all that is written stays in the processor's caches until the kernel reads it

Failures = Mapping[int, int] | None

_OPTIONS_AT_ONCE = 14  # with the other programs' calls they make a power of two
_ENTRIES = (18 + _OPTIONS_AT_ONCE) * MOST

_TCP = int(socket.IPPROTO_TCP)
_INET, _INET6 = int(socket.AF_INET), int(socket.AF_INET6)
_ADDRESS = 28  # bytes of a struct sockaddr_in6; a struct sockaddr_in is the beginning of one
_INT = struct.Struct("=i")
_CONSTANTS = struct.Struct("=3i")  # TCP_REPAIR_ON, TCP_SEND_QUEUE, TCP_RECV_QUEUE
_OPTIONS = 32  # bytes of four struct tcp_repair_opt
_REBUILD = struct.Struct(f"=IIi{_ADDRESS}sH2s24s{_OPTIONS}sI5I")


class Batch:
    """A ring and what is done with it, by who has its ``lock``. Raises HostError where there is no such io_uring.

    ``put(place * size, …)`` says what the socket at that place is to become, for `begin`, `connect` and `set_windows`:
    where the send queue begins, where the receive queue begins, TCP_MAXSEG, `sockaddr` of the local end; of the remote
    end the family, the port as two bytes and the `rest`; `negotiated`, the timestamp, and the five numbers of
    sockopt.set_window().
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._ring = ring = Ring(_ENTRIES)
        try:
            self._enter = ring.program([setsockopt(_TCP, uapi.TCP_REPAIR, 0)], _alike(_INT.pack(1)), MOST)
            self._queue = Values(_INT, b"", 1)
            self._select = ring.program([setsockopt(_TCP, uapi.TCP_REPAIR_QUEUE, 0)], self._queue, MOST)
            silence = bytes(16) + _INT.pack(-1)  # AF_UNSPEC, TCP_REPAIR_OFF_NO_WP
            self._release = ring.program([connect(0, 16), setsockopt(_TCP, uapi.TCP_REPAIR, 16)], _alike(silence), MOST)
            off = {True: uapi.TCP_REPAIR_OFF, False: uapi.TCP_REPAIR_OFF_NO_WP}
            self._leave = {
                probe: ring.program([setsockopt(_TCP, uapi.TCP_REPAIR, 0)], _alike(_INT.pack(value)), MOST)
                for probe, value in off.items()
            }
            rebuild = Values(_REBUILD, _CONSTANTS.pack(1, uapi.TCP_SEND_QUEUE, uapi.TCP_RECV_QUEUE), MOST)
            self.size, self.put = rebuild.size, rebuild.put
            on, send, receive = (_REBUILD.size + 4 * place for place in range(3))
            self._begin = ring.program(
                [
                    setsockopt(_TCP, uapi.TCP_REPAIR, on),
                    setsockopt(_TCP, uapi.TCP_REPAIR_QUEUE, send),
                    setsockopt(_TCP, uapi.TCP_QUEUE_SEQ, 0),
                    setsockopt(_TCP, uapi.TCP_REPAIR_QUEUE, receive),
                    setsockopt(_TCP, uapi.TCP_QUEUE_SEQ, 4),
                    setsockopt(_TCP, socket.TCP_MAXSEG, 8),
                    bind(12, _ADDRESS),
                ],
                rebuild,
                MOST,
            )
            remote, negotiated = 12 + _ADDRESS, 12 + 2 * _ADDRESS
            self._connect = ring.program(
                [
                    connect(remote, _ADDRESS),
                    setsockopt(_TCP, uapi.TCP_REPAIR_OPTIONS, negotiated, _OPTIONS),
                    setsockopt(_TCP, uapi.TCP_TIMESTAMP, negotiated + _OPTIONS),
                ],
                rebuild,
                MOST,
            )
            windows = negotiated + _OPTIONS + 4
            self._windows = ring.program([setsockopt(_TCP, uapi.TCP_REPAIR_WINDOW, windows, 20)], rebuild, MOST)
            self._options = functools.lru_cache(maxsize=64)(self._option_programs)
            self._try()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the ring back."""
        self._ring.close()

    @property
    def closed(self) -> bool:
        """Given back, or given up."""
        return self._ring.closed

    def enter_repair(self, descriptors: Sequence[int]) -> Failures:
        """As sockopt.enter_repair()."""
        return self._enter.run(descriptors)

    def leave_repair(self, descriptors: Sequence[int], *, probe: bool) -> Failures:
        """As sockopt.leave_repair()."""
        return self._leave[probe].run(descriptors)

    def release(self, descriptors: Sequence[int]) -> Failures:
        """As sockopt.disconnect(), then leave repair mode without a probe."""
        return self._release.run(descriptors)

    def begin(self, descriptors: Sequence[int]) -> Failures:
        """Repair mode, where the queues begin, TCP_MAXSEG, bind(). The receive queue stays selected."""
        return self._begin.run(descriptors)

    def connect(self, descriptors: Sequence[int]) -> Failures:
        """connect(), what was negotiated, timestamp; the peer's window is closed until `set_windows`.

        Only after `begin` went well for all of them: without repair mode a connect() would begin a handshake.
        """
        return self._connect.run(descriptors)

    def select_queue(self, descriptors: Sequence[int], queue: int) -> Failures:
        """As sockopt.select_queue()."""
        self._queue.put(0, queue)
        return self._select.run(descriptors)

    def set_windows(self, descriptors: Sequence[int]) -> Failures:
        """As sockopt.set_window()."""
        return self._windows.run(descriptors)

    def set_options(self, descriptors: Sequence[int], calls: tuple[tuple[int, int, bytes], ...]) -> Failures:
        """These setsockopt calls (level, number, value), the same on each socket."""
        failed: dict[int, int] = {}
        for program in () if self.closed else self._options(calls):
            program.write(len(descriptors))
            failed |= program.run(descriptors) or {}
        return {-1: errno.EBADF} if self.closed else failed or None

    def _option_programs(self, calls: tuple[tuple[int, int, bytes], ...]) -> list[Program]:
        programs = []
        for start in range(0, len(calls), _OPTIONS_AT_ONCE):
            some = calls[start : start + _OPTIONS_AT_ONCE]
            made, values = [], b""
            for level, number, value in some:
                made.append(setsockopt(level, number, len(values), len(value)))
                values += value + bytes(-len(value) % 8)
            programs.append(self._ring.passing(made, _alike(values), MOST))
        return programs

    def _try(self) -> None:
        # Older kernels know io_uring but not each of these calls: an unconnected socket says which.
        with socket.socket() as sock:
            failures = self._begin.run([sock.fileno()]) or {}
        if not set(failures.values()) <= {errno.EPERM}:
            raise HostError("this kernel's io_uring lacks calls on sockets", hint="Linux 6.11")


def _alike(constants: bytes) -> Values:
    return Values(struct.Struct(""), constants or bytes(8), 1)


class _Shared:
    """One for this process, made when it is first wanted."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.able = True

    def get(self) -> Batch | None:
        if self.batch is not None and self.batch.closed:
            self.batch, self.able = None, False
        if self.batch is None and self.able:
            try:
                self.batch = Batch()
            except (HostError, OSError):
                self.able = False
        return self.batch

    def forget(self) -> None:
        """In a forked child: the ring's memory is the parent's, too."""
        if self.batch is not None:
            self.batch.close()
            self.batch = None


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.forget)


def shared() -> Batch | None:
    """This process's one, made at the first call, which takes 3 ms; None where the host does not allow it."""
    return _shared.get()


@functools.lru_cache(maxsize=4096)
def sockaddr(family: int, address: bytes, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6; addresses have 4 or 16 bytes, an IPv6 socket takes either."""
    return struct.pack("=H2s", family, port.to_bytes(2)) + (address if family == _INET else rest(address))


@functools.lru_cache(maxsize=4096)
def rest(address: bytes) -> bytes:
    """Of a struct sockaddr_in6 what follows the port, without the zone. (Of a struct sockaddr_in it is the address.)"""
    return bytes(4) + (MAPPED + address if len(address) == 4 else address)


@functools.lru_cache(maxsize=1024)
def negotiated(mss: int, snd_wscale: int, rcv_wscale: int, sack: bool, timestamps: bool) -> bytes:
    """sockopt.repair_options(), as long as if all were negotiated: the first, always there, may be said again."""
    options = sockopt.repair_options(mss, snd_wscale, rcv_wscale, sack, timestamps)
    return (options + options[:8] * 3)[:_OPTIONS]
