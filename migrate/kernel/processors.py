"""Whether work gets the processors it needs: pressure stall information, and processors that stand still.

Sources: Documentation/accounting/psi.rst; sched_setaffinity(2).
"""

from __future__ import annotations

import contextlib
import os
import time

from migrate.kernel import priority

__all__ = ["Pressure", "visit"]


class Pressure:
    """The host's /proc/pressure/cpu, held open; a kernel without it (CONFIG_PSI, psi=0) tells of no pressure."""

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open("/proc/pressure/cpu", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def waited(self) -> float:
        """Seconds since boot in which some task could have run and had no processor; the kernel counts microseconds.

        The first line's last word is ``total=MICROSECONDS``, brought up to date at every reading.
        """
        if self._file < 0:
            return 0.0
        try:
            line = os.pread(self._file, 256, 0).partition(b"\n")[0]
        except OSError:  # psi=0 on the kernel's command line: the file is there, its reading fails
            return 0.0
        return int(line.rpartition(b"=")[2]) / 1e6


def visit() -> float:
    """Run on each processor that this thread may use, ahead of whatever runs there; the seconds that took.

    A virtual machine's processor that its host does not run just now makes this wait. Without CAP_SYS_NICE a processor
    may as well be late because it is busy, so then the answer is 0.
    """
    allowed = os.sched_getaffinity(0)
    with priority.undisturbed() as first:
        began = time.monotonic()
        try:
            for processor in allowed:
                with contextlib.suppress(OSError):  # taken away meanwhile
                    os.sched_setaffinity(0, {processor})
            return time.monotonic() - began if first else 0.0
        finally:
            os.sched_setaffinity(0, allowed)
