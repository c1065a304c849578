"""One move: connections are chosen, cut into batches, and a few batches are under way at a time.

The fewer are under way, the shorter each stands still; the more, the better both hosts are kept busy. A batch's
blackout does not grow with the number of batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from migrate.agent.applications import Lender, by_application, lenders, loan_of
from migrate.agent.departure import BUSY, NOT_QUIET, Departure, Departures
from migrate.agent.rehearsal import rehearse
from migrate.agent.reports import Outcomes, Reporter, stayed
from migrate.agent.steering import FOREIGN, check_words, foreign
from migrate.agent.v1 import migration_pb2, types_pb2
from migrate.errors import Conflict, Error, HostError, NotFound, Refused, UsageError
from migrate.fourtuple import FourTuple, endpoint_text
from migrate.handoff.events import Cancel
from migrate.handoff.ids import new_id
from migrate.handoff.machine import Times
from migrate.handoff.source import SourceHandoff
from migrate.kernel.diag import Extension
from migrate.relocate import LocalMaps
from migrate.selection import Found, Selector, Takers, find
from migrate.tcpstate import TcpState

__all__ = ["Move", "Wish", "choose", "cut"]

BATCH = 96  # connections
BATCH_BYTES = 4 << 20  # of their queues
WINDOW = 3  # batches under way
_THOROUGH = 0.8  # of the time for quiet points: from then on it is looked longer, which holds connections for longer
PATIENCE = 30.0  # seconds until a batch that is not decided is reported as in doubt

# Microseconds, measured between two agents on one machine of two cores: for a batch, a connection, a byte.
FROZEN_BATCH, FROZEN_EACH, FROZEN_BYTE = 4000, 80, 0.01

_SERVED = frozenset(TcpState) - {TcpState.LISTEN, TcpState.CLOSED, TcpState.TIME_WAIT}  # by this host's address
_CLASH = Refused("it would become the same connection as another of this move", hint="map it to another port")
_PASSING = {TcpState.TIME_WAIT, TcpState.SYN_RECEIVED}


@dataclass(frozen=True)
class Wish:
    """What somebody wants moved. ``when_quiet`` in seconds; ``destinations`` are tried in their order.

    Raises UsageError for what does not go together, NotFound for a device that is not here.
    """

    selector: Selector
    destinations: Sequence[str]
    steer: str = ""
    when_quiet: float | None = None
    maps: LocalMaps = field(default_factory=LocalMaps)

    def __post_init__(self) -> None:
        check_words(self.steer)
        if self.steer == "follow" and not (self.selector.local and self.selector.local[0]):
            raise UsageError("which address has moved?", hint="select by it: --local ADDR")
        if self.maps and self.steer:
            raise UsageError(
                "steering brings the old local ends to the destination, and a map gives them up",
                hint="with a map, point whatever translates addresses to the new ones; leave steering out",
            )
        if self.maps and len(self.destinations) > 1:
            raise UsageError(
                "a map names an address of one host, and there are several destinations", hint="name one destination"
            )


class Move:
    """``report`` is called in the event loop with everything there is to say."""

    def __init__(self, departures: Departures, wish: Wish, report: Callable[[migration_pb2.MoveReport], None]) -> None:
        self.id = os.urandom(8).hex()
        self._departures = departures
        self._wish = wish
        self._reporter = Reporter(self.id, report, wish.maps.there)
        self._aborted = False
        self._loop = asyncio.get_running_loop()
        self._takers = Takers()
        self._lenders: dict[FourTuple, Lender] = {}
        self._under_way: set[Departure] = set()
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

        def cancel(batch: Departure) -> None:
            with contextlib.suppress(UsageError):  # it is over
                self._departures.host.engine.give(batch, Cancel())

        for batch in self._under_way:
            self._departures.host.engine.call(partial(cancel, batch))

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
                left = await self._to(destination, left, last=destination == self._wish.destinations[-1])
        except Error as error:
            problem = error
        finally:
            self._takers.close()
            self._over.set()
        return self._reporter.summary(problem)

    async def _stay_served(self, destination: str) -> None:
        """Their address is at the destination, or will be: until they are there too, they are forwarded to here."""
        host = self._departures.host
        living = await asyncio.to_thread(find, self._wish.selector._replace(states=_SERVED), owners=False)
        tuples = [each.connection.four_tuple for each in living]
        await host.engine.ask(lambda: host.carrier.also({each.local for each in tuples}))
        await host.forward(destination, tuples)

    async def _to(self, destination: str, found: Sequence[Found], *, last: bool) -> list[Found]:
        """Move these there; those that stayed, unless it is the last destination, may be tried elsewhere."""
        again: list[Found] = []
        deadline = time.monotonic() + (self._wish.when_quiet or 0)
        if self._wish.steer:
            self._departures.host.steerer.warm(self._wish.steer)
        for group in _by_address(found) if self._wish.steer.startswith("vip:") else [list(found)]:
            waiting = deque(self._cut(group))
            running: dict[asyncio.Task[list[Found]], None] = {}
            while waiting or running:
                while waiting and len(running) < WINDOW and not self._aborted:
                    final = len(waiting) == 1
                    if final and running and self._wish.steer.startswith("vip:"):
                        break  # who else has the address is known when the others have left
                    task = asyncio.create_task(self._batch(destination, waiting.popleft(), deadline, final, last))
                    running[task] = None
                if self._aborted and waiting:
                    self._leave([each for batch in waiting for each in batch], Refused("the move was stopped"))
                    waiting.clear()
                if not running:
                    break
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del running[task]
                    retry = task.result()
                    if retry and time.monotonic() < deadline:
                        waiting.extend(self._cut(retry))
                    elif retry and self._wish.when_quiet is not None:
                        self._leave(retry, Refused("it was never quiet", hint="give --when-quiet more seconds"))
                    else:
                        again += retry
                    self._reporter.progress(sum(len(each.machine.connections) for each in self._under_way))
        return again

    def _cut(self, found: Sequence[Found]) -> list[list[Found]]:
        """Batches, each of one application's connections, or of those that no application lends."""
        return [batch for group in by_application(found, self._lenders) for batch in cut(group)]

    async def _batch(
        self, destination: str, found: Sequence[Found], deadline: float, final: bool, last: bool
    ) -> list[Found]:
        """One batch, to its result; those to try again."""
        ended: asyncio.Future[tuple[str, Mapping[bytes, str]]] = self._loop.create_future()

        def report(batch: Departure, outcome: str, refused: Mapping[bytes, str]) -> None:
            def told() -> None:
                if not ended.done():
                    ended.set_result((outcome, refused))

            self._loop.call_soon_threadsafe(told)

        lent = found[0].connection.four_tuple in self._lenders  # its application says when
        quiet = None if self._wish.when_quiet is None or lent else max(0.05, deadline - time.monotonic())
        try:
            batch = await self._departures.host.engine.ask(
                lambda: self._start(destination, found, quiet, final, report)
            )
        except Error as error:
            self._leave(found, error)
            return []
        going = {connection.four_tuple for connection in batch.machine.connections}
        self._leave([each for each in found if each.connection.four_tuple not in going], Conflict(BUSY))
        self._under_way.add(batch)
        try:
            patience = PATIENCE + (quiet or 0)
            outcome, refused = await asyncio.wait_for(asyncio.shield(ended), patience)
        except TimeoutError:
            outcome, refused = "doubt", batch.machine.refused
        finally:
            self._under_way.discard(batch)
        return self._ended(batch, found, outcome, refused, last=last)

    def _start(
        self, destination: str, found: Sequence[Found], quiet: float | None, final: bool, report: Callable[..., None]
    ) -> Departure:
        # In the engine's thread.
        host = self._departures.host
        found = self._departures.free(found)
        if not found:
            raise Conflict(BUSY)
        steer = self._steering(destination, found, final)
        sockets, _ = self._takers.take({each.connection.four_tuple: each.owners for each in found})
        named = host.journal.name((each.connection.four_tuple, each.connection.cookie) for each in found)
        if self._wish.maps:
            named = tuple(msgspec.structs.replace(each, there=self._wish.maps.there(each.four_tuple)) for each in named)
        machine = SourceHandoff(
            new_id(),
            destination,
            named,
            steer=steer,
            registry=host.registry.identity if host.registry is not None else "",
            times=_times(host.times, quiet),
        )
        thorough = quiet is not None and quiet < _THOROUGH * (self._wish.when_quiet or 0)
        loan = loan_of(host.adopters, sockets, self._lenders)
        batch = Departure(
            machine, self._departures, sockets, when_quiet=quiet, thorough=thorough, loan=loan, report=report
        )
        self._departures.begin(batch)
        return batch

    def _steering(self, destination: str, found: Sequence[Found], final: bool) -> str:
        """An address can move only with all its connections; before that, and without that, each is forwarded."""
        words = self._wish.steer
        if not words.startswith("vip:"):
            return words
        going = {each.connection.four_tuple for each in found}
        local = {each.local for each in going}
        if final:
            others = [
                each
                for each in find(Selector(), owners=False)
                if each.connection.four_tuple.local in local
                and each.connection.four_tuple not in going
                and each.connection.state not in _PASSING
            ]
            if not others:
                return words
        try:
            odd = foreign(going, destination)
        except HostError:
            return ""
        if odd:
            raise Refused(f"its address does not leave with it, and {FOREIGN}", hint="name agents by its IP version")
        return "forward"

    def _ended(
        self, batch: Departure, found: Sequence[Found], outcome: str, refused: Mapping[bytes, str], *, last: bool
    ) -> list[Found]:
        destination = batch.machine.peer
        by_tuple = {each.connection.four_tuple: each for each in found}
        results: dict[FourTuple, tuple[int, Error | None]] = {}
        again: list[Found] = []
        for connection in batch.machine.connections:
            why = batch.left_out.get(connection.id) or refused.get(connection.id)
            if connection.id in batch.gone:
                results[connection.four_tuple] = types_pb2.OUTCOME_GONE, Refused(why or "it ended")
            elif why is None:
                one = types_pb2.OUTCOME_DONE if outcome == "moved" else types_pb2.OUTCOME_IN_DOUBT
                results[connection.four_tuple] = one, None
            elif (why == NOT_QUIET or not last) and not self._aborted:
                again.append(by_tuple[connection.four_tuple])
            else:
                results[connection.four_tuple] = types_pb2.OUTCOME_STAYED, Refused(self._because(why, destination))
        frozen = (batch.active_at - batch.frozen_at) // 1000 if outcome == "moved" else 0
        self._reporter.bytes += batch.record_bytes
        self._reporter.result(
            results, destination=destination, batch=batch.machine.batch, frozen_us=frozen, phases=batch.phases
        )
        return again

    def _because(self, why: str, destination: str) -> str:
        return why or f"agent {destination} did not take it"

    def _leave(self, found: Sequence[Found], why: Error) -> None:
        self._reporter.result(stayed([each.connection.four_tuple for each in found], why))


async def choose(selector: Selector) -> tuple[list[Found], dict[FourTuple, Error]]:
    """Those that can move, and why others cannot."""
    found = await asyncio.to_thread(find, selector, extensions=Extension.INFO)
    ours = os.getpid()  # the agents' own connections
    found = [each for each in found if all(owner.pid != ours for owner in each.owners) or not each.owners]
    if selector.empty:  # what ends or begins by itself, wherever its address is, stays out of the account
        found = [each for each in found if each.connection.state not in _PASSING]
        found = [each for each in found if not _loopback(each.connection.four_tuple.local)]
    obstacles = {each.connection.four_tuple: each.obstacle for each in found}
    refused = {each: why for each, why in obstacles.items() if why is not None}
    return [each for each in found if each.connection.four_tuple not in refused], refused


def _expected_frozen(found: Sequence[Found]) -> int:
    """Microseconds that a connection of these is expected to stand still: what is under way with it, moved at once."""
    batches = cut(found)[:WINDOW]
    size = sum(each.connection.send_queue + each.connection.recv_queue for batch in batches for each in batch)
    return round(FROZEN_BATCH + FROZEN_EACH * sum(map(len, batches)) + size * FROZEN_BYTE)


def _times(times: Times, quiet: float | None) -> Times:
    return times if quiet is None else msgspec.structs.replace(times, patience=times.patience + quiet)


def _loopback(address: bytes) -> bool:
    """Whether both ends of its connections are on this host."""
    return ipaddress.ip_address(address).is_loopback


def _by_address(found: Sequence[Found]) -> list[list[Found]]:
    groups: dict[bytes, list[Found]] = {}
    for each in found:
        groups.setdefault(each.connection.four_tuple.local, []).append(each)
    return list(groups.values())


def cut(found: Sequence[Found]) -> list[list[Found]]:
    """Batches of so many connections and so many bytes at most."""
    batches: list[list[Found]] = []
    size = BATCH_BYTES
    for each in found:
        length = each.connection.recv_queue + each.connection.send_queue
        if not batches or len(batches[-1]) >= BATCH or size + length > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(each)
        size += length
    return batches
