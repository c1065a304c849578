"""The key of the journal's records. It is in memory only, longer than an agent and no longer than the host's sockets.

So whoever gets hold of the disk, or of a backup of it, gets no payload; and the agent that is started after a crash can
read what the one before it wrote. When the host is rebooted the key is gone, and with it every socket that a record
could have been of.
"""

from __future__ import annotations

import os
from pathlib import Path

from migrate.agent.logging import get_logger
from migrate.errors import from_oserror
from migrate.sealed import Key

__all__ = ["journal_key"]

_NAME = "journal.key"
_MEMORY = {"tmpfs", "ramfs"}

_log = get_logger(__name__)


def journal_key(directory: Path) -> Key:
    """The key in that directory; both are made if they are not there. Raises what `Key.kept` does, KernelError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = _file_system(directory)
    except OSError as error:
        raise from_oserror(f"mkdir {directory}", error) from None
    if kind not in _MEMORY:
        _log.warning("the journal's key is not in memory: choose another --key-dir", directory=directory, on=kind)
    return Key.kept(os.fspath(directory / _NAME))


def _file_system(directory: Path) -> str:
    """The type of the file system it is on (proc_pid_mountinfo(5)); empty if that does not show."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
