"""An SQLite file of ours: private, versioned, quick enough for the freeze path.

Write-ahead log with ``synchronous=OFF``: what has been committed is in the kernel's page cache and survives the death
of every process. It need not survive the host, because the sockets do not.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import HostError, from_oserror
from migrate.handoff.ids import new_id

__all__ = ["Database"]

_PATIENCE = 2.0  # seconds to wait for another process that has the file locked
_AGAIN = 0.005  # seconds between two attempts where SQLite itself does not wait


class Database:
    """The file at ``path``, made 0600 if it is not there. Every sqlite3 error leaves it as HostError."""

    def __init__(
        self, path: str | os.PathLike[str], schema: str, *, application: int, version: int, tidied: bool = False
    ) -> None:
        """``schema`` is run in a new file; ``application`` marks the file as ours, ``version`` its schema.

        ``tidied``: somebody calls `tidy`. Else whoever commits brings a long log into the file, which takes a while.
        """
        self.path = Path(path)
        self.untidy = True  # there may be something to `tidy`
        self._aside: sqlite3.Connection | None = None
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.fchmod(descriptor, 0o600)
            os.close(descriptor)  # before SQLite opens it: a later close would drop SQLite's locks
        except OSError as error:
            raise from_oserror(f"opening {self.path}", error, hint="is the directory there, and ours?") from None
        with self.errors():
            self.connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=64
            )
        try:
            with self.errors():
                self.identity = self._prepare(schema, application, version)
                if tidied:
                    self.connection.execute("PRAGMA wal_autocheckpoint=0")
        except BaseException:
            self.connection.close()
            raise

    def _prepare(self, schema: str, application: int, version: int) -> str:
        run = self.connection.execute
        if run("PRAGMA application_id").fetchone()[0] not in (0, application):
            raise HostError(f"{self.path} belongs to another program", hint="name another file")
        # A record of some MiB is a blob: fewer pages to write one by one, and no checkpoint in the midst of a handoff.
        run("PRAGMA page_size=16384")
        self._log_ahead()
        run("PRAGMA synchronous=OFF")
        run("PRAGMA secure_delete=ON")
        run("PRAGMA temp_store=MEMORY")
        if self._layout() == 0:
            with self.transaction():
                if self._layout() == 0:  # else another process was quicker
                    for statement in schema.split(";"):
                        run(statement)
                    run("CREATE TABLE identity(name TEXT NOT NULL)")
                    run("INSERT INTO identity VALUES(?)", (new_id().hex(),))
                    run(f"PRAGMA application_id={application:d}")
                    run(f"PRAGMA user_version={version:d}")
        # From here without a lock: somebody who has the file locked keeps nobody from starting.
        if self._layout() != version:
            raise HostError(
                f"{self.path} has the layout {self._layout()}, and this program knows {version}",
                hint="let the program that wrote it finish, or name another directory",
            )
        name: str = run("SELECT name FROM identity").fetchone()[0]
        return name

    def _log_ahead(self) -> None:
        # In a new file two processes may want this at once, and for it SQLite does not wait as it does elsewhere.
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN)

    def _layout(self) -> int:
        found: int = self.connection.execute("PRAGMA user_version").fetchone()[0]
        return found

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing; other processes wait."""
        with self.errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
                self.untidy = True
            except BaseException:
                if self.connection.in_transaction:  # a full disk may have ended it already
                    self.connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what sqlite3 raises inside into HostError."""
        try:
            yield
        except sqlite3.Error as error:
            hint = {
                sqlite3.SQLITE_FULL: "make room on the disk",
                sqlite3.SQLITE_BUSY: "another program has it locked",
                sqlite3.SQLITE_NOTADB: "name another file",
            }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise HostError(f"{self.path}: {error}", hint=hint) from None

    def tidy(self, over: str) -> None:
        """Bring the log's content into the file, beside whoever reads and writes: for a thread of its own.

        If the query ``over`` says 1, nothing stays in the log; else it remains ``untidy``.
        """
        self.untidy = False  # first: who commits meanwhile says otherwise
        done = False
        try:
            done = self._emptied(over)
        finally:
            if not done:
                self.untidy = True

    def _emptied(self, over: str) -> bool:
        with self.errors():
            if self._aside is None:
                self._aside = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
                self._aside.execute("PRAGMA synchronous=OFF")
            run = self._aside.execute
            run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if not run(over).fetchone()[0]:
                return False
            busy: int = run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    def close(self) -> None:
        """Harmless twice."""
        if self._aside is not None:
            self._aside.close()
        self.connection.close()
