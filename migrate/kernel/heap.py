"""Memory for many: the C library's heap, in which the bytes of queues are, and the collection of garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

__all__ = ["keep", "uncollected"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT = 256 << 20  # bytes that stay with the process when they are free
_AHEAD = 192 << 20  # bytes of address space that the heap gets now; memory comes as it is used
_USUAL_PAD = 128 << 10  # what M_TOP_PAD is if nobody sets it
_OWN_MAPPING = 32 << 20  # bytes from which a buffer is given back at once: the most that glibc takes
_MADV_HUGEPAGE = 14  # include/uapi/asm-generic/mman-common.h


def keep() -> bool:
    """Keep freed memory for the next queues, up to 256 MiB: mallopt(3). False where the C library has no such knob.

    Otherwise glibc gives a batch's buffers back as soon as they are free, and the next batch pays for new pages:
    26 µs for 64 KiB, twice as much as the copying. The heap asks for huge pages, where the host gives them: a queue in
    small ones needs 16 translations, which a virtual machine looks up twice.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    kept = bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING))
    if kept and mallopt(_M_TOP_PAD, _AHEAD):
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.free(libc.malloc(_OWN_MAPPING - 4096))  # too much for what the heap has by now: it grows
        mallopt(_M_TOP_PAD, _USUAL_PAD)
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            libc.madvise(start, end - start, _MADV_HUGEPAGE)  # a kernel that has none refuses, and nothing is lost


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: of thousands of new objects none is, and a search goes through all."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
