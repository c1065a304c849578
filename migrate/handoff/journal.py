"""What a host must not forget about its handoffs while an agent dies: batches, records, epochs.

A batch is one row and its records another, because few rows are quick; a step of a machine is one transaction. Records
are opaque here, and sealed: no file ever holds them in plain. Even so they are overwritten when the connections run or
the batch is over, and the write-ahead log is emptied with the last of them. Epochs stay: a record is taken once.

Large records lie in files beside the database (`handoff.recordfiles`), and their row is empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from migrate.errors import Conflict, HostError, from_oserror
from migrate.fourtuple import FourTuple
from migrate.handoff.commands import Row
from migrate.handoff.database import Database
from migrate.handoff.destination import DestinationHandoff, DestinationState
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.recordfiles import LARGE, RecordFiles
from migrate.handoff.source import SourceState
from migrate.sealed import Key

__all__ = ["Journal"]

_APPLICATION = 0x4943494A  # "ICIJ"
_VERSION = 6
_SCHEMA = """
CREATE TABLE handoff(
    number INTEGER PRIMARY KEY AUTOINCREMENT, batch BLOB NOT NULL, role TEXT NOT NULL, state TEXT NOT NULL,
    peer TEXT NOT NULL, steer TEXT NOT NULL, shared INTEGER NOT NULL, journal TEXT NOT NULL,
    source TEXT NOT NULL, connections BLOB NOT NULL, refused BLOB NOT NULL, UNIQUE(batch, role));
CREATE TABLE records(number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE seen(
    id BLOB PRIMARY KEY, epoch INTEGER NOT NULL, number INTEGER NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE moved(
    number INTEGER PRIMARY KEY, batch BLOB NOT NULL UNIQUE, others BLOB NOT NULL, at INTEGER NOT NULL);
CREATE TABLE socket(cookie INTEGER PRIMARY KEY, id BLOB NOT NULL)
"""
# A connection is busy while a batch with it is open; SETTLING is done with it and only waits to be heard.
_BUSY = f"EXISTS(SELECT 1 FROM handoff WHERE handoff.number = seen.number AND state != '{SourceState.SETTLING.name}')"
_TAKE = f"""INSERT INTO seen VALUES(?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET
    epoch = excluded.epoch, number = excluded.number, at = excluded.at
    WHERE excluded.epoch > seen.epoch AND NOT {_BUSY}"""
_MARK = """INSERT INTO seen VALUES(?, ?, 0, ?) ON CONFLICT(id) DO UPDATE SET
    epoch = max(seen.epoch, excluded.epoch), at = excluded.at"""
_GIVE_BACK = "UPDATE seen SET epoch = epoch - 1 WHERE id=? AND epoch=? AND number=?"
_ROWS = """SELECT batch, role, state, peer, steer, shared, journal, source, connections, refused
    FROM handoff ORDER BY number"""
_IN_FILES = "SELECT number FROM records WHERE length(data) = 0"
_SMALL = 1 << 14  # bytes of a record that is rather copied than sealed alone
_AT_ONCE = 500  # keys in one question; older SQLites take 999
_CONNECTIONS = msgspec.msgpack.Decoder(tuple[Connection, ...])
_REFUSED = msgspec.msgpack.Decoder(dict[bytes, str])
_OTHERS = msgspec.msgpack.Decoder(list[bytes])
_RECORDS = msgspec.msgpack.Decoder(dict[bytes, bytes])
_encode = msgspec.msgpack.encode


class Journal:
    """The journal in the file ``path``. One process at a time has it; its threads may share it."""

    def __init__(self, path: str | os.PathLike[str], key: Key) -> None:
        """Records are sealed with ``key``. Raises HostError if another process has the file, or it is none of ours."""
        self._key = key
        self._lock = threading.Lock()
        lock = os.fspath(path) + ".lock"
        try:
            self._owner: int | None = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise from_oserror(f"opening {lock}", error, hint="is the directory there, and ours?") from None
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._files = RecordFiles(Path(f"{os.fspath(path)}.records"))
            self._database = Database(path, _SCHEMA, application=_APPLICATION, version=_VERSION, tidied=True)
            with self._database.errors():
                self._files.keep(each for (each,) in self._database.connection.execute(_IN_FILES))
        except BaseException as error:
            os.close(self._owner)
            if isinstance(error, BlockingIOError):
                raise HostError(f"{path} is in use", hint="another agent runs with this directory") from None
            raise
        self.identity = self._database.identity

    def close(self) -> None:
        """Harmless twice."""
        if self._owner is not None:
            self._database.close()
            os.close(self._owner)
            self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- batches

    def write(self, row: Row, records: Mapping[bytes, bytes] | None = None) -> None:
        """The batch is in this state now; ``records``, by connection id, are kept with it.

        A new batch takes the epochs of its connections that are not refused. Raises Conflict, and writes nothing, if
        one of them was seen before or its connection is busy; HostError if it cannot be written.
        """
        with self._lock, contextlib.ExitStack() as undone:
            with self._database.transaction() as run:
                ask = "SELECT number, connections FROM handoff WHERE batch=? AND role=?"
                found = run.execute(ask, (row.batch, row.role)).fetchone()
                if found is None:
                    connections = _encode(row.connections)
                    number = self._insert(row, connections)
                else:
                    number, connections = found
                    run.execute(
                        "UPDATE handoff SET state=?, shared=?, journal=?, refused=? WHERE number=?",
                        (row.state, row.shared, row.journal, _encode(row.refused), number),
                    )
                if records:
                    context, sealed = row.batch + connections, b""
                    if sum(map(len, records.values())) < LARGE:
                        sealed = self._key.seal(_encode(records), context)
                    else:
                        undone.callback(self._files.undo, number)
                        self._files.write(number, self._key.seal_parts(_parts(records), context))
                    run.execute("INSERT INTO records VALUES(?, ?)", (number, sealed))
                elif row.state == DestinationState.ACTIVE.name:
                    run.execute("DELETE FROM records WHERE number=?", (number,))
            undone.pop_all()
            if found is None and row.role == DestinationHandoff.role:
                self._key.prepare()  # nothing stands still yet
            if row.state == DestinationState.ACTIVE.name:
                self._files.drop(number)

    def _insert(self, row: Row, connections: bytes) -> int:
        run = self._database.connection
        cursor = run.execute(
            "INSERT INTO handoff VALUES(NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.batch,
                row.role,
                row.state,
                row.peer,
                row.steer,
                row.shared,
                row.journal,
                row.source,
                connections,
                _encode(row.refused),
            ),
        )
        number = cursor.lastrowid or 0
        now = int(time.time())
        taken = [(c.id, c.epoch, number, now) for c in row.connections if c.id not in row.refused]
        if taken and run.executemany(_TAKE, taken).rowcount != len(taken):
            raise Conflict("a connection of the batch is in another handoff, or its epoch was seen here before")
        return number

    def conflicts(self, connections: Sequence[Connection]) -> dict[bytes, str]:
        """Which of them a new batch would be refused, and why; by id."""
        with self._lock, self._database.errors():
            return self._conflicts(connections)

    def _conflicts(self, connections: Sequence[Connection]) -> dict[bytes, str]:
        refused = {}
        ask = f"SELECT id, epoch, {_BUSY} FROM seen WHERE id"
        seen = {id: row for id, *row in self._about(ask, [connection.id for connection in connections])}
        for connection in connections:
            row = seen.get(connection.id)
            if row is not None and row[1]:
                refused[connection.id] = "another handoff of it is not over here"
            elif row is not None and row[0] >= connection.epoch:
                refused[connection.id] = f"its epoch {connection.epoch} is not newer than {row[0]}, seen here"
        return refused

    def rows(self) -> list[Row]:
        """The open batches, oldest first: after a restart each becomes a machine again."""
        with self._lock, self._database.errors():
            found = self._database.connection.execute(_ROWS)
            return [
                Row(
                    batch=batch,
                    role=role,
                    state=state,
                    peer=peer,
                    steer=steer,
                    shared=bool(shared),
                    journal=journal,
                    source=source,
                    connections=_CONNECTIONS.decode(connections),
                    refused=_REFUSED.decode(refused),
                )
                for batch, role, state, peer, steer, shared, journal, source, connections, refused in found
            ]

    def records(self, batch: bytes) -> dict[bytes, bytes]:
        """The records of a batch that comes here, by connection id. Raises RecordError if the key is another now."""
        with self._lock, self._database.errors():
            ask = "SELECT number, data, connections FROM handoff JOIN records USING(number) WHERE batch=? AND role=?"
            found = self._database.connection.execute(ask, (batch, DestinationHandoff.role)).fetchone()
            if found is None:
                return {}
            number, data, connections = found
            sealed = data or self._files.read(number)
        return _RECORDS.decode(self._key.open(sealed, batch + connections))

    def forget(
        self,
        batch: bytes,
        role: str,
        connections: Sequence[Connection],
        moved: frozenset[bytes],
        *,
        sockets: Mapping[int, bytes] | None = None,
        again: bool = False,
    ) -> None:
        """The batch is over: its row and records go; its epochs stay seen, and that ``moved`` changed hands.

        ``sockets`` are remembered, see `remember`. ``again``: the epochs of those that did not move may be tried again.
        """
        with self._lock:
            now = int(time.time())
            with self._database.transaction() as run:
                found = run.execute("SELECT number FROM handoff WHERE batch=? AND role=?", (batch, role)).fetchone()
                if found is None:
                    run.executemany(_MARK, [(c.id, c.epoch, now) for c in connections])
                else:
                    run.execute("DELETE FROM records WHERE number=?", found)
                    run.execute("DELETE FROM handoff WHERE number=?", found)
                    if again:
                        left = [(c.id, c.epoch, *found) for c in connections if c.id not in moved]
                        run.executemany(_GIVE_BACK, left)
                    if sockets:
                        self._remember(sockets)
                    if moved:
                        others = _encode([c.id for c in connections if c.id not in moved])
                        run.execute("INSERT OR REPLACE INTO moved VALUES(?, ?, ?, ?)", (*found, batch, others, now))
            if found is not None:
                self._files.drop(*found)

    @property
    def untidy(self) -> bool:
        """Whether there may be something to `tidy`."""
        return self._database.untidy

    def tidy(self) -> None:
        """What was deleted is wiped: from the write-ahead log once no batch is open. For a thread of its own."""
        self._files.wipe()
        self._database.tidy("SELECT NOT EXISTS(SELECT 1 FROM handoff)")

    # ---- connections

    def seen(self, id: bytes) -> int:
        """The newest epoch of the connection that this host knows of; 0: none."""
        with self._lock, self._database.errors():
            row = self._database.connection.execute("SELECT epoch FROM seen WHERE id=?", (id,)).fetchone()
        return row[0] if row else 0

    def committed(self, connection: Connection) -> bool:
        """Whether exactly this epoch of it changed hands, as far as a batch that is over here can tell."""
        with self._lock, self._database.errors():
            ask = "SELECT others FROM seen JOIN moved USING(number) WHERE id=? AND epoch=?"
            found = self._database.connection.execute(ask, (connection.id, connection.epoch)).fetchone()
        return found is not None and connection.id not in _OTHERS.decode(found[0])

    def others(self, batch: bytes) -> frozenset[bytes] | None:
        """Of a batch that is over here and changed hands the ids of those that did not; None: no such batch."""
        with self._lock, self._database.errors():
            found = self._database.connection.execute("SELECT others FROM moved WHERE batch=?", (batch,)).fetchone()
        return None if found is None else frozenset(_OTHERS.decode(found[0]))

    def name(self, sockets: Iterable[tuple[FourTuple, int]]) -> tuple[Connection, ...]:
        """Ids and new epochs for sockets of this host, given with their cookies (SO_COOKIE): for the next handoff.

        One that came here by a handoff keeps its id; any other gets a new one.
        """
        ask = "SELECT cookie, socket.id, epoch FROM socket LEFT JOIN seen ON seen.id = socket.id WHERE cookie"
        chosen = [(four_tuple, _signed(cookie)) for four_tuple, cookie in sockets]
        with self._lock, self._database.errors():
            known = {cookie: row for cookie, *row in self._about(ask, [cookie for _, cookie in chosen])}
        named = []
        for four_tuple, cookie in chosen:
            id, epoch = known.get(cookie) or (new_id(), 0)
            named.append(Connection(id, (epoch or 0) + 1, four_tuple))
        return tuple(named)

    def _about(self, ask: str, keys: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        # The rows of many keys with few questions: one a key costs ten times as much.
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            yield from self._database.connection.execute(f"{ask} IN ({','.join('?' * len(part))})", part)

    def remember(self, sockets: Mapping[int, bytes]) -> None:
        """The sockets with these cookies (SO_COOKIE) are the connections with these ids."""
        with self._lock, self._database.transaction():
            self._remember(sockets)

    def _remember(self, sockets: Mapping[int, bytes]) -> None:
        named = [(_signed(cookie), id) for cookie, id in sockets.items()]
        self._database.connection.executemany("INSERT OR REPLACE INTO socket VALUES(?, ?)", named)

    def prune(self, alive: Iterable[int], seconds: float) -> None:
        """Drop what no longer matters: cookies other than ``alive``, what was not touched for so many seconds."""
        keep = {_signed(cookie) for cookie in alive}
        before = int(time.time() - seconds)
        with self._lock, self._database.transaction() as run:
            gone = [row for row in run.execute("SELECT cookie FROM socket") if row[0] not in keep]
            run.executemany("DELETE FROM socket WHERE cookie=?", gone)
            run.execute(
                f"DELETE FROM seen WHERE at < ? AND NOT {_BUSY} AND id NOT IN (SELECT id FROM socket)",
                (before,),
            )
            run.execute("DELETE FROM moved WHERE at < ? AND number NOT IN (SELECT number FROM seen)", (before,))


def _parts(records: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """What _RECORDS reads, without a copy of the large ones."""
    small = [b"\xdf" + len(records).to_bytes(4)]  # map 32
    for id, record in records.items():
        small += (_encode(id), b"\xc6" + len(record).to_bytes(4))  # bin 32
        if len(record) < _SMALL:
            small.append(record)
        else:
            yield b"".join(small)
            yield record
            small.clear()
    yield b"".join(small)


def _signed(cookie: int) -> int:
    # SQLite's integers are signed, the kernel's cookies are not.
    return cookie - (1 << 64) if cookie >> 63 else cookie
