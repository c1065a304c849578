"""What a move says on its way: plans, progress, results, a summary; and the sums behind them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from migrate.agent.errors import to_problem
from migrate.agent.v1 import migration_pb2 as pb
from migrate.agent.v1 import types_pb2
from migrate.errors import Error
from migrate.fourtuple import FourTuple, endpoint_text

__all__ = ["Outcomes", "Reporter", "results_of", "stayed"]

_PLAN = 1000  # connections in one plan of a dry run

Outcomes = Mapping[FourTuple, tuple[int, Error | None]]
"""What became of each connection: an Outcome of types.proto, and why."""


class Reporter:
    """The voice of one move; ``say`` is given each report.

    ``there`` is what a connection is called at the destination, None if as it is called here.
    """

    def __init__(
        self, move_id: str, say: Callable[[pb.MoveReport], None], there: Callable[[FourTuple], FourTuple | None]
    ) -> None:
        self._id = move_id
        self._say = say
        self._there = there
        self._began = time.monotonic_ns()
        self._counts: Counter[int] = Counter()
        self._frozen_us: list[int] = []
        self.selected = 0
        self.bytes = 0  # of records

    @property
    def done(self) -> int:
        """Connections that moved."""
        return self._counts[types_pb2.OUTCOME_DONE]

    @property
    def stayed(self) -> int:
        """Connections that did not."""
        return self._counts[types_pb2.OUTCOME_STAYED]

    def plan(self, selected: int, movable: int) -> None:
        """What is going to happen."""
        self.selected = selected
        self._say(pb.MoveReport(plan=pb.Plan(move_id=self._id, selected=selected, movable=movable)))

    def expect(self, said: Mapping[str, Outcomes], frozen_us: int) -> None:
        """What would happen, by destination; ``frozen_us`` is how long a connection would stand still."""
        self.selected = sum(map(len, said.values()))
        movable = sum(outcome == types_pb2.OUTCOME_DONE for each in said.values() for outcome, _ in each.values())
        for destination, outcomes in said.items():
            for part in _parts(outcomes):
                plan = pb.Plan(
                    move_id=self._id,
                    selected=self.selected,
                    movable=movable,
                    expected=self._results(part, 0),
                    destination=destination,
                    expected_frozen_us=frozen_us,
                )
                self._say(pb.MoveReport(plan=plan))

    def progress(self, in_flight: int) -> None:
        """How far it is; ``in_flight`` connections are under way."""
        progress = pb.Progress(
            move_id=self._id,
            selected=self.selected,
            done=self.done,
            failed=self._counts.total() - self.done,
            in_flight=in_flight,
            bytes=self.bytes,
            elapsed_ns=time.monotonic_ns() - self._began,
        )
        self._say(pb.MoveReport(progress=progress))

    def result(
        self,
        outcomes: Outcomes,
        *,
        destination: str = "",
        batch: bytes = b"",
        frozen_us: int = 0,
        phases: Iterable[tuple[str, int, int]] = (),
    ) -> None:
        """What became of these; ``phases`` are name, begin and length in nanoseconds at the source."""
        if not outcomes:
            return
        results = self._results(outcomes, frozen_us)
        for phase, start, length in phases:
            results.timings.add(
                phase=types_pb2.Phase.Value(f"PHASE_{phase.upper()}"),
                side=types_pb2.SIDE_SOURCE,
                start_ns=start,
                duration_ns=length,
            )
        self._counts.update(outcome for outcome, _ in outcomes.values())
        self._frozen_us += [each for each in results.frozen_us if each]
        said = pb.BatchResult(move_id=self._id, batch=batch.hex(), destination=destination, results=results)
        self._say(pb.MoveReport(batch=said))

    def summary(self, problem: Error | None = None) -> pb.Summary:
        """The end."""
        frozen = sorted(self._frozen_us) or [0]
        summary = pb.Summary(
            move_id=self._id,
            selected=self.selected,
            done=self.done,
            stayed=self.stayed,
            gone=self._counts[types_pb2.OUTCOME_GONE],
            in_doubt=self._counts[types_pb2.OUTCOME_IN_DOUBT],
            bytes=self.bytes,
            elapsed_ns=time.monotonic_ns() - self._began,
            frozen_p50_us=frozen[len(frozen) // 2],
            frozen_p99_us=frozen[len(frozen) * 99 // 100],
            frozen_max_us=frozen[-1],
            problem=None if problem is None else to_problem(problem),
        )
        self._say(pb.MoveReport(summary=summary))
        return summary

    def _results(self, outcomes: Outcomes, frozen_us: int) -> types_pb2.Results:
        results = results_of(outcomes, frozen_us)
        moved_to = [self._moved_to(each, outcome) for each, (outcome, _) in outcomes.items()]
        if any(moved_to):
            results.moved_to.extend(moved_to)
        return results

    def _moved_to(self, each: FourTuple, outcome: int) -> str:
        there = self._there(each) if outcome == types_pb2.OUTCOME_DONE else None
        return "" if there is None else endpoint_text((there.local, there.local_port))


def stayed(tuples: Iterable[FourTuple], why: Error) -> Outcomes:
    """All of these stay, for one reason."""
    return dict.fromkeys(tuples, (types_pb2.OUTCOME_STAYED, why))


def results_of(outcomes: Outcomes, frozen_us: int) -> types_pb2.Results:
    """As a message; ``frozen_us`` is how long those that are done stood still, microseconds."""
    failures: dict[str, types_pb2.Failure] = {}
    for position, (_, why) in enumerate(outcomes.values()):
        if why is not None:
            failure = failures.setdefault(str(why), types_pb2.Failure(problem=to_problem(why)))
            failure.positions.append(position)
    numbers: Sequence[int] = [outcome for outcome, _ in outcomes.values()]
    return types_pb2.Results(
        connections=[str(each) for each in outcomes],
        outcomes=cast(Any, numbers),
        frozen_us=[frozen_us if number == types_pb2.OUTCOME_DONE else 0 for number in numbers],
        failures=list(failures.values()),
    )


def _parts(outcomes: Outcomes) -> Iterator[Outcomes]:
    """A long list in several plans; an empty one in one."""
    items = list(outcomes.items())
    for start in range(0, max(1, len(items)), _PLAN):
        yield dict(items[start : start + _PLAN])
