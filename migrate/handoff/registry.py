"""Who owns a connection where its two hosts cannot agree: the first to claim it.

A claim is on one epoch of one connection and is decided once, by compare-and-swap: nobody had it, now somebody has.
Both sides of a handoff claim with the same registry or with none, so each sees the other's claim or is seen by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from migrate.handoff.database import Database
from migrate.handoff.ids import Connection

__all__ = ["OwnershipRegistry", "SqliteRegistry"]

_APPLICATION = 0x49434952  # "ICIR"
_VERSION = 1
_SCHEMA = """
CREATE TABLE owner(
    id BLOB NOT NULL, epoch INTEGER NOT NULL, owner TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(id, epoch)
    ) WITHOUT ROWID
"""
_CLAIM = """INSERT INTO owner VALUES(?, ?, ?, ?) ON CONFLICT(id, epoch) DO UPDATE SET owner = owner RETURNING owner"""


class OwnershipRegistry(Protocol):
    """What a handoff needs of a registry. Calls may block and may come from any thread."""

    identity: str
    """Two agents that see the same identity share the registry."""

    def claim(self, connections: Sequence[Connection], owner: str) -> frozenset[bytes]:
        """Give each (id, epoch) to ``owner``, unless another has it: the ids of those. Claiming twice changes nothing.

        Each is decided on its own. ``owner`` is the identity of a host's journal. Any error means: not known which
        were claimed.
        """

    def unclaim(self, connections: Sequence[Connection]) -> None:
        """Both sides know: forget who owns them."""

    def prune(self, needed: Iterable[Connection], seconds: float) -> None:
        """Forget claims that nobody has ``needed`` for so many seconds; whoever has a batch open needs its claims."""

    def close(self) -> None:
        """Harmless twice."""


class SqliteRegistry:
    """A registry in a file, for the agents of one machine."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises HostError if the file is none of ours or of another version."""
        self._database = Database(path, _SCHEMA, application=_APPLICATION, version=_VERSION)
        self.identity = self._database.identity

    def claim(self, connections: Sequence[Connection], owner: str) -> frozenset[bytes]:
        """See OwnershipRegistry. Raises HostError."""
        now = int(time.time())
        with self._database.transaction() as run:
            return frozenset(
                connection.id
                for connection in connections
                if run.execute(_CLAIM, (connection.id, connection.epoch, owner, now)).fetchone()[0] != owner
            )

    def unclaim(self, connections: Sequence[Connection]) -> None:
        """See OwnershipRegistry. Raises HostError."""
        with self._database.transaction() as run:
            run.executemany("DELETE FROM owner WHERE id=? AND epoch=?", [(c.id, c.epoch) for c in connections])

    def prune(self, needed: Iterable[Connection], seconds: float) -> None:
        """See OwnershipRegistry. Raises HostError."""
        now = int(time.time())
        with self._database.transaction() as run:
            run.executemany("UPDATE owner SET at=? WHERE id=? AND epoch=?", [(now, c.id, c.epoch) for c in needed])
            run.execute("DELETE FROM owner WHERE at < ?", (int(now - seconds),))

    def close(self) -> None:
        """Harmless twice."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
