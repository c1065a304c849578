"""The file that `tcpmig dump` makes: complete and in its place, or not there at all.

The records are written to a file without a name (O_TMPFILE), reach the disk, and then get the name by linkat(2), which
never replaces anything. That link is the commit point of a dump; whoever dies before it leaves no trace. Where the file
system knows no such files (NFS, for one), a name beside the real one takes their part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from migrate import ici, sealed
from migrate.errors import Error, HostError, KernelError, PrivilegeError, UsageError
from migrate.ici import Ici

__all__ = ["RecordFile"]

_MODE = 0o600
_WITHOUT_TMPFILE = errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS
_WITHOUT_LINKS = errno.EOPNOTSUPP, errno.EPERM


class RecordFile:
    """A context manager; leaving it without a commit leaves nothing behind. ``-`` is standard output.

    With a key the records are sealed.
    """

    def __init__(self, path: str, key: sealed.Key | None = None) -> None:
        self.path = path
        self._key = key
        self._beside: str | None = None
        self._directory = self._descriptor = -1
        self._done = False
        if path == "-":
            self._descriptor = os.dup(sys.stdout.fileno())
            return
        if os.path.lexists(path):
            raise self._exists()
        try:
            self._directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._descriptor = self._open()
        except OSError as error:
            self.close()
            raise self._failed(error) from None

    def _open(self) -> int:
        directory = f"/proc/self/fd/{self._directory}"
        try:
            return os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, _MODE)
        except OSError as error:
            if error.errno not in _WITHOUT_TMPFILE:
                raise
        beside = f".{Path(self.path).name}.{os.getpid()}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        descriptor = os.open(beside, flags, _MODE, dir_fd=self._directory)
        self._beside = beside
        return descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
        self.close()

    @property
    def descriptors(self) -> list[int]:
        """What another process needs to have of it."""
        return [descriptor for descriptor in (self._descriptor, self._directory) if descriptor >= 0]

    def close(self) -> None:
        """The descriptors; the file stays as it is. Again does nothing."""
        for descriptor in (self._descriptor, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._directory = -1

    def write(self, records: Iterable[Ici]) -> None:
        """All records, down to the disk. Raises KernelError: no space, for one."""
        try:
            if self._key is None:
                ici.write_records(self._descriptor, records)
            else:
                sealed.write_records(self._descriptor, records, self._key)
            if self._directory >= 0:
                os.fsync(self._descriptor)
        except (KernelError, OSError) as error:
            raise self._failed(error) from None

    def commit(self) -> None:
        """From here the records are safe and the connections theirs. Raises UsageError if the name is taken by now."""
        if self._directory >= 0:
            # With a descriptor of a directory it is linkat(2), which follows the link in /proc.
            source = self._beside or f"/proc/self/fd/{self._descriptor}"
            try:
                os.link(source, Path(self.path).name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileExistsError:
                raise self._exists() from None
            except OSError as error:
                raise self._failed(error) from None
            self.remove()
            # Some file systems cannot sync a directory; the name is in its place all the same.
            with contextlib.suppress(OSError):
                os.fsync(self._directory)
        self._done = True

    def committed(self) -> bool:
        """Whether the file has its name; another process that shares the open file sees it too."""
        if self._directory < 0:
            return self._done
        try:
            return os.path.samestat(
                os.fstat(self._descriptor), os.stat(Path(self.path).name, dir_fd=self._directory, follow_symlinks=False)
            )
        except OSError:
            return False

    def remove(self) -> None:
        """What an uncommitted file leaves in the directory."""
        if self._beside is not None and self._directory >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._beside, dir_fd=self._directory)

    def _exists(self) -> UsageError:
        return UsageError(
            f"{self.path!r} exists, and may hold the only copy of a connection", hint="give another name, or remove it"
        )

    def _failed(self, error: KernelError | OSError) -> Error:
        what = f"writing {self.path!r}"
        if self._descriptor >= 0 and error.errno in _WITHOUT_LINKS:
            return HostError(f"{what}: its file system can give no file a second name", hint="write to another one")
        hint = "nothing was taken: the connections go on here"
        if isinstance(error, PermissionError):
            return PrivilegeError(f"{what}: not permitted", hint=hint)
        return KernelError(what, error.errno or 0, hint=hint)
