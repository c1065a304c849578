"""The holds of commands: while a command works, and for a while after it, so that no RST meets the peer.

A hold is named after the process that works. When that is over, its guard keeps the hold until the connection lives
again: on this host, which the guard notices, or which a later command says by taking the hold over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import select
import socket
import time
from collections.abc import Collection, Iterator

from migrate.errors import Conflict, Error, NotFound
from migrate.fourtuple import FourTuple
from migrate.hold import Hold
from migrate.kernel import diag, pidfd, sockopt
from migrate.kernel.nft import HOLD, HoldTable, sweep, tables

__all__ = ["adopt", "linger", "new_name", "refuse_moving", "release_others", "seconds"]

MARGIN = 30.0  # seconds by which the kernel's own timeout of a hold outlasts the guard's

_NAME = re.compile(re.escape(HOLD) + r"(cli-(\d+)-[0-9a-f]{8})")
_LOOK = 0.5  # seconds between two looks whether connections live here again
_ENDING = 1.0  # seconds for which a command whose work is done may still be seen
_DYING = 5.0  # seconds that a killed process may take to let go what it had


def seconds(text: str) -> float:
    """The argument of --hold and --when-quiet."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400 seconds")
    return value


def new_name() -> str:
    """For a hold of this process."""
    return f"cli-{os.getpid()}-{secrets.token_hex(4)}"


def refuse_moving(tuples: Collection[FourTuple]) -> None:
    """Raise Conflict if another command that is at work holds one of these, and does not end at once.

    What a guard left that was killed is swept up: a table that holds nothing any more.
    """
    sweep()
    limit = time.monotonic() + _ENDING
    while busy := _busy(set(tuples)):
        if time.monotonic() > limit:
            pid, moving = busy
            raise Conflict(f"{moving} is being moved by another tcpmig (pid {pid})", hint="let it end first")
        select.select((), (), (), 0.02)


def release_others(tuples: Collection[FourTuple]) -> None:
    """What commands that are over hold of these is let go: a hold of the caller's stands now."""
    for pid, table in _commands():
        if pid == os.getpid() or _alive(pid):
            continue
        table.reload()
        table.remove(table.members.keys() & set(tuples))
        if not table.members:
            table.delete()


def adopt(name: str) -> Hold | None:
    """The hold of a process that is over, or None if it had made none."""
    limit = time.monotonic() + _DYING
    while True:
        try:
            return Hold.adopt(name)
        except NotFound:
            return None
        except Conflict:
            if time.monotonic() > limit:
                raise
            select.select((), (), (), 0.005)


def linger(hold: Hold, seconds: float) -> None:
    """Keep the hold that long, reading away what it keeps, and let go what lives here again."""
    end, next_look = time.monotonic() + seconds, 0.0
    while (now := time.monotonic()) < end:
        if now >= next_look:
            with contextlib.suppress(Error):
                hold.remove(_living(hold.tuples))
            if not hold.tuples or HOLD + hold.name not in tables(HoldTable.family):
                break
            next_look = now + _LOOK
        select.select([hold], (), (), max(0.0, min(end, next_look) - now))
        hold.discard()
    hold.lift()


def _busy(tuples: Collection[FourTuple]) -> tuple[int, FourTuple] | None:
    for pid, table in _commands():
        if _alive(pid) and (moving := table.elements().keys() & tuples):
            return pid, min(moving)
    return None


def _commands() -> Iterator[tuple[int, HoldTable]]:
    """The holds of commands here, each with the process it is named after."""
    for name in tables(HoldTable.family):
        if match := _NAME.fullmatch(name):
            with HoldTable(match[1], 0) as table, contextlib.suppress(NotFound):  # gone meanwhile
                yield int(match[2]), table


def _living(tuples: Collection[FourTuple]) -> list[FourTuple]:
    """Those that have a socket here which is not silent."""
    found = {c.inode: c.four_tuple for c in diag.list_connections() if c.four_tuple in tuples and c.inode}
    owners = pidfd.owners_of(found)
    return [found[inode] for inode, those in owners.items() if not _silent(those[0])]


def _silent(owner: pidfd.Owner) -> bool:
    with contextlib.suppress(Error, OSError):
        process = pidfd.open_process(owner.pid)
        try:
            with socket.socket(fileno=pidfd.get_fd(process, owner.fd)) as sock:
                return sockopt.in_repair(sock)
        finally:
            os.close(process)
    return True


def _alive(pid: int) -> bool:
    """Whether that process runs; one that ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except OSError:
        return False
