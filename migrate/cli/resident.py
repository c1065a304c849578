"""Which process follows an address, where keepalived starts one with each of its words (the plain notify form).

The first that comes takes a lock and stays, as long as the keepalived lives that started it. Each later one writes
down whose it is, finds the lock taken, and ends. Who stays lets go of the lock *before* it looks a last time what was
written down, and who comes writes *before* it tries the lock: so none is turned away by one that is just ending.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import from_oserror

__all__ = ["Resident"]


class Resident:
    """The place of the one that follows ``address``; ``run_dir`` must exist. Raises HostError, PrivilegeError."""

    def __init__(self, run_dir: Path, address: str) -> None:
        self._lock = run_dir / f"{address}.follow"
        self._served = run_dir / f"{address}.keepalived"

    def serve(self, pid: int) -> None:
        """That keepalived wants somebody to follow."""
        aside = self._served.with_name(f"{self._served.name}.{os.getpid()}")
        try:
            aside.write_text(str(pid))
            aside.rename(self._served)
        except OSError as error:
            raise from_oserror(f"writing {self._served}", error) from None

    def served(self) -> int:
        """The keepalived that wants somebody to follow, as far as written down; 0 for none."""
        try:
            return int(self._served.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """Whether the place is this process's meanwhile, or somebody else has it."""
        with open(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
