"""Large records beside the journal's database: a file for each batch, as sealed as they would be in a row.

A database writes some MiB page by page, and twice, with sums: several times as long as a plain file takes, in the midst
of a blackout. A file is there before the row that counts on it, and goes after that row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from migrate.errors import HostError, RecordError, from_oserror

__all__ = ["LARGE", "RecordFiles"]

LARGE = 1 << 18  # bytes of records from which they get a file
_ZEROS = bytes(1 << 20)


class RecordFiles:
    """The files in ``directory``, which is made if it is not there, 0700; by the batches' numbers in the journal.

    One thread at a time, but `wipe` may run beside the others. Raises HostError; when made, as `errors.from_oserror`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._there = {int(name) for name in os.listdir(directory) if name.isascii() and name.isdigit()}
        except OSError as error:
            raise from_oserror(
                f"making {directory}", error, hint="is the directory above it there, and ours?"
            ) from None
        self._gone: list[int] = []

    def keep(self, numbers: Iterable[int]) -> None:
        """After a start: no row counts on any other."""
        for number in self._there - set(numbers):
            self.drop(number)

    def write(self, number: int, pieces: Iterable[bytes]) -> None:
        """Anew, should there be one of a row that came to nothing."""
        path = self._path(number)
        self._there.add(number)
        with _errors(path, hint="make room on the disk"), open(path, "wb", opener=_private) as file:
            file.writelines(pieces)

    def read(self, number: int) -> bytes:
        """Raises RecordError if there is none."""
        path = self._path(number)
        with _errors(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                raise RecordError(f"{path} is not there any more", offset=0) from None

    def drop(self, number: int) -> None:
        """No row counts on it any more, if there is one: `wipe` removes it."""
        if number in self._there:
            self._there.discard(number)
            self._gone.append(number)

    def undo(self, number: int) -> None:
        """Its row came to nothing, so that the next may get its number: remove it now, if there is one."""
        if number in self._there:
            self._there.discard(number)
            with contextlib.suppress(OSError):  # the next start tries again
                self._path(number).unlink()

    def wipe(self) -> None:
        """Overwrite what was dropped, and remove it."""
        while self._gone:
            path = self._path(self._gone.pop())
            with _errors(path):
                with open(path, "r+b", opener=_private) as file:
                    left = os.fstat(file.fileno()).st_size
                    while left > 0:
                        left -= file.write(_ZEROS[:left])
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._directory / str(number)


@contextlib.contextmanager
def _errors(path: Path, hint: str | None = None) -> Iterator[None]:
    """As `Database.errors`: the journal cannot be had, whatever part of it."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", hint=hint) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
