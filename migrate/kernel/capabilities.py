"""Capabilities of this process (capabilities(7), prctl(2))."""

from __future__ import annotations

import ctypes

__all__ = ["drop_ambient"]

PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4  # include/uapi/linux/prctl.h

_libc = ctypes.CDLL(None)


def drop_ambient() -> None:
    """What this process executes next does not get its ambient capabilities; its own stay. Harmless without any."""
    zero = ctypes.c_ulong(0)
    _libc.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(PR_CAP_AMBIENT_CLEAR_ALL), zero, zero, zero)
