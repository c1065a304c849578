"""The journal: what a host must not forget, however its agent dies."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from migrate.errors import Conflict, HostError, RecordError
from migrate.fourtuple import FourTuple
from migrate.handoff import recordfiles
from migrate.handoff.commands import Row
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.journal import Journal
from migrate.sealed import KEY_LENGTH, Key

KEY = Key(bytes(KEY_LENGTH))
LARGE = bytes(recordfiles.LARGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal(path, KEY) as journal:
        yield journal


def connections(count: int, epoch: int = 1) -> tuple[Connection, ...]:
    return tuple(
        Connection(new_id(), epoch, FourTuple(b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 1024 + i)) for i in range(count)
    )


def row(
    state: str = "PREPARED",
    batch: bytes = b"batch",
    role: str = "destination",
    moving: tuple[Connection, ...] = (),
    refused: Mapping[bytes, str] | None = None,
) -> Row:
    return Row(
        batch=batch,
        role=role,
        state=state,
        peer="a.example:7070",
        connections=moving,
        refused=refused or {},
        steer="forward",
        shared=True,
        journal="other",
        source="10.0.0.2:40123",
    )


def forget(journal: Journal, row: Row, moved: frozenset[bytes] = frozenset()) -> None:
    journal.forget(row.batch, row.role, row.connections, moved)


def test_a_batch_comes_back_as_it_was_written(journal: Journal, path: Path) -> None:
    first, second = connections(2)
    source = row("PREPARING", batch=b"one", role="source", moving=(first,))
    destination = row("PREPARED", batch=b"two", moving=(second,), refused={b"x": "no room"})
    journal.write(source)
    journal.write(destination)
    identity = journal.identity
    journal.close()
    with Journal(path, KEY) as again:
        assert again.rows() == [source, destination]
        assert again.identity == identity


def test_a_connection_that_gets_another_name_comes_back_with_both(journal: Journal, path: Path) -> None:
    plain, mapped = connections(2)
    mapped = msgspec.structs.replace(mapped, there=mapped.four_tuple._replace(local=b"\x0a\0\0\7"))
    source = row("OFFERED", role="source", moving=(plain, mapped))
    journal.write(source)
    journal.close()
    with Journal(path, KEY) as again:
        assert again.rows() == [source]


def test_a_state_is_replaced_and_the_rest_stays(journal: Journal) -> None:
    moving = connections(3)
    journal.write(row("PREPARED", moving=moving))
    journal.write(row("COMMITTING", moving=moving), {c.id: b"record" for c in moving})
    committed = row("COMMITTING", moving=moving, refused={moving[0].id: "no adopter"})
    journal.write(committed)
    assert journal.rows() == [committed]
    assert journal.records(b"batch") == {c.id: b"record" for c in moving}


def test_both_sides_of_one_batch_may_be_here(journal: Journal) -> None:
    (here,), (there,) = connections(1), connections(1)
    journal.write(row("OFFERED", role="source", moving=(here,)))
    journal.write(row("COMMITTING", moving=(there,)), {there.id: b"record"})
    assert journal.records(b"batch") == {there.id: b"record"}
    journal.forget(b"batch", "source", (here,), frozenset())
    assert journal.records(b"batch") == {there.id: b"record"}


def test_nothing_is_known_of_a_strange_batch(journal: Journal) -> None:
    assert journal.records(b"?") == {}
    assert journal.seen(b"?" * 16) == 0
    assert not journal.committed(connections(1)[0])


# ---- epochs


@pytest.mark.parametrize("epoch", [1, 4, 5])
def test_an_epoch_that_is_not_newer_is_refused(journal: Journal, epoch: int) -> None:
    (moving,) = connections(1, epoch=5)
    journal.write(row(moving=(moving,)))
    forget(journal, row(moving=(moving,)))
    old = Connection(moving.id, epoch, moving.four_tuple)
    (other,) = connections(1)
    with pytest.raises(Conflict):
        journal.write(row(batch=b"replay", moving=(other, old)))
    assert journal.conflicts((other, old)) == {moving.id: f"its epoch {epoch} is not newer than 5, seen here"}
    assert journal.rows() == [], "half of a refused batch was written"
    assert journal.seen(other.id) == 0
    journal.write(row(batch=b"new", moving=(Connection(moving.id, 6, moving.four_tuple),)))


def test_a_connection_is_in_one_open_batch(journal: Journal) -> None:
    (moving,) = connections(1)
    newer = Connection(moving.id, 2, moving.four_tuple)
    journal.write(row("PREPARING", role="source", moving=(moving,)))
    with pytest.raises(Conflict):
        journal.write(row("PREPARING", batch=b"other", role="source", moving=(newer,)))
    assert "not over" in journal.conflicts((newer,))[moving.id]
    forget(journal, row(role="source", moving=(moving,)))
    journal.write(row("PREPARING", batch=b"other", role="source", moving=(newer,)))


def test_a_batch_that_only_waits_to_be_heard_keeps_nobody(journal: Journal) -> None:
    (moving,) = connections(1)
    journal.write(row("SETTLING", role="source", moving=(moving,)))
    journal.write(row("PREPARING", batch=b"next", role="source", moving=(Connection(moving.id, 2, moving.four_tuple),)))
    assert len(journal.rows()) == 2


def test_the_refused_keep_their_epoch(journal: Journal) -> None:
    first, second = connections(2)
    journal.write(row(moving=(first, second), refused={second.id: "no adopter"}))
    assert (journal.seen(first.id), journal.seen(second.id)) == (1, 0)


def test_discarded_is_final_for_a_batch_that_was_never_here(journal: Journal) -> None:
    (moving,) = connections(1, epoch=3)
    journal.forget(b"unheard", "destination", (moving,), frozenset())
    assert journal.seen(moving.id) == 3
    with pytest.raises(Conflict):
        journal.write(row(batch=b"unheard", moving=(moving,)))


def test_a_stranger_s_batch_does_not_free_a_connection(journal: Journal) -> None:
    (moving,) = connections(1)
    journal.write(row("COMMITTING", moving=(moving,)))
    journal.forget(b"stranger", "destination", (Connection(moving.id, 7, moving.four_tuple),), frozenset())
    assert "not over" in journal.conflicts((Connection(moving.id, 9, moving.four_tuple),))[moving.id]
    assert journal.seen(moving.id) == 7
    journal.forget(b"another", "destination", (moving,), frozenset())
    assert journal.seen(moving.id) == 7


def test_what_changed_hands_is_known_afterwards(journal: Journal) -> None:
    moved, stayed = connections(2)
    batch = row("SERVING", moving=(moved, stayed), refused={stayed.id: "no"})
    journal.write(row("PREPARED", moving=(moved, stayed)))
    assert not journal.committed(moved)
    forget(journal, batch, frozenset({moved.id}))
    assert journal.committed(moved)
    assert not journal.committed(stayed)
    assert not journal.committed(Connection(moved.id, 2, moved.four_tuple))


def test_a_socket_keeps_its_id_and_gets_the_next_epoch(journal: Journal) -> None:
    came, _ = connections(2, epoch=4)
    journal.write(row(moving=(came,)))
    cookie = (1 << 63) + 5
    journal.remember({cookie: came.id})
    named, fresh = journal.name([(came.four_tuple, cookie), (came.four_tuple, 6)])
    assert (named.id, named.epoch) == (came.id, 5)
    assert fresh.id != came.id
    assert (len(fresh.id), fresh.epoch) == (16, 1)
    journal.prune({cookie}, 3600)
    assert journal.name([(came.four_tuple, cookie)]) == (named,)
    journal.prune((), 3600)
    assert journal.name([(came.four_tuple, cookie)])[0].id != came.id
    assert journal.seen(came.id) == 4


def test_old_epochs_go_but_not_of_open_batches_or_living_sockets(journal: Journal) -> None:
    over, living, busy = connections(3)
    journal.write(row(batch=b"over", moving=(over, living)))
    journal.forget(b"over", "destination", (over, living), frozenset({over.id}))
    journal.remember({7: living.id})
    journal.write(row(batch=b"open", moving=(busy,)))
    journal.prune({7}, -2)
    assert [journal.seen(c.id) for c in (over, living, busy)] == [0, 1, 1]


def test_what_came_here_is_known_also_when_it_has_moved_on(journal: Journal) -> None:
    came, stayed = connections(2)
    journal.write(row(batch=b"over", moving=(came, stayed)))
    assert journal.others(b"over") is None
    journal.forget(b"over", "destination", (came, stayed), frozenset({came.id}))
    later = Connection(came.id, 9, came.four_tuple)
    journal.forget(b"later", "source", (later,), frozenset())
    journal.prune((), 3600)
    assert not journal.committed(came)
    assert journal.others(b"over") == frozenset({stayed.id})
    journal.prune((), -2)
    assert journal.others(b"over") is None


# ---- the files


def test_only_the_owner_may_read_it(journal: Journal, path: Path) -> None:
    journal.write(row(moving=connections(1)))
    (large,) = connections(1)
    journal.write(row("COMMITTING", b"large", moving=(large,)), {large.id: LARGE})
    found = {str(each.relative_to(path.parent)): stat.S_IMODE(each.stat().st_mode) for each in path.parent.rglob("*")}
    assert found.keys() >= {"journal", "journal-wal", "journal.lock", "journal.records/2"}
    assert found.pop("journal.records") == 0o700
    assert set(found.values()) == {0o600}


def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    path.touch(0o644)
    with Journal(path, KEY):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def holding(path: Path, part: bytes) -> list[str]:
    """The files of the journal that hold these bytes."""
    return [each.name for each in path.parent.rglob("*") if each.is_file() and part in each.read_bytes()]


@pytest.mark.parametrize("state", ["ACTIVE", None], ids=["they run", "it is over"])
@pytest.mark.parametrize("length", [200, 2000], ids=["in rows", "in a file"])
def test_no_byte_of_a_record_is_ever_in_a_file(journal: Journal, path: Path, state: str | None, length: int) -> None:
    moving = connections(40)
    secret = os.urandom(16).hex().encode()
    records = {c.id: secret * length for c in moving}

    def found() -> list[str]:
        return holding(path, secret)

    journal.write(row("PREPARED", moving=moving))
    journal.write(row("COMMITTING", moving=moving), records)
    assert (journal.records(b"batch"), found()) == (records, [])
    if state is not None:
        journal.write(row(state, moving=moving))
        assert journal.records(b"batch") == {}
    journal.forget(b"batch", "destination", moving, frozenset())
    assert found() == []


@pytest.mark.parametrize("state", ["ACTIVE", None], ids=["they run", "it is over"])
def test_what_was_sealed_is_wiped_as_well(journal: Journal, path: Path, state: str | None) -> None:
    small, large = connections(2)
    journal.write(row("COMMITTING", b"small", moving=(small,)), {small.id: bytes(100_000)})
    journal.write(row("COMMITTING", b"large", moving=(large,)), {large.id: LARGE})
    (sealed,) = journal._database.connection.execute("SELECT data FROM records WHERE number=1").fetchone()
    with path.with_name("journal.records").joinpath("2").open("rb") as file:
        parts = [sealed[1000:1032], file.read()[1000:1032]]
        assert all(holding(path, part) for part in parts)
        journal.tidy()
        assert journal.untidy  # a batch is open
        assert all(holding(path, part) for part in parts)
        for batch, moving in ((b"small", small), (b"large", large)):
            if state is not None:
                journal.write(row(state, batch, moving=(moving,)))
                journal.tidy()
                assert (moving is large) <= (not holding(path, parts[1]))
            journal.forget(batch, "destination", (moving,), frozenset())
        journal.tidy()
        assert not journal.untidy
        assert not any(holding(path, part) for part in parts)
        file.seek(0)
        assert not any(file.read())  # whoever has the disk finds zeros


def test_large_records_come_back(journal: Journal, path: Path) -> None:
    """With small ones among them; and what no row counts on is gone after the next start."""
    moving = connections(3)
    records = {moving[0].id: b"small", moving[1].id: LARGE, moving[2].id: b""}
    journal.write(row("COMMITTING", moving=moving), records)
    journal.close()
    files = path.with_name("journal.records")
    (files / "7").write_bytes(b"of a row that was never written")
    with Journal(path, KEY) as again:
        assert again.records(b"batch") == records
        again.tidy()
        assert [each.name for each in files.iterdir()] == ["1"]
        (files / "1").unlink()
        with pytest.raises(RecordError, match="not there any more"):
            again.records(b"batch")


def test_a_row_that_cannot_be_written_leaves_no_file(journal: Journal, path: Path) -> None:
    """And one that could, and then a step that could not, keeps its file."""
    (moving,) = connections(1)
    journal._database.connection.execute(
        "CREATE TRIGGER no BEFORE INSERT ON records BEGIN SELECT RAISE(FAIL, 'no'); END"
    )
    with pytest.raises(HostError, match="no"):
        journal.write(row("COMMITTING", moving=(moving,)), {moving.id: LARGE})
    assert (journal.rows(), list(path.with_name("journal.records").iterdir())) == ([], [])
    journal._database.connection.execute("DROP TRIGGER no")
    journal.write(row("COMMITTING", moving=(moving,)), {moving.id: LARGE})
    journal._database.connection.execute(
        "CREATE TRIGGER no BEFORE DELETE ON records BEGIN SELECT RAISE(FAIL, 'no'); END"
    )
    with pytest.raises(HostError, match="no"):
        journal.write(row("ACTIVE", moving=(moving,)))
    assert journal.records(b"batch") == {moving.id: LARGE}


def test_records_open_with_their_key_and_in_their_row_only(journal: Journal, path: Path) -> None:
    one, two = connections(2)
    for batch, moving in ((b"one", one), (b"two", two)):
        journal.write(row("COMMITTING", batch, moving=(moving,)), {moving.id: b"record"})
    with Journal(path.with_name("other"), Key(b"k" * KEY_LENGTH)) as other:
        other.write(row("COMMITTING", b"one", moving=(one,)), {one.id: b"record"})
        other._key = KEY
        with pytest.raises(RecordError, match="another key"):
            other.records(b"one")
    journal._database.connection.execute("UPDATE records SET data=(SELECT data FROM records WHERE number=1)")
    assert journal.records(b"one") == {one.id: b"record"}
    with pytest.raises(RecordError, match="changed"):
        journal.records(b"two")


def test_one_process_at_a_time(journal: Journal, path: Path) -> None:
    with pytest.raises(HostError, match="in use"):
        Journal(path, KEY)
    journal.close()
    Journal(path, KEY).close()


def test_closing_twice_is_harmless(journal: Journal) -> None:
    journal.close()
    journal.close()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA application_id=1")
        database.execute("CREATE TABLE theirs(x)")
    database.close()


def newer(path: Path) -> None:
    Journal(path, KEY).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    database.close()


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)


def directory(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (foreign, "another program"),
        (newer, "layout 99"),
        (garbage, "not a database"),
        (directory, "directory"),
        (link, "symbolic links"),
    ],
)
def test_a_file_that_is_none_of_ours(path: Path, make: object, says: str) -> None:
    assert callable(make)
    make(path)
    before = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    with pytest.raises(Exception, match=says) as caught:
        Journal(path, KEY)
    assert type(caught.value).__module__ == "migrate.errors"
    assert caught.value.hint  # type: ignore[attr-defined]
    if before:
        assert path.read_bytes() == before


def test_a_full_disk_is_an_error_and_no_loss(journal: Journal) -> None:
    first, second = connections(2)
    journal.write(row("PREPARED", moving=(first,)))
    database = journal._database.connection
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(HostError, match="full") as caught:
        journal.write(row("COMMITTING", moving=(first,)), {first.id: bytes(1 << 17)})
    assert "room" in str(caught.value)
    assert journal.rows() == [row("PREPARED", moving=(first,))]
    database.execute("PRAGMA max_page_count=1000000")
    journal.write(row("COMMITTING", moving=(first,)), {first.id: bytes(1 << 17)})
    journal.write(row("PREPARED", batch=b"second", moving=(second,)))


def test_a_file_that_does_not_fit_is_an_error_and_no_loss(journal: Journal, path: Path) -> None:
    """The kernel stops the write half-way, as on a full disk."""
    (moving,) = connections(1)
    journal.write(row("PREPARED", moving=(moving,)))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(LARGE) // 2, usual[1]))
    try:
        with pytest.raises(HostError, match=r"journal\.records/1: File too large") as caught:
            journal.write(row("COMMITTING", moving=(moving,)), {moving.id: LARGE})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "room" in str(caught.value)
    assert journal.rows() == [row("PREPARED", moving=(moving,))]
    assert list(path.with_name("journal.records").iterdir()) == []
    journal.write(row("COMMITTING", moving=(moving,)), {moving.id: LARGE})
    assert journal.records(b"batch") == {moving.id: LARGE}


CHILD = """
import itertools, os, sys
from migrate.fourtuple import FourTuple
from migrate.handoff.commands import Row
from migrate.handoff.ids import Connection
from migrate.handoff.journal import Journal
from migrate.sealed import Key
journal = Journal(sys.argv[1], Key(bytes(32)))
for number in itertools.count():
    batch = number.to_bytes(16)
    moving = tuple(Connection(batch[4:] + i.to_bytes(4), 1, FourTuple(b"1234", 1, b"5678", i)) for i in range(50))
    def row(state):
        return Row(batch=batch, role="destination", state=state, peer="", connections=moving, refused={})
    journal.write(row("PREPARED"))
    journal.write(row("COMMITTING"), {c.id: c.id * (100 if number % 2 else 1000) for c in moving})
    os.write(1, b"%d\\n" % number)
    if number % 3 == 0:
        journal.forget(batch, "destination", moving, frozenset())
"""


def test_what_was_written_survives_a_kill_at_any_moment(path: Path) -> None:
    for attempt in range(6):
        path.unlink(missing_ok=True)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(1 + 7 * attempt):
                assert child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read().split()
        last = int(said[-1]) if said else 7 * attempt
        with Journal(path, KEY) as journal:
            states = {int.from_bytes(row.batch): row.state for row in journal.rows()}
            for number in range(last):
                assert states.get(number) == (None if number % 3 == 0 else "COMMITTING")
            for number, state in states.items():
                kept = journal.records(number.to_bytes(16))
                assert len(kept) == (0 if state == "PREPARED" else 50)
                assert all(data == id * (100 if number % 2 else 1000) for id, data in kept.items())


def test_ten_thousand_connections_cost_microseconds(journal: Journal) -> None:
    each: list[float] = []
    for attempt in range(5):
        moving = connections(10_000)
        records = {c.id: bytes(300) for c in moving}
        batch = attempt.to_bytes(16)
        prepared, committing = row("PREPARED", batch, moving=moving), row("COMMITTING", batch, moving=moving)
        start = time.thread_time()
        journal.write(prepared)
        journal.write(committing, records)
        each.append((time.thread_time() - start) / 10_000 * 1e6)
        forget(journal, committing)
    # Processor time, with room for a slow machine: it is to notice a row a record, an index too many, a lost cache.
    assert statistics.median(each) < 12, f"{each} µs"
    print(f"{min(each):.1f} µs a connection")
