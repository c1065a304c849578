"""The agent's hold: one table for all batches, and which batch holds which connection.

A connection may go on while the batch that brought it here, or took it away, still lingers. The newest batch has it
then, and what the older one says about it no longer counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from migrate.agent.engine import Engine
from migrate.agent.logging import get_logger
from migrate.errors import HostError, NotFound
from migrate.fourtuple import FourTuple
from migrate.hold import Hold

__all__ = ["LONGEST", "FromAnotherThread", "Holds"]

_log = get_logger(__name__)

LONGEST = 86400.0
"""Seconds that a hold may last that ends by itself."""

_FOREVER = 30 * 86400.0  # seconds: what is held is in the journal, and the next agent goes on with it


class _Hold(Hold):
    """One that tells when something was collected, by whatever call: then its descriptor does not tell it any more."""

    arrived: Callable[[], None] = staticmethod(lambda: None)

    def collect(self) -> int:
        count = super().collect()
        if count:
            self.arrived()
        return count


class Holds:
    """Not for several threads."""

    def __init__(self, name: str) -> None:
        """Go on with the hold of that name, or make one."""
        try:
            self._hold = _Hold.adopt(name, timeout=_FOREVER)
        except NotFound:
            self._hold = _Hold(name=name, timeout=_FOREVER)
        self._batches: dict[FourTuple, bytes] = {}
        self._expiring: set[FourTuple] = set()  # nobody's

    def fileno(self) -> int:
        """Readable when segments wait to be collected."""
        return self._hold.fileno()

    def tell(self, arrived: Callable[[], None]) -> None:
        """Have ``arrived`` called when something was kept. It must not use the hold, but have that done soon."""
        self._hold.arrived = arrived

    def collect(self) -> None:
        """Keep what has arrived, if it is for a batch."""
        self._hold.collect()
        if self._expiring:
            self._hold.take(self._expiring)

    def addresses(self) -> set[bytes]:
        """The packed local addresses of what is held."""
        return {each.local for each in self._batches}

    def __len__(self) -> int:
        return len(self._batches)

    def close(self) -> None:
        """What is held stays held, for the next agent; without anything held, nothing is left."""
        left: Mapping[FourTuple, float] = {}
        with contextlib.suppress(NotFound):  # somebody flushed the ruleset
            left = self._hold.left()
        if left:
            self._hold.disown()
        else:
            self._hold.lift()

    def sweep(self, claimed: Iterable[FourTuple]) -> None:
        """Let go what stands since an earlier agent and nobody claims, but for what ends by itself."""
        wanted = set(claimed)
        left = {each: seconds for each, seconds in self._hold.left().items() if each not in wanted}
        self._expiring = {each for each, seconds in left.items() if seconds <= LONGEST}
        self._hold.remove([each for each in left if each not in self._expiring])

    def claim(self, batch: bytes, tuples: Iterable[FourTuple]) -> None:
        """From now on these are this batch's."""
        claimed = dict.fromkeys(tuples, batch)
        self._batches.update(claimed)
        self._expiring.difference_update(claimed)

    def hold(self, batch: bytes, tuples: Sequence[FourTuple], *, outgoing: bool = True) -> None:
        """Hold these for the batch, from both sides or only what arrives."""
        self._hold.add(tuples, outgoing=outgoing)
        self.claim(batch, tuples)

    def rehold(self, batch: bytes, tuples: Sequence[FourTuple]) -> None:
        """Hold those that are not held."""
        held = self._hold.tuples
        self._hold.add([each for each in tuples if not held.get(each)], outgoing=True)
        self.claim(batch, tuples)

    def open(self, batch: bytes, tuples: Sequence[FourTuple]) -> None:
        """What departs may leave from now on."""
        held = self._hold.tuples
        self._hold.add([each for each in self._mine(batch, tuples) if held.get(each)], outgoing=False)

    def expire(self, batch: bytes, tuples: Sequence[FourTuple], seconds: float) -> None:
        """The kernel ends this hold after that time, `LONGEST` at most, whatever becomes of the agent."""
        self._hold.add(self._mine(batch, tuples), timeout=seconds)

    def keep(self, packets: Iterable[bytes]) -> None:
        """Keep these too: another host's hold has kept them."""
        self._hold.keep(packets)
        self._hold.arrived()  # they may be for a batch that sends on

    def replay(self, batch: bytes, tuples: Sequence[FourTuple]) -> int:
        """Give what is kept to the sockets, but for those that another batch has: it sends that on, or lets it wait."""
        return self._hold.replay([each for each in tuples if self._batches.get(each, batch) == batch])

    def take(self, batch: bytes, tuples: Sequence[FourTuple]) -> tuple[bytes, ...]:
        """What has arrived for those of them that are the batch's."""
        taken = self._hold.take(self._mine(batch, tuples))
        return tuple(packet for packets in taken.values() for packet in packets)

    def lift(self, batch: bytes, tuples: Sequence[FourTuple]) -> None:
        """Replay and let go those of them that are the batch's."""
        mine = self._mine(batch, tuples)
        held = self._hold.tuples
        gone = [each for each in mine if each in held]
        try:
            self._hold.remove(gone)
        except HostError as error:  # nothing reaches sockets here: rather repeated by the peer than held for ever
            _log.warning("replay failed", why=str(error))
            self._hold.drop(gone)
        for each in mine:
            del self._batches[each]

    def drop(self, batch: bytes, tuples: Sequence[FourTuple]) -> None:
        """Let go without replay those of them that are the batch's."""
        mine = self._mine(batch, tuples)
        held = self._hold.tuples
        self._hold.drop([each for each in mine if each in held])
        for each in mine:
            del self._batches[each]

    def _mine(self, batch: bytes, tuples: Sequence[FourTuple]) -> list[FourTuple]:
        return [each for each in tuples if self._batches.get(each) == batch]


class FromAnotherThread:
    """A batch's hold for `quiet.rounds`, which waits in a thread of its own: each call is made in the engine's."""

    def __init__(self, engine: Engine, holds: Holds, batch: bytes) -> None:
        self._engine = engine
        self._holds = holds
        self._batch = batch

    def add(self, tuples: list[FourTuple], *, outgoing: bool = True) -> None:
        """See `Holds.hold`."""
        self._do(partial(self._holds.hold, self._batch, tuples, outgoing=outgoing))

    def remove(self, tuples: list[FourTuple]) -> None:
        """See `Holds.lift`."""
        self._do(partial(self._holds.lift, self._batch, tuples))

    def _do(self, call: Callable[[], None]) -> None:
        done = threading.Event()

        def work() -> None:
            try:
                call()
            finally:
                done.set()

        self._engine.call(work)
        done.wait()
