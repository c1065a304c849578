"""Not being interrupted for a moment (sched(7))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed() -> Iterator[bool]:
    """This thread runs under SCHED_FIFO meanwhile, so that whom it wakes does not run before its next call.

    For a few system calls in a row only. Without CAP_SYS_NICE nothing changes, and False is given.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, policy, parameters)
