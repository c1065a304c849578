"""Connections follow their address: what the notify program does after keepalived has moved it, or while it flaps.

While the address is elsewhere a guard keeps this host from answering for it with RSTs. When the address leaves, its
connections are moved after it until none is left; those that cannot move are forwarded to here by its new host. When it
comes, the guard stays for a grace time: the connections are still on their way, or the address goes back at once.

The kernel says when to look and what is the case, keepalived only which process follows: one, from its first word to
its end. So it does not matter when, and in what order, words arrive. See `migrate.cli.resident` for how one is chosen.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence

from migrate.cli.floating import Floating
from migrate.cli.output import Output, explain
from migrate.errors import Error, from_oserror
from migrate.kernel.link import AddressWatch

__all__ = ["Follower", "follow"]

TICK = 0.2  # seconds between two looks while something is going on
IDLE = 2.0  # and else, should the kernel's word be lost
SETTLE = 2.0  # seconds after the last connection has left until segments for it are taken to be over
LATE = 15.0  # seconds that connections may be here before their address
SLOWEST = 10.0  # seconds between two attempts to move what stays
ENDING = 20.0  # seconds after keepalived's end in which the address may leave, and what follows it


class Follower:
    """Follows one address, in a thread of its own (`run`). ``before`` is whether the address was here."""

    def __init__(self, floating: Floating, output: Output, *, before: bool, grace: float) -> None:
        """``grace`` in seconds."""
        self._floating = floating
        self._output = output
        self._here = before
        self._grace = grace
        self._woken = threading.Event()
        self._deadline: float | None = None
        self._lost = False  # the address has left, and perhaps not yet all that must follow it
        self._guarded = False  # by this process
        self._began()

    def wake(self) -> None:
        """Something happened to the address: it may have left and come back since the last look. From any thread."""
        self._woken.set()

    def end(self) -> None:
        """See the address off, and what follows it, then end; within `ENDING`. From any thread."""
        self._deadline = time.monotonic() + ENDING
        self._woken.set()

    def run(self) -> None:
        """Look again and again."""
        while self._deadline is None or ((self._busy or self._here) and time.monotonic() < self._deadline):
            self.step()
            if self._woken.wait(TICK if self._busy else IDLE):
                self._woken.clear()
                self._began()

    def step(self) -> None:
        """Do what the address's being here, or not, asks for. Failures are told, and tried again next time."""
        try:
            self._step()
        except Error as error:
            self._output.say(explain(error))
        except OSError as error:  # descriptors ran out, the run directory is gone
            self._output.say(explain(from_oserror(error.filename or "a system call", error)))

    def _began(self) -> None:
        self._busy = True  # something is still to be done, or to be waited for
        self._since = self._next = time.monotonic()
        self._pause = TICK

    def _step(self) -> None:
        floating, here = self._floating, self._floating.here()
        if not (here and self._guarded):
            floating.guard()
            self._guarded = True
        if here is not self._here:
            self._here = here
            self._began()
            self._output.say(f"{floating.text} {'has come' if here else 'has left'}")
            floating.stay()
            self._lost = not here
        if not self._busy:
            return
        now = time.monotonic()
        if here:
            if now - self._since > self._grace:
                floating.unguard()
                self._rest("here")
        elif floating.left(handshakes=True):
            # What came when all had left: its address may come after it, by a planned switch or a flapping peer.
            self._lost |= self._deadline is not None or now - self._since > LATE
            if self._lost and now >= self._next:
                self._pause, self._next = min(2 * self._pause, SLOWEST), now + self._pause
                floating.sweep(self._output, behind=True)
        elif self._lost:
            self._lost, self._since = False, now
        elif now - self._since > SETTLE:
            floating.tidy()
            self._rest("elsewhere")

    def _rest(self, where: str) -> None:
        self._busy = False
        self._output.say(f"{self._floating.text} rests {where}")


def follow(
    floatings: Sequence[Floating], keepalived: int, output: Output, *, fifo: str | None, late: bool, grace: float
) -> None:
    """Follow addresses until SIGTERM or until the process behind the pidfd ``keepalived`` has ended.

    ``late``: what happened before nobody saw, so connections without their address are taken to have been left behind.
    ``grace`` in seconds. Raises Error.
    """
    with contextlib.ExitStack() as opened:
        ended = [opened.enter_context(_terminated()), keepalived]
        watch = opened.enter_context(AddressWatch())
        words = [] if fifo is None else [opened.enter_context(_opened(fifo))]
        followers = [
            Follower(each, output, before=each.here() or (late and each.left() > 0), grace=grace) for each in floatings
        ]
        threads = [threading.Thread(target=each.run) for each in followers]
        for thread in threads:
            thread.start()
        output.say(f"following {' '.join(each.text for each in floatings)}")
        try:
            while True:
                ready = select.select([*ended, *words, watch.fileno()], [], [])[0]
                if watch.fileno() in ready:
                    told = watch.read()
                    for floating, follower in zip(floatings, followers, strict=True):
                        if floating.named_in(told):
                            follower.wake()
                for word in set(words).intersection(ready):
                    output.say(f"keepalived: {os.read(word, 65536).decode(errors='replace').strip()}")
                if not set(ended).isdisjoint(ready):
                    break
        finally:
            # keepalived ends its programs before it takes its addresses away.
            for follower in followers:
                follower.end()
            for thread in threads:
                thread.join()


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
