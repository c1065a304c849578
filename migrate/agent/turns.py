"""Whose turn it is: of the batches that are prepared only a few stand still at a time.

To prepare a batch costs both agents as much as to move it, and nobody stands still for it. So it is done well ahead,
and a batch that is prepared waits here before its hold. The fewer have their turn at once, the shorter each stands
still; the more, the better both hosts are kept busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from migrate.agent.departure import Departure
from migrate.agent.engine import Engine
from migrate.handoff.events import Cancel

__all__ = ["Turns"]

_STALE = 0.5  # of the destination's patience: the rest is for what follows


class Turns:
    """Of batches to one destination. Belongs to the engine's thread.

    ``prepared`` is told of each batch that has come so far.
    """

    def __init__(self, engine: Engine, most: int, prepared: Callable[[Departure], None]) -> None:
        self._engine = engine
        self._most = most
        self._prepared = prepared
        self._opened = False
        self._here: dict[Departure, bool] = {}  # all that are not over, and whether the destination has decided
        self._waiting: dict[Departure, float] = {}  # since when, in the order of their coming
        self._going: set[Departure] = set()

    def begin(self, batch: Departure) -> None:
        """It is about to be prepared."""
        self._here[batch] = False

    def open(self) -> None:
        """As much is prepared as shall be: let the first go."""
        self._opened = True
        self._next()

    def come(self, batch: Departure) -> bool:
        """Whether it is the batch's turn. If not it is resumed when it is, or when it has been withdrawn."""
        if batch in self._going:
            return True
        self._waiting[batch] = time.monotonic()
        self._prepared(batch)
        self._next()
        return False

    def decided(self, batch: Departure) -> None:
        """The destination has said what it takes of it."""
        if batch in self._here:
            self._here[batch] = True
            self._next()

    def over(self, batch: Departure) -> None:
        """Its connections run again, wherever they are, or are given up. Again does nothing."""
        self._here.pop(batch, None)
        self._waiting.pop(batch, None)
        self._going.discard(batch)
        self._next()

    def look(self) -> None:
        """Those that wait may have ended otherwise: a stream broke, or they were stopped."""
        for batch in [each for each in self._waiting if each.machine.over]:
            self._resume(batch)

    def _next(self) -> None:
        while self._opened and len(self._going) < self._most and (batch := self._first()) is not None:
            waited = time.monotonic() - self._waiting[batch]
            if waited > _STALE * batch.machine.times.patience or not batch.may_go():
                batch.withdrawn = True
                self._engine.give(batch, Cancel())
            else:
                self._going.add(batch)
                batch.turn_at = time.monotonic()
            self._resume(batch)

    def _first(self) -> Departure | None:
        """Who came first; the last batch of an address only if all others are decided."""
        for batch in self._waiting:
            if not batch.last or all(decided for each, decided in self._here.items() if each is not batch):
                return batch
        return None

    def _resume(self, batch: Departure) -> None:
        # Later: the engine may be in the midst of another batch.
        del self._waiting[batch]
        self._engine.call(partial(self._engine.resume, batch))
