"""The registry: the first to claim has it."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migrate.errors import HostError
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.journal import Journal
from migrate.handoff.registry import OwnershipRegistry, SqliteRegistry
from migrate.sealed import KEY_LENGTH, Key

FOUR_TUPLE = FourTuple(b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 1024)


def connections(count: int) -> list[Connection]:
    return [Connection(new_id(), 1, FOUR_TUPLE) for _ in range(count)]


def test_the_first_has_it_for_good(tmp_path: Path) -> None:
    first, second = connections(2)
    with SqliteRegistry(tmp_path / "owners") as here, SqliteRegistry(tmp_path / "owners") as there:
        registry: OwnershipRegistry = there  # the shape of the Protocol
        assert here.identity == registry.identity
        assert here.claim([first], "a") == frozenset()
        assert registry.claim([first, second], "b") == {first.id}
        assert here.claim([first, second], "a") == {second.id}
        assert registry.claim([first, second], "b") == {first.id}, "asked again it says the same"


def test_epochs_are_claimed_apart(tmp_path: Path) -> None:
    (first,) = connections(1)
    later = Connection(first.id, 2, FOUR_TUPLE)
    with SqliteRegistry(tmp_path / "owners") as registry:
        assert registry.claim([first], "a") == frozenset()
        assert registry.claim([later], "b") == frozenset()
        registry.unclaim([later])
        assert registry.claim([first], "b") == {first.id}
        assert registry.claim([later], "a") == frozenset()


def test_one_that_is_locked_can_be_opened(tmp_path: Path) -> None:
    (first,) = connections(1)
    with SqliteRegistry(tmp_path / "owners") as registry, contextlib.ExitStack() as locked:
        holder = locked.enter_context(contextlib.closing(sqlite3.connect(tmp_path / "owners", isolation_level=None)))
        holder.execute("BEGIN IMMEDIATE")
        with SqliteRegistry(tmp_path / "owners") as late:
            assert late.identity == registry.identity
            with pytest.raises(HostError, match="locked"):
                late.claim([first], "a")
            locked.close()
            assert late.claim([first], "a") == frozenset()


def test_agents_that_start_at_once_make_one(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def identity(number: int) -> str:
        together.wait(10)
        with SqliteRegistry(tmp_path / f"owners{number}") as registry:
            return registry.identity

    with ThreadPoolExecutor(4) as pool:
        for number in range(40):
            assert len(set(pool.map(identity, [number] * 4))) == 1


def test_unclaiming_what_nobody_has_is_harmless(tmp_path: Path) -> None:
    with SqliteRegistry(tmp_path / "owners") as registry:
        registry.unclaim(connections(2))
        assert registry.claim([], "a") == frozenset()


def test_old_claims_go(tmp_path: Path) -> None:
    claimed = connections(2)
    with SqliteRegistry(tmp_path / "owners") as registry:
        registry.claim(claimed, "a")
        registry.prune([], 3600)
        assert registry.claim(claimed, "b") == {c.id for c in claimed}
        registry.prune([], -2)
        assert registry.claim(claimed, "b") == frozenset()


def test_a_claim_that_an_open_batch_needs_does_not_grow_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, forgotten = connections(2)
    now = time.time()
    with SqliteRegistry(tmp_path / "owners") as registry:
        registry.claim([needed, forgotten], "a")
        for days in (20, 40, 60):
            monkeypatch.setattr(time, "time", lambda days=days: now + days * 86400)
            registry.prune([needed], 30 * 86400)
        assert registry.claim([needed, forgotten], "b") == {needed.id}


def test_two_files_are_two_registries(tmp_path: Path) -> None:
    with SqliteRegistry(tmp_path / "one") as one, SqliteRegistry(tmp_path / "two") as two:
        assert one.identity != two.identity


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    with SqliteRegistry(tmp_path / "owners") as registry:
        registry.claim(connections(1), "a")
        assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_a_journal_is_no_registry(tmp_path: Path) -> None:
    Journal(tmp_path / "file", Key(bytes(KEY_LENGTH))).close()
    with pytest.raises(HostError, match="another program"):
        SqliteRegistry(tmp_path / "file")


RACER = """
import sys
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection
from migrate.handoff.registry import SqliteRegistry
registry = SqliteRegistry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(150):
    batch = [Connection(number.to_bytes(8) + i.to_bytes(8), 1, FourTuple(b"", 0, b"", 0)) for i in range(4)]
    lost = registry.claim(batch if sys.argv[2] == "a" else batch[::-1], sys.argv[2])
    print(*(int(connection.id not in lost) for connection in batch))
"""


def test_two_processes_race_and_each_connection_has_one_winner(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, tmp_path / "owners", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    said: dict[int, str] = {}

    def finish(number: int) -> None:
        said[number] = racers[number].communicate("go\n")[0]

    threads = [threading.Thread(target=finish, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [[int(word) for word in said[number].split()] for number in range(2)]
    assert [len(each) for each in won] == [600, 600]
    assert all(a + b == 1 for a, b in zip(*won, strict=True))
