"""A memory cgroup that counts what sockets take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_HIERARCHY = Path("/sys/fs/cgroup/memory")  # where cgroups of version 1 are mounted
_COUNTS = "memory.kmem.tcp.limit_in_bytes"


@pytest.fixture
def reservable() -> Iterator[None]:
    """What this thread's sockets take can be reserved (SO_RESERVE_MEM), if a memory cgroup counts it.

    In version 2 every cgroup but the root does. In version 1 one does that has a limit for it: this thread is in one.
    """
    own = _own_group()
    if own is None:
        yield
        return
    counting = own / f"tcpmig-{threading.get_native_id()}"
    counting.mkdir()
    try:
        (counting / _COUNTS).write_text(str(1 << 30))
        _enter(counting)
        yield
    finally:
        _enter(own)
        with contextlib.suppress(FileNotFoundError):
            counting.rmdir()


def _own_group() -> Path | None:
    """This thread's in the hierarchy of version 1, if there is one."""
    for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(",") and (group := _HIERARCHY / path.lstrip("/")).is_dir():
            return group
    return None


def _enter(group: Path) -> None:
    (group / "tasks").write_text(str(threading.get_native_id()))
