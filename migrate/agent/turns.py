"""Whose turn it is: of the batches that are prepared only a few stand still at a time.

To prepare a batch costs both agents as much as to move it, and nobody stands still for it. So it is done well ahead,
and a batch that is prepared waits here before its hold. The fewer have their turn at once, the shorter each stands
still; the more, the better both hosts are kept busy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from migrate.agent.driver import tuples_of
from migrate.agent.engine import Engine
from migrate.agent.logging import get_logger
from migrate.agent.outbound import GIVEN, Departure
from migrate.agent.whereabouts import others_at
from migrate.errors import Error
from migrate.handoff.events import Cancel

__all__ = ["Turns"]

_log = get_logger(__name__)

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
        self._looking: Departure | None = None  # for whom it is looked, or was, who else has the address
        self._alone: bool | None = None  # what was seen
        self._beside: Sequence[Departure] = ()  # who was on its way then

    @property
    def idle(self) -> bool:
        """Whether none is left."""
        return not self._here

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
        if not self._opened:
            return
        while len(self._going) < self._most and (batch := self._first()) is not None:
            waited = time.monotonic() - self._waiting[batch]
            if waited > _STALE * batch.machine.times.patience or (batch.last and not self._leaves()):
                batch.withdrawn = True
                self._engine.give(batch, Cancel())
            else:
                self._going.add(batch)
                batch.turn_at = time.monotonic()
            self._resume(batch)
        self._look_ahead()

    def _first(self) -> Departure | None:
        """Who came first; the last of an address when all others are decided, and it is known who else has it."""
        for batch in self._waiting:
            if not batch.last:
                return batch
            others = (decided for each, decided in self._here.items() if each is not batch)
            if self._looking is batch and self._alone is not None and all(others):
                return batch
        return None

    def _leaves(self) -> bool:
        """Whether nobody has the last batch's address now but who goes with it."""
        given = (each.machine.state.name in GIVEN and not each.machine.refused for each in self._beside)
        return bool(self._alone) and all(given)

    def _look_ahead(self) -> None:
        """When nobody but the last batch waits for its turn, it can be seen already who else has its address."""
        for batch in self._waiting:
            others = [each for each in self._here if each is not batch]
            if batch.last and self._looking is not batch and self._going.issuperset(others):
                self._look_around(batch, others)

    def _look_around(self, last: Departure, others: list[Departure]) -> None:
        # In a thread: the kernel takes some milliseconds for it, in which the others go on.
        self._looking, self._alone, self._beside = last, None, others
        leaving = {each for batch in (last, *others) for each in tuples_of(batch.machine.connections)}

        def look() -> None:
            alone = False
            try:
                alone = not others_at(leaving)
            except Error as error:
                _log.warning("who else has an address cannot be seen", why=str(error))
            self._engine.call(partial(seen, alone))

        def seen(alone: bool) -> None:
            if self._looking is last:
                self._alone = alone
                self._next()

        threading.Thread(target=look, name="look", daemon=True).start()

    def _resume(self, batch: Departure) -> None:
        # Later: the engine may be in the midst of another batch.
        del self._waiting[batch]
        self._engine.call(partial(self._engine.resume, batch))
