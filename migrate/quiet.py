"""Quiet points: moments at which an unmodified request-response server has nothing of a connection in its own memory.

A connection is quiet when nothing is unread, nothing waits to be sent for the first time, and the last data on it was
the owner's answer and not a request. The kernel tells the times of the last data sent and received in milliseconds,
counted in its own ticks (4 ms at 250 Hz), so "within the same tick" is the usual case of a quick answer. Three
observations settle which came last, the strongest first:

- the owner sent something while arriving segments were held: nothing can have come after it;
- the last sending is younger than the last receiving;
- both are equally old, and long ago: an owner that meant to answer would have done so (``PATIENCE``).

An owner, or whoever answers behind it, that waits for a processor looks as if it had nothing to say. So time counts
less while anything on the host waits for one, and before the verdict each processor must let this thread run at once: a
virtual machine's can stand still for a while and nobody inside is told.

It stays a heuristic: an answer in several parts with a pause between them, a request that the owner has read in half,
a server that speaks first, look quiet too.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from migrate.ici import FourTuple
from migrate.kernel import processors, sockopt, tcpinfo

__all__ = ["Activity", "observe", "rounds", "verdict"]

SETTLE = 0.016  # seconds without a new byte sent, as `_Clock` counts them; four ticks at 250 Hz
PATIENCE = 0.120  # seconds after which an answer is no longer expected
PAUSE = 0.004  # seconds between two looks
_ON_TIME = 1.5 * PAUSE  # seconds that one round of looks can count
_BUSY = 0.25  # what a second counts in which somebody waited for a processor all the time
_AT_ONCE = 0.002  # seconds within which all processors let one run who goes before everybody else
_STEP = 0.020  # seconds to let everything run between two attempts
_LONGEST = 0.050  # seconds by `_Clock` for which an attempt holds a connection whose owner still owes an answer
_THOROUGH = 1.5 * PATIENCE  # the same for a thorough attempt: long enough to know

_read = tcpinfo.reader(
    "last_data_sent", "last_data_recv", "bytes_received", "notsent_bytes", "bytes_sent", "bytes_retrans"
)


class Activity(NamedTuple):
    """What a connection did last."""

    unread: int  # bytes
    notsent: int  # bytes
    sent_ago: int  # milliseconds
    received_ago: int  # milliseconds
    bytes_received: int
    bytes_sent: int  # less those sent again


class Holding(Protocol):
    """What is needed of a `migrate.hold.Hold`."""

    def add(self, tuples: list[FourTuple], *, outgoing: bool = True) -> None: ...
    def remove(self, tuples: list[FourTuple]) -> None: ...


def observe(sock: socket.socket) -> Activity:
    """Look at a connection; raises OSError if it ended."""
    sent_ago, received_ago, bytes_received, notsent, sent, again = _read(sockopt.tcp_info(sock))
    return Activity(sockopt.received_length(sock), notsent, sent_ago, received_ago, bytes_received, sent - again)


def verdict(before: Activity, now: Activity, *, settled: float, thorough: bool = False) -> bool | None:
    """Of a connection that was ``before`` when its arriving segments were first held: is it quiet ``now``?

    ``settled`` is the time in seconds for which bytes_sent has not changed since, as far as that was watched.
    None: wait, an answer may come yet; ``thorough`` says so too of one that only time can tell about.
    Only the times of ``before`` say which came last: nothing arrives since, and the kernel's time of the last sending
    is as well that of data sent again for want of the acknowledgements that are held.
    """
    if now.unread or now.notsent:
        return None
    answered = now.bytes_received == 0 or now.bytes_sent > before.bytes_sent or before.sent_ago < before.received_ago
    if not answered and before.sent_ago > before.received_ago:
        return None
    if settled < SETTLE:
        return None
    if answered or now.sent_ago >= PATIENCE * 1000:
        return True
    return None if thorough else False


def rounds(
    sockets: Mapping[FourTuple, socket.socket], hold: Holding, *, seconds: float, thorough: bool = False
) -> Iterator[tuple[list[FourTuple], bool]]:
    """Within ``seconds``, yield those that became quiet, held on both sides, and whether more may follow.

    The caller takes what was yielded before it asks for more. Those not quiet in an attempt are let go (what was kept
    for them is replayed) and tried again. What never became quiet is not yielded and not held at the end. A
    ``thorough`` attempt finds those that answer at once and are asked again at once, and holds them for longer.
    """
    waiting = dict(sockets)
    deadline = time.monotonic() + seconds
    while waiting:
        promising = [key for key, sock in waiting.items() if _promising(sock)]
        ready = _attempt({key: waiting[key] for key in promising}, hold, thorough) if promising else []
        for key in ready:
            del waiting[key]
        more = bool(waiting) and time.monotonic() < deadline
        if ready:
            hold.add(ready, outgoing=True)
            yield ready, more
        if not more:
            return
        select.select((), (), (), _STEP)


def _promising(sock: socket.socket) -> bool:
    """Not worth holding while there is something to read: the owner will be busy with it."""
    try:
        return observe(sock).unread == 0
    except OSError:
        return False


def _attempt(sockets: dict[FourTuple, socket.socket], hold: Holding, thorough: bool) -> list[FourTuple]:
    """Hold what arrives, wait until each is decided, let go those that are not quiet."""
    hold.add(list(sockets), outgoing=False)
    ready: list[FourTuple] = []
    with contextlib.closing(_Clock()) as clock:
        waiting = {key: _Watched(sock, clock) for key, sock in sockets.items()}
        longest = _THOROUGH if thorough else _LONGEST
        while waiting:
            clock.go_on()
            late = clock.seconds >= longest
            verdicts = {key: watched.look(thorough) for key, watched in waiting.items()}
            if True in verdicts.values() and not clock.everybody_runs():
                verdicts = dict.fromkeys(verdicts)
            refused = [key for key, answer in verdicts.items() if answer is False or (answer is None and late)]
            quiet = [key for key, answer in verdicts.items() if answer and waiting[key].look(thorough)]
            for key in refused + quiet:
                del waiting[key]
            ready += quiet
            if refused:
                hold.remove(refused)
            if waiting:
                select.select((), (), (), PAUSE)
    return ready


class _Clock:
    """Seconds since it was made in which an owner that had something to do could do it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.stood_still = 0.0  # the last moment, in ``seconds``, at which a processor was found standing still
        self._pressure = processors.Pressure()
        self._waited, self._looked = self._pressure.waited(), time.monotonic()

    def close(self) -> None:
        self._pressure.close()

    def go_on(self) -> None:
        """Count the time since the last call, less what looks come late and what others waited for a processor."""
        waited, looked = self._pressure.waited(), time.monotonic()
        elapsed = min(looked - self._looked, _ON_TIME)
        self.seconds += elapsed - (1 - _BUSY) * min(waited - self._waited, elapsed)
        self._waited, self._looked = waited, looked

    def everybody_runs(self) -> bool:
        """Whether no processor stands still; if one did, what has settled has to settle anew."""
        slow = processors.visit() > _AT_ONCE
        if slow:
            self.stood_still = self.seconds
        return not slow


class _Watched:
    """One connection while its arriving segments are held."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock = sock
        self._clock = clock
        self._before: Activity | None = None
        self._bytes_sent = -1
        self._since = 0.0  # by the clock: when bytes_sent last changed

    def look(self, thorough: bool) -> bool | None:
        """The verdict now; a connection that ended is not quiet."""
        try:
            now = observe(self._sock)
        except OSError:
            return False
        if now.bytes_sent != self._bytes_sent:
            self._bytes_sent, self._since = now.bytes_sent, self._clock.seconds
        self._before = self._before or now
        settled = self._clock.seconds - max(self._since, self._clock.stood_still)
        return verdict(self._before, now, settled=settled, thorough=thorough)
