"""The handoff's world walked at random, with more faults than can be explored, and led to an end at last."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.handoff_moves import Move, moves
from tests.handoff_world import Faults, Violation, World

PATIENCE = 400  # moves to an end, once no more faults come


class Handoff(RuleBasedStateMachine):
    """Whatever comes next is thrown: time passes, or something goes wrong."""

    world = World(1, Faults(), shared=False)

    @initialize(
        connections=st.integers(1, 3),
        shared=st.booleans(),
        faults=st.lists(st.sampled_from(Faults._fields), min_size=2, max_size=5),
    )
    def begin(self, connections: int, shared: bool, faults: list[str]) -> None:
        # Few of many: with all at once, hardly a handoff comes to the point where it matters.
        self.world = World(connections, Faults(**Counter(faults)), shared=shared)

    @rule(dice=st.randoms(use_true_random=True), count=st.integers(1, 6))
    def time_passes(self, dice: Random, count: int) -> None:
        for _ in range(count):
            self.throw(dice, free=True)

    @rule(dice=st.randoms(use_true_random=True))
    def something_goes_wrong(self, dice: Random) -> None:
        self.throw(dice, free=False)

    def throw(self, dice: Random, *, free: bool) -> None:
        possible = [move for move in moves(self.world) if move.free == free]
        if possible:
            self.make(dice.choice(possible))

    def make(self, move: Move) -> None:
        note(move.label)
        self.world = move.world
        self.world.check()

    def teardown(self) -> None:
        for turn in range(PATIENCE):
            if self.world.ended and self.world.started:
                return
            possible = [move for move in moves(self.world) if move.free]
            self.make(possible[turn % len(possible)])
        raise Violation("it does not end")


TestHandoff = Handoff.TestCase
TestHandoff.settings = settings(
    max_examples=300,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the moves say enough; shrinking them takes minutes
)
