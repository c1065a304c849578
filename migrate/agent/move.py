"""One move: connections are chosen, and go to one destination after another, until none is left of either."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Callable, Sequence

from migrate.agent.applications import Lender, lenders
from migrate.agent.departure import Departures
from migrate.agent.passage import WINDOW, Passage, cut
from migrate.agent.rehearsal import rehearse
from migrate.agent.reports import Outcomes, Reporter
from migrate.agent.v1 import migration_pb2, types_pb2
from migrate.agent.whereabouts import PASSING
from migrate.agent.wish import Wish
from migrate.errors import Error, NotFound, Refused
from migrate.fourtuple import FourTuple, endpoint_text
from migrate.kernel.diag import Extension
from migrate.selection import Found, Selector, Takers, find
from migrate.tcpstate import TcpState

__all__ = ["Move", "choose"]

# Microseconds, measured between two agents on one machine of two cores: for a batch, a connection, a byte.
FROZEN_BATCH, FROZEN_EACH, FROZEN_BYTE = 4000, 80, 0.01

_SERVED = frozenset(TcpState) - {TcpState.LISTEN, TcpState.CLOSED, TcpState.TIME_WAIT}  # by this host's address
_CLASH = Refused("it would become the same connection as another of this move", hint="map it to another port")


class Move:
    """``report`` is called in the event loop with everything there is to say."""

    def __init__(self, departures: Departures, wish: Wish, report: Callable[[migration_pb2.MoveReport], None]) -> None:
        self.id = os.urandom(8).hex()
        self._departures = departures
        self._wish = wish
        self._reporter = Reporter(self.id, report, wish.maps.there)
        self._aborted = False
        self._takers = Takers()
        self._lenders: dict[FourTuple, Lender] = {}
        self._passage: Passage | None = None
        self._over = asyncio.Event()

    async def plan(self) -> tuple[list[Found], dict[FourTuple, Error]]:
        """What would be tried, and what not and why. Raises UsageError for a map that is about nothing."""
        found, refused = await choose(self._wish.selector)
        if self._wish.selector.empty:  # nor is a link of this agent's that is just closing
            refused = {
                each: why
                for each, why in refused.items()
                if endpoint_text((each.remote, each.remote_port)) not in self._wish.destinations
            }
        names = [*(each.connection.four_tuple for each in found), *refused]
        if names and (maps := self._wish.maps):
            maps.check_used(names)
            refused |= dict.fromkeys(maps.clashes(each for each in names if each not in refused), _CLASH)
        self._lenders, unknown = await asyncio.to_thread(lenders, self._departures.host.adopters, found)
        refused = unknown | refused
        return [each for each in found if each.connection.four_tuple not in refused], refused

    def abort(self) -> None:
        """Start nothing more; what is not offered stays."""
        self._aborted = True
        if self._passage is not None:
            self._passage.abort()

    async def ended(self) -> tuple[int, int]:
        """Wait for the end: how many stayed, how many moved."""
        await self._over.wait()
        return self._reporter.stayed, self._reporter.done

    async def dry_run(self) -> None:
        """Only say what would move; the destinations are asked."""
        try:
            movable, refused = await self.plan()
        except Error as error:
            self._reporter.summary(error)
            return
        sockets = [(each.connection.four_tuple, each.connection.cookie) for each in movable]
        wish = self._wish
        said, problem = await rehearse(self._departures.host, sockets, wish.destinations, wish.steer, wish.maps)
        here: Outcomes = {each: (types_pb2.OUTCOME_STAYED, why) for each, why in refused.items()}
        self._reporter.expect({"": here} | said, _expected_frozen(movable))
        self._reporter.summary(problem)

    async def run(self) -> migration_pb2.Summary:
        """The whole move; never raises Error, but reports it."""
        problem: Error | None = None
        try:
            if self._wish.steer == "follow":
                await self._stay_served(self._wish.destinations[0])
            movable, refused = await self.plan()
            self._reporter.plan(len(movable) + len(refused), len(movable))
            if not (movable or refused) and not self._wish.selector.empty:
                raise NotFound("no connection here matches", hint="tcpmig list shows them")
            self._reporter.result({each: (types_pb2.OUTCOME_STAYED, why) for each, why in refused.items()})
            left = movable
            for destination in self._wish.destinations:
                self._passage = self._to(destination)
                left = await self._passage.run(left)
        except Error as error:
            problem = error
        finally:
            self._takers.close()
            self._over.set()
        return self._reporter.summary(problem)

    def _to(self, destination: str) -> Passage:
        final = destination == self._wish.destinations[-1]
        passage = Passage(
            self._departures,
            self._wish,
            destination,
            self._reporter,
            takers=self._takers,
            lenders=self._lenders,
            final=final,
        )
        if self._aborted:
            passage.abort()
        return passage

    async def _stay_served(self, destination: str) -> None:
        """Their address is at the destination, or will be: until they are there too, they are forwarded to here."""
        host = self._departures.host
        living = await asyncio.to_thread(find, self._wish.selector._replace(states=_SERVED), owners=False)
        tuples = [each.connection.four_tuple for each in living]
        await host.engine.ask(lambda: host.carrier.also({each.local for each in tuples}))
        await host.forward(destination, tuples)


async def choose(selector: Selector) -> tuple[list[Found], dict[FourTuple, Error]]:
    """Those that can move, and why others cannot."""
    found = await asyncio.to_thread(find, selector, extensions=Extension.INFO)
    found = [each for each in map(_of_others, found) if each is not None]
    if selector.empty:  # what ends or begins by itself, wherever its address is, stays out of the account
        found = [each for each in found if each.connection.state not in PASSING]
        found = [each for each in found if not _loopback(each.connection.four_tuple.local)]
    obstacles = {each.connection.four_tuple: each.obstacle for each in found}
    refused = {each: why for each, why in obstacles.items() if why is not None}
    return [each for each in found if each.connection.four_tuple not in refused], refused


def _of_others(found: Found) -> Found | None:
    """Without this agent among its owners, which has a descriptor of what it moves; None if it is the agent's alone."""
    others = [owner for owner in found.owners if owner.pid != os.getpid()]
    return found._replace(owners=others) if others or not found.owners else None


def _expected_frozen(found: Sequence[Found]) -> int:
    """Microseconds that a connection of these is expected to stand still: what is under way with it, moved at once."""
    batches = cut(found)[:WINDOW]
    size = sum(each.connection.send_queue + each.connection.recv_queue for batch in batches for each in batch)
    return round(FROZEN_BATCH + FROZEN_EACH * sum(map(len, batches)) + size * FROZEN_BYTE)


def _loopback(address: bytes) -> bool:
    """Whether both ends of its connections are on this host."""
    return ipaddress.ip_address(address).is_loopback
