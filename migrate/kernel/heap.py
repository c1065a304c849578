"""Memory for many: the C library's heap, in which the bytes of queues are, and the collection of garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

__all__ = ["keep", "uncollected"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 256 << 20  # bytes that stay with the process when they are free
_OWN_MAPPING = 32 << 20  # bytes from which a buffer is given back at once: the most that glibc takes


def keep() -> bool:
    """Keep freed memory for the next queues, up to 256 MiB: mallopt(3). False where the C library has no such knob.

    Otherwise glibc gives a batch's buffers back as soon as they are free, and the next batch pays for new pages:
    26 µs for 64 KiB, twice as much as the copying.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING))


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
