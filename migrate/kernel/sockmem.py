"""Bytes of the kernel's socket structures, of many sockets at once: what fingerprints and snapshots are made of.

A BPF program (`kernel.bpf`) walks from this thread's descriptor table to the sockets and copies what a `Part` names
into memory that it shares with us; `kernel.btf` says where the fields lie. It takes no lock.

Since Linux 6.17 a program may read the kernel's memory as it reads its own; before, and if that is refused, a helper
copies it, which takes twice as long. Either gives zeros for what cannot be read.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap
from typing import NamedTuple

from migrate.kernel import bpf
from migrate.kernel.btf import Btf

__all__ = ["BATCH", "Collector", "Part", "Run"]

BATCH = 16  # sockets a run: the kernel verifies the loop turn by turn, and more gains little

# From the task to a socket. A test calls them wrong, to see that it is noticed.
PATH = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk")

_GET_CURRENT_TASK = 35  # enum bpf_func_id
_RDONLY_CAST = "bpf_rdonly_cast"  # to type 0, void: kernel memory that may be read anywhere (Linux 6.17)
# The memory begins with a count, a hole and room for a batch of descriptors; the sockets' bytes follow.
_HEADS = [struct.Struct(f"=II{count}i") for count in range(BATCH + 1)]
_HEAD = _HEADS[BATCH].size


class Run(NamedTuple):
    """``size`` bytes in a row, from ``offset`` on; ``masks`` has of each byte the bits that count, empty for all."""

    offset: int
    size: int
    masks: Sequence[int] = ()


class Part(NamedTuple):
    """Runs of the socket itself, or of what the pointer at offset ``pointer`` of it points to: zeros if to nothing."""

    pointer: int | None
    runs: Sequence[Run]


class Collector:
    """Collects the parts' bytes, one after the other. Raises OSError, LookupError where host or process cannot."""

    def __init__(self, btf: Btf, parts: Sequence[Part]) -> None:
        self.length = sum(run.size for part in parts for run in part.runs)
        self._stride = (self.length + 7) // 8 * 8
        self._lock = threading.Lock()  # of the shared memory
        path = [btf.place(step).offset for step in PATH]
        size = _HEAD + BATCH * self._stride
        try:
            cast = btf.function(_RDONLY_CAST)
            self._program = bpf.Program(size, _code(path, parts, self._stride, cast))
        except (OSError, LookupError):
            self._program = bpf.Program(size + max(map(_span, parts)), _code(path, parts, self._stride, None))

    @contextmanager
    def one(self, descriptor: int) -> Iterator[tuple[mmap, int]]:
        """The memory and where in it the bytes of that descriptor of this process are, which must be a TCP socket's."""
        memory = self._program.memory
        with self._lock:
            _HEADS[1].pack_into(memory, 0, 1, 0, descriptor)
            self._program.run()
            yield memory, _HEAD

    def batches(self, descriptors: Sequence[int]) -> Iterator[tuple[mmap, range]]:
        """The same for many, by batches: the memory, and where in it the bytes of each are until the next batch."""
        memory, stride = self._program.memory, self._stride
        for start in range(0, len(descriptors), BATCH):
            batch = descriptors[start : start + BATCH]
            count = len(batch)
            with self._lock:
                _HEADS[count].pack_into(memory, 0, count, 0, *batch)
                self._program.run()
                yield memory, range(_HEAD, _HEAD + count * stride, stride)

    def close(self) -> None:
        """Give the program back."""
        self._program.close()


def _code(path: Sequence[int], parts: Sequence[Part], stride: int, cast: int | None) -> bytes:
    """Registers: 6 the memory, 7 the descriptor table, 8 the turn, 9 the structure at hand.

    On the stack: at -8 a pointer just read, at -16 the socket, at -24 where this socket's bytes go. ``cast`` is the
    number of the kernel's function that makes memory readable, None where a helper has to copy it.
    """
    task_files, files_table, table_descriptors, *to_socket = path
    before = bpf.call(_GET_CURRENT_TASK) + bpf.move(7, 0) + _readable(7, cast)
    for offset in (task_files, files_table, table_descriptors):
        before += _follow(7, 7, offset, cast)
    before += bpf.put(8, 0)

    turn = bpf.move(1, 8) + bpf.multiply(1, 4) + bpf.add_register(1, bpf.SHARED) + bpf.load(1, 1, 8, width=4)
    turn += bpf.multiply(1, 8) + bpf.move(9, 7) + bpf.add_register(9, 1)  # the descriptor's place in the table
    turn += _readable(9, cast)
    for offset in (0, *to_socket):
        turn += _follow(9, 9, offset, cast)
    turn += bpf.store(bpf.FRAME, 9, -16)
    turn += bpf.move(1, 8) + bpf.multiply(1, stride) + bpf.add_register(1, bpf.SHARED) + bpf.add(1, _HEAD)
    turn += bpf.store(bpf.FRAME, 1, -24)
    position = 0
    for part in parts:
        if part.pointer is not None:
            turn += bpf.load(9, bpf.FRAME, -16) + _follow(9, 9, part.pointer, cast)
        source, first = 9, 0
        if cast is None:
            source, first = 3, min(run.offset for run in part.runs)
            turn += bpf.move(1, bpf.SHARED) + bpf.add(1, _HEAD + BATCH * stride) + _read(_span(part), 9, first)
            turn += bpf.move(3, bpf.SHARED) + bpf.add(3, _HEAD + BATCH * stride)
        turn += bpf.load(4, bpf.FRAME, -24)
        for run in part.runs:
            turn += _copy(4, position, source, run.offset - first, run.size)
            for at, mask in enumerate(run.masks, position):
                turn += _mask(at, mask) if mask != 0xFF else b""
            position += run.size
    turn += bpf.add(8, 1)

    length = len(turn) // bpf.INSTRUCTION
    stop = bpf.load(1, bpf.SHARED, 0, width=4) + bpf.jump_unless_less(8, 1, length + 1)
    again = bpf.jump_if_less(8, BATCH, -(length + 3))
    return before + stop + turn + again + bpf.put(0, 0) + bpf.leave()


def _span(part: Part) -> int:
    """Bytes from its first to its last: they are read at once, as each read costs as much as copying 300 bytes."""
    return max(run.offset + run.size for run in part.runs) - min(run.offset for run in part.runs)


def _copy(to: int, at: int, source: int, offset: int, size: int) -> bytes:
    """From one place of memory to another; through register 1."""
    code = b""
    for width in (8, 4, 2, 1):
        while size >= width:
            code += bpf.load(1, source, offset, width=width) + bpf.store(to, 1, at, width=width)
            at, offset, size = at + width, offset + width, size - width
    return code


def _follow(to: int, source: int, offset: int, cast: int | None) -> bytes:
    """The pointer at ``offset`` of the structure that register ``source`` points to; null if it cannot be read."""
    if cast is not None:
        return bpf.load(to, source, offset) + _readable(to, cast)
    return bpf.move(1, bpf.FRAME) + bpf.add(1, -8) + _read(8, source, offset) + bpf.load(to, bpf.FRAME, -8)


def _readable(register: int, cast: int | None) -> bytes:
    """Let it be a pointer to what may be read, if there is such a thing."""
    if cast is None:
        return b""
    return bpf.move(1, register) + bpf.put(2, 0) + bpf.call_function(cast) + bpf.move(register, 0)


def _read(size: int, source: int, offset: int) -> bytes:
    """Kernel memory to where register 1 points; zeros if it cannot be read."""
    return bpf.put(2, size) + bpf.move(3, source) + bpf.add(3, offset) + bpf.call(bpf.PROBE_READ_KERNEL)


def _mask(position: int, mask: int) -> bytes:
    """Keep of a byte of this socket's bytes only some bits."""
    byte = bpf.load(1, bpf.FRAME, -24) + bpf.load(2, 1, position, width=1)
    return byte + bpf.mask(2, mask) + bpf.store(1, 2, position, width=1)
