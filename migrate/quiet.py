"""Quiet points: moments at which an unmodified request-response server has nothing of a connection in its own memory.

A connection is quiet when nothing is unread, nothing waits to be sent for the first time, and the last data on it was
the owner's answer and not a request. The kernel tells the times of the last data sent and received in milliseconds,
counted in its own ticks (4 ms at 250 Hz), so "within the same tick" is the usual case of a quick answer. Three
observations settle which came last, the strongest first:

- the owner sent something while arriving segments were held: nothing can have come after it;
- the last sending is younger than the last receiving;
- both are equally old, and long ago: an owner that meant to answer would have done so (``PATIENCE``).

It stays a heuristic: an answer in several parts with a pause between them, a request that the owner has read in half,
a server that speaks first, look quiet too.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from migrate.ici import FourTuple
from migrate.kernel import sockopt, tcpinfo

__all__ = ["Activity", "observe", "rounds", "verdict"]

SETTLE = 0.012  # seconds without a new byte sent, as far as watched; three ticks at 250 Hz
PATIENCE = 0.120  # seconds after which an answer is no longer expected
PAUSE = 0.004  # seconds between two looks
_ON_TIME = 1.5 * PAUSE  # seconds that one look can add to the time that bytes_sent has stood still
_STEP = 0.020  # seconds to let everything run between two attempts
_LONGEST = 0.050  # seconds for which an attempt holds a connection whose owner still owes an answer
_THOROUGH = 1.5 * PATIENCE  # the same for a thorough attempt: long enough to know

_read = tcpinfo.reader("last_data_sent", "last_data_recv", "bytes_received", "notsent_bytes", "bytes_sent")


class Activity(NamedTuple):
    """What a connection did last."""

    unread: int  # bytes
    notsent: int  # bytes
    sent_ago: int  # milliseconds
    received_ago: int  # milliseconds
    bytes_received: int
    bytes_sent: int


class Holding(Protocol):
    """What is needed of a `migrate.hold.Hold`."""

    def add(self, tuples: list[FourTuple], *, outgoing: bool = True) -> None: ...
    def remove(self, tuples: list[FourTuple]) -> None: ...


def observe(sock: socket.socket) -> Activity:
    """Look at a connection; raises OSError if it ended."""
    sent_ago, received_ago, bytes_received, notsent, bytes_sent = _read(sockopt.tcp_info(sock))
    return Activity(sockopt.received_length(sock), notsent, sent_ago, received_ago, bytes_received, bytes_sent)


def verdict(before: Activity, now: Activity, *, settled: float, thorough: bool = False) -> bool | None:
    """Of a connection that was ``before`` when its arriving segments were first held: is it quiet ``now``?

    ``settled`` is the time in seconds for which bytes_sent has not changed since, as far as that was watched.
    None: wait, an answer may come yet; ``thorough`` says so too of one that only time can tell about.
    """
    if now.unread or now.notsent:
        return None
    answered = now.bytes_received == 0 or now.bytes_sent > before.bytes_sent or now.sent_ago < now.received_ago
    if not answered and now.sent_ago > now.received_ago:
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
    waiting = {key: _Watched(sock) for key, sock in sockets.items()}
    ready: list[FourTuple] = []
    refused: list[FourTuple] = []
    limit = time.monotonic() + (_THOROUGH if thorough else _LONGEST)
    while waiting:
        late = time.monotonic() >= limit
        for key, watched in list(waiting.items()):
            answer = watched.look(thorough)
            if answer is None and not late:
                continue
            (ready if answer else refused).append(key)
            del waiting[key]
        if refused:
            hold.remove(refused)
            refused = []
        if waiting:
            select.select((), (), (), PAUSE)
    return ready


class _Watched:
    """One connection while its arriving segments are held."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._before: Activity | None = None
        self._bytes_sent = -1
        self._settled = self._looked = 0.0

    def look(self, thorough: bool) -> bool | None:
        """The verdict now; a connection that ended is not quiet."""
        try:
            now = observe(self._sock)
        except OSError:
            return False
        moment = time.monotonic()
        # A look that comes late says that the machine is busy; its owner may have waited for a processor as well.
        self._settled += min(moment - self._looked, _ON_TIME)
        self._looked = moment
        if now.bytes_sent != self._bytes_sent:
            self._bytes_sent, self._settled = now.bytes_sent, 0.0
        self._before = self._before or now
        return verdict(self._before, now, settled=self._settled, thorough=thorough)
