"""What this host remembers of the connections that its commands moved, so that a record is used once.

A record names its connection with an id, and says with an epoch which of its moves this is. Both stand in an SQLite
file in $TCPMIG_STATE, by default /run/tcpmig-commands, for an ordinary user below
$XDG_RUNTIME_DIR: like sockets, it need not survive a restart of the host.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from migrate.cli.output import Output
from migrate.errors import Conflict, Error, HostError, from_oserror
from migrate.handoff.database import Database
from migrate.handoff.ids import new_id
from migrate.ici import Ici
from migrate.kernel import netns, uapi

__all__ = ["Epochs", "memory"]

_APPLICATION = 0x49434945  # "ICIE"
_VERSION = 1
_SCHEMA = """
CREATE TABLE seen(
    netns INTEGER NOT NULL, id BLOB NOT NULL, epoch INTEGER NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(netns, id)
    ) WITHOUT ROWID;
CREATE TABLE socket(
    cookie BLOB PRIMARY KEY, id BLOB NOT NULL, epoch INTEGER NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID
"""
_SEE = """INSERT INTO seen VALUES(?, ?, ?, ?) ON CONFLICT(netns, id) DO UPDATE SET
    epoch = max(seen.epoch, excluded.epoch), at = excluded.at"""
_NAME = "INSERT OR REPLACE INTO socket VALUES(?, ?, ?, ?)"
_KEPT = 30 * 86400  # seconds


class Epochs:
    """The memory of this thread's network namespace. Raises HostError, PrivilegeError where there can be none."""

    def __init__(self) -> None:
        directory = _directory()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
        except OSError as error:
            raise from_oserror(f"making {directory}", error, hint="name another directory in $TCPMIG_STATE") from None
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise HostError(f"{directory} can be written by others", hint=f"chmod 700 {directory}")
        self._netns = netns.identity()
        self._database = Database(directory / "epochs", _SCHEMA, application=_APPLICATION, version=_VERSION)

    def close(self) -> None:
        """Harmless twice."""
        self._database.close()

    def refusal(self, record: Ici) -> Error | None:
        """A Conflict if a connection of this id lived here in this epoch or in a later one."""
        if not record.id:
            return None
        with self._database.errors():
            ask = "SELECT epoch FROM seen WHERE netns=? AND id=?"
            row = self._database.connection.execute(ask, (self._netns, record.id)).fetchone()
        if row is None or row[0] < record.epoch:
            return None
        return Conflict(
            f"{record.four_tuple}: this record was restored here before"
            + (f", and a newer one, of epoch {row[0]}, after it" if row[0] > record.epoch else ""),
            hint="a second time it would make a ghost of the connection; --again does it all the same",
        )

    def name(self, sockets: Sequence[socket.socket]) -> list[tuple[bytes, int]]:
        """Id and epoch for a record of each: what is known of the socket, one epoch later, or a new id."""
        now, named = int(time.time()), []
        with self._database.transaction() as run:
            for sock in sockets:
                key = cookie(sock)
                row = run.execute("SELECT id, epoch FROM socket WHERE cookie=?", (key,)).fetchone()
                id, epoch = row or (new_id(), 0)
                named.append((id, epoch + 1))
                run.execute(_NAME, (key, id, epoch + 1, now))
        return named

    def live(self, connections: Iterable[tuple[Ici, socket.socket]]) -> None:
        """These records are active here from now on, as these sockets."""
        now = int(time.time())
        known = [(record, cookie(sock)) for record, sock in connections if record.id]
        with self._database.transaction() as run:
            run.executemany(_SEE, [(self._netns, record.id, record.epoch, now) for record, _ in known])
            run.executemany(_NAME, [(key, record.id, record.epoch, now) for record, key in known])
            for table in ("seen", "socket"):
                run.execute(f"DELETE FROM {table} WHERE at < ?", (now - _KEPT,))


def memory(output: Output) -> Epochs | None:
    """What this host remembers; where it cannot, the user is told."""
    try:
        return Epochs()
    except Error as error:
        output.warn(f"{error}; so a record that is used twice will not be noticed here")
        return None


def _directory() -> Path:
    if named := os.environ.get("TCPMIG_STATE"):
        return Path(named)
    run = "/run" if os.access("/run", os.W_OK) else os.environ.get("XDG_RUNTIME_DIR", "/run")
    return Path(run, "tcpmig-commands")  # not the agent's directory: that is another user's, and goes with the agent


def cookie(sock: socket.socket) -> bytes:
    """What names this socket among all of this boot."""
    return sock.getsockopt(socket.SOL_SOCKET, uapi.SO_COOKIE, 8)
