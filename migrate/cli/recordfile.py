"""The file that `tcpmig dump` makes: complete and in its place, or not there at all.

The name is claimed at once with an empty file, so that nobody's record is overwritten; the records go to a file
beside it, reach the disk, and take the name by rename(2). That rename is the commit point of a dump.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from migrate.errors import Error, UsageError, from_oserror
from migrate.ici import Ici, write_records

__all__ = ["RecordFile"]

_MODE = 0o600


class RecordFile:
    """A context manager; leaving it without a commit leaves nothing behind. ``-`` is standard output."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._beside = None if path == "-" else Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        self._done = False
        if self._beside is None:
            self._descriptor = os.dup(sys.stdout.fileno())
            return
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, _MODE))
        except FileExistsError:
            raise UsageError(
                f"{path!r} exists, and may hold the only copy of a connection", hint="give another name, or remove it"
            ) from None
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._descriptor = os.open(self._beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, _MODE)
        except OSError as error:
            os.unlink(path)
            raise self._failed(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.committed():
            self.remove()
        self.close()

    def close(self) -> None:
        """The descriptor; the file stays as it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, records: Iterable[Ici]) -> None:
        """All records, down to the disk. Raises KernelError: no space, for one."""
        try:
            write_records(self._descriptor, records)
            if self._beside is not None:
                os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from None

    def commit(self) -> None:
        """From here the records are safe and the connections theirs."""
        if self._beside is not None:
            try:
                os.rename(self._beside, self.path)
            except OSError as error:
                raise self._failed(error) from None
            self._sync_directory()
        self._done = True

    def committed(self) -> bool:
        """Whether the file has its name; another process that shares the open file sees it too."""
        if self._beside is None:
            return self._done
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return False

    def remove(self) -> None:
        """What an uncommitted file leaves in the directory."""
        if self._beside is not None:
            for path in (self._beside, self.path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _sync_directory(self) -> None:
        directory = os.open(Path(self.path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Some file systems cannot sync a directory; the name is in its place all the same.
            with contextlib.suppress(OSError):
                os.fsync(directory)
        finally:
            os.close(directory)

    def _failed(self, error: OSError) -> Error:
        return from_oserror(f"writing {self.path!r}", error, hint="nothing was taken: the connections go on here")
