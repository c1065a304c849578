"""io_uring(7), as far as calls on sockets need it: one system call makes many of them, in their order.

A `Program` is a row of calls that many sockets get alike. It is written once into the ring's memory: for each socket
only its descriptor and the values of its calls are filled in. That costs a third of an interpreter's own calls.

The kernel carries such calls out while they are submitted, one after the other. A call that fails does not keep the
socket's next ones from being made: where that matters, the row has to be cut into two programs. Should the kernel ever
put a call off (it has no reason to), the ring is given up.

Source: include/uapi/linux/io_uring.h; io_uring_setup(2), io_uring_enter(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from migrate.errors import HostError

__all__ = ["Call", "Program", "Ring", "Values", "bind", "connect", "setsockopt"]

_SETUP, _ENTER = 425, 426  # system calls, the same on every architecture
_OP_CONNECT, _OP_URING_CMD, _OP_BIND = 16, 46, 56
_CMD_SETSOCKOPT = 3  # SOCKET_URING_OP_SETSOCKOPT
_SKIP_SUCCESS = 1 << 6  # IOSQE_CQE_SKIP_SUCCESS
_OFF_SQES = 0x10000000
_CLAMP = 1 << 4  # IORING_SETUP_CLAMP
_SINGLE_MMAP, _SKIP = 1 << 0, 1 << 11  # IORING_FEAT_*

_PARAMETERS = struct.Struct("=7I3I10I10I")  # struct io_uring_params
_SQE = struct.Struct("=BBHiQQIIQHHIQQ")  # struct io_uring_sqe, 64 bytes
_CQE = struct.Struct("=QiI")  # struct io_uring_cqe
_WORD = struct.Struct("=I")
_SQE_WORDS = _SQE.size // 4

# The interpreter's lock is kept: to get it back from a busy thread would take longer than the calls of a batch.
_libc = ctypes.PyDLL(None, use_errno=True)


class Call(NamedTuple):
    """One call; ``offset`` and ``length`` say where in the socket's values what it takes lies, in bytes."""

    operation: int
    offset: int
    length: int
    level: int = 0
    option: int = 0

    def entry(self, address: int, place: int, *, last: bool) -> bytes:
        """The submission for a socket whose values lie at ``address``, its descriptor still missing."""
        flags, at = 0 if last else _SKIP_SUCCESS, address + self.offset
        if self.operation == _OP_URING_CMD:
            option = self.level | self.option << 32
            return _SQE.pack(
                self.operation, flags, 0, -1, _CMD_SETSOCKOPT, option, 0, 0, place, 0, 0, self.length, at, 0
            )
        return _SQE.pack(self.operation, flags, 0, -1, self.length, at, 0, 0, place, 0, 0, 0, 0, 0)


def setsockopt(level: int, option: int, offset: int, length: int = 4) -> Call:
    """As setsockopt(2)."""
    return Call(_OP_URING_CMD, offset, length, level, option)


def bind(offset: int, length: int) -> Call:
    """As bind(2)."""
    return Call(_OP_BIND, offset, length)


def connect(offset: int, length: int) -> Call:
    """As connect(2), on a socket that does not wait."""
    return Call(_OP_CONNECT, offset, length)


class Ring:
    """A ring and the memory of its programs, which need ``entries`` together. Not for several threads at a time.

    Raises HostError where the kernel has no io_uring that can do this, or does not allow it.
    """

    def __init__(self, entries: int) -> None:
        parameters = bytearray(_PARAMETERS.size)
        struct.pack_into("=I", parameters, 8, _CLAMP)
        memory = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self._fd: int = _libc.syscall(_SETUP, entries, memory)
        if self._fd < 0:
            raise _unavailable(ctypes.get_errno())
        self._opened = contextlib.ExitStack()
        try:
            self._map(parameters, entries)
        except (OSError, ValueError) as error:
            self.close()
            raise _unavailable(getattr(error, "errno", 0) or 0) from None
        except BaseException:
            self.close()
            raise

    def _map(self, parameters: bytearray, entries: int) -> None:
        values = _PARAMETERS.unpack(parameters)
        self._entries, self._completions, features = values[0], values[1], values[5]
        submission, completion = values[10:20], values[20:30]
        if self._entries < entries or not features & _SINGLE_MMAP or not features & _SKIP:
            raise HostError("this kernel's io_uring is too old")
        self._tail, self._array = submission[1], submission[6]
        self._done_head, self._done_tail, self._cqes = completion[0], completion[1], completion[5]
        length = max(self._array + 4 * self._entries, self._cqes + _CQE.size * self._completions)
        self._rings = self._opened.enter_context(mmap.mmap(self._fd, length))
        self._sqes = self._opened.enter_context(mmap.mmap(self._fd, _SQE.size * self._entries, offset=_OFF_SQES))
        self._words = self._opened.enter_context(self._opened.enter_context(memoryview(self._sqes)).cast("i"))
        self._used = 0

    @property
    def closed(self) -> bool:
        """Given back, or given up."""
        return self._fd < 0

    def close(self) -> None:
        """Give it back; again does nothing."""
        if self._fd >= 0:
            self._opened.close()  # the mappings have descriptors of their own
            os.close(self._fd)
            self._fd = -1

    def program(self, calls: Sequence[Call], values: Values, sockets: int) -> Program:
        """Room for these calls on that many sockets."""
        first, count = self._used, len(calls) * sockets
        assert first + count <= self._entries
        self._used += count
        program = Program(self, first, calls, values, sockets)
        program.write(sockets)
        return program

    def passing(self, calls: Sequence[Call], values: Values, sockets: int) -> Program:
        """The same in the room that is left, for now: whoever runs it writes it there again each time."""
        assert self._used + len(calls) * sockets <= self._entries
        return Program(self, self._used, calls, values, sockets)

    def write(self, first: int, entries: bytes) -> None:
        """Put these entries there."""
        self._sqes[_SQE.size * first : _SQE.size * first + len(entries)] = entries

    def address(self, first: int, descriptors: array[int], calls: int) -> None:
        """The entries from ``first`` on, so many for each, are about these descriptors."""
        begin, step = first * _SQE_WORDS + 1, calls * _SQE_WORDS
        end, every = begin + len(descriptors) * step, memoryview(descriptors)
        for at in range(begin, begin + step, _SQE_WORDS):
            self._words[at:end:step] = every

    def submit(self, order: bytes, finished: bytes) -> dict[int, int] | None:
        """Make the calls of the entries whose numbers ``order`` holds, as native words.

        None if nothing but ``finished`` came back, which is what comes if nothing fails; else the numbers (user_data)
        that a failed call had, and errno; -1 stands for all if the ring cannot be trusted any more, and is closed.
        """
        rings, count = self._rings, len(order) // 4
        (tail,) = _WORD.unpack_from(rings, self._tail)
        at = tail & self._entries - 1
        room = 4 * (self._entries - at)
        begin = self._array + 4 * at
        rings[begin : begin + min(room, len(order))] = order[:room]
        if len(order) > room:
            rings[self._array : self._array + len(order) - room] = order[room:]
        _WORD.pack_into(rings, self._tail, tail + count & 0xFFFFFFFF)
        submitted = _libc.syscall(_ENTER, self._fd, count, 0, 0, None, 0)
        (head,) = _WORD.unpack_from(rings, self._done_head)
        (end,) = _WORD.unpack_from(rings, self._done_tail)
        came = end - head & 0xFFFFFFFF
        at, size = head & self._completions - 1, _CQE.size
        first = min(came, self._completions - at)
        begin = self._cqes + size * at
        found = rings[begin : begin + size * first] + rings[self._cqes : self._cqes + size * (came - first)]
        _WORD.pack_into(rings, self._done_head, end)
        if submitted == count and found == finished:
            return None
        return self._failures(found, finished, submitted == count)

    def _failures(self, found: bytes, finished: bytes, complete: bool) -> dict[int, int]:
        failed: dict[int, int] = {}
        missing = {place for place, _, _ in _CQE.iter_unpack(finished)}
        for place, result, _ in _CQE.iter_unpack(found):
            missing.discard(place)
            if result < 0:
                failed.setdefault(place, -result)
        # A last call that failed tells of itself too. One that tells nothing goes on somewhere: nobody may wait for it.
        if not complete or missing:
            self.close()
            failed[-1] = errno.EAGAIN
        return failed


class Values:
    """Memory for what the calls on so many sockets take: of each those of ``form``, then ``constants``.

    ``put(place * size, *values)`` writes those of the socket at ``place``. With one socket they are for all alike.
    """

    def __init__(self, form: struct.Struct, constants: bytes, sockets: int) -> None:
        self.size = form.size + len(constants)
        self.step = self.size if sockets > 1 else 0
        memory = mmap.mmap(-1, self.size * sockets)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.put = functools.partial(form.pack_into, memory)
        for place in range(sockets):
            memory[place * self.size + form.size : (place + 1) * self.size] = constants


class Program:
    """Calls for up to so many sockets at once; `Ring.program` and `Ring.passing` make it."""

    def __init__(self, ring: Ring, first: int, calls: Sequence[Call], values: Values, sockets: int) -> None:
        self._ring, self._first, self._calls, self._values = ring, first, len(calls), values
        end, last = first + len(calls) * sockets, len(calls) - 1
        self._entries = b"".join(
            call.entry(values.address + place * values.step, place, last=number == last)
            for place in range(sockets)
            for number, call in enumerate(calls)
        )
        every = array("I", range(first, end)).tobytes()
        finished = b"".join(_CQE.pack(place, 0, 0) for place in range(sockets))
        step = 4 * len(calls)
        self._orders = [every[: step * count] for count in range(sockets + 1)]
        self._finished = [finished[: _CQE.size * count] for count in range(sockets + 1)]

    def write(self, sockets: int) -> None:
        """Put the calls on that many sockets into the ring's memory."""
        self._ring.write(self._first, self._entries[: _SQE.size * self._calls * sockets])

    def run(self, descriptors: Sequence[int]) -> dict[int, int] | None:
        """Make the calls on these sockets. None if none failed; else place and errno, or -1 for all, see `Ring.submit`.

        Of a socket with a failed call all the others were tried nevertheless.
        """
        if self._ring.closed:
            return {-1: errno.EBADF}
        count = len(descriptors)
        self._ring.address(self._first, array("i", descriptors), self._calls)
        return self._ring.submit(self._orders[count], self._finished[count])


def _unavailable(number: int) -> HostError:
    return HostError(
        f"io_uring cannot be used here: {os.strerror(number)}",
        hint="sysctl kernel.io_uring_disabled=0, a seccomp profile that allows it, Linux 6.11",
    )
