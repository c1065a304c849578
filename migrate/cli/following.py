"""Connections follow their address: what the notify program does after keepalived has moved it, or while it flaps.

While the address is elsewhere a guard keeps this host from answering for it with RSTs. When the address leaves, its
connections are moved after it until none is left. When it comes, the guard stays for a grace time: the connections are
still on their way, or the address goes back at once. keepalived's words only say when to look.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator

from migrate.cli.floating import Floating
from migrate.cli.output import Output, explain
from migrate.errors import Error, UsageError, from_oserror

__all__ = ["Follower", "follow"]

TICK = 0.2  # seconds between two looks while something is going on
IDLE = 2.0  # and else, in case a notification was lost
SETTLE = 2.0  # seconds without a connection here until all are taken to have left
ENDING = 10.0  # seconds after SIGTERM in which the address may leave, and what follows it
_STATES = ("MASTER", "BACKUP", "FAULT", "STOP")


class Follower:
    """Look again with `step`. ``before`` is whether the address was here; ``grace`` in seconds."""

    def __init__(self, floating: Floating, output: Output, *, before: bool, grace: float) -> None:
        self._floating = floating
        self._output = output
        self._here = before
        self._grace = grace
        self._since, self._told = time.monotonic(), floating.told()
        self._lost = False  # the address has left, and perhaps not yet all that must follow it
        self.busy = True  # something is still to be done, or to be waited for

    def step(self) -> None:
        """Do what the address's being here, or not, asks for. Failures are told, and tried again next time."""
        try:
            self._step()
        except Error as error:
            self._output.say(explain(error))

    def _step(self) -> None:
        floating, here = self._floating, self._floating.here()
        if not here:
            floating.guard()
        if here is not self._here:
            self._here, self._since, self.busy = here, time.monotonic(), True
            self._output.say(f"{floating.text} {'has come' if here else 'has left'}")
            floating.stay()
            self._lost = not here
        # The address may have left and come back between two looks.
        if self._told != (told := floating.told()):
            self._told, self._since, self.busy = told, time.monotonic(), True
        if not self.busy:
            return
        # What comes to a standby by a planned switch is no concern of ours.
        if self._lost and floating.left():
            self._since = time.monotonic()
            floating.sweep(self._output)
        elif time.monotonic() - self._since > (self._grace if here else SETTLE):
            (floating.unguard if here else floating.tidy)()
            self._lost = self.busy = False


def follow(floating: Floating, words: list[str], output: Output, *, grace: float) -> int:
    """Follow a FIFO of keepalived's until SIGTERM, or one notification until nothing is left to do."""
    with _terminated() as ended:
        if len(words) == 1:
            with _opened(words[0]) as fifo:
                follower = Follower(floating, output, before=floating.here(), grace=grace)
                _follow_fifo(floating, follower, fifo, ended, output)
        elif len(words) == 4 and words[2] in _STATES:
            floating.tell()
            with floating.followed():
                follower = Follower(floating, output, before=words[2] != "MASTER", grace=grace)
                while follower.busy and not _readable([ended], TICK):
                    follower.step()
        else:
            raise UsageError(
                f"{' '.join(words)!r} is nothing that keepalived says",
                hint="--follow FIFO, or --follow INSTANCE NAME MASTER|BACKUP|FAULT|STOP PRIORITY",
            )
        if not _readable([ended], 0):
            return 0
    # keepalived ends its programs before it takes its addresses away.
    deadline = time.monotonic() + ENDING
    while (follower.busy or floating.here()) and time.monotonic() < deadline:
        follower.step()
        time.sleep(TICK)
    return 0


def _follow_fifo(floating: Floating, follower: Follower, fifo: int, ended: int, output: Output) -> None:
    while True:
        follower.step()
        ready = _readable([fifo, ended], TICK if follower.busy else IDLE)
        if fifo in ready:
            floating.tell()
            output.say(f"keepalived: {os.read(fifo, 65536).decode(errors='replace').strip()}")
        if ended in ready:
            return


def _readable(descriptors: list[int], seconds: float) -> list[int]:
    return select.select(descriptors, [], [], seconds)[0]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    # For writing too: a FIFO without writers would be readable for ever.
    try:
        fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(f"opening {path}", error) from None
    try:
        yield fifo
    finally:
        os.close(fifo)


@contextlib.contextmanager
def _terminated() -> Iterator[int]:
    """A descriptor that is readable once SIGTERM has come; afterwards SIGTERM is ignored."""
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGTERM, lambda *_: os.write(writes, b"t"))
    try:
        yield reads
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(reads)
        os.close(writes)
