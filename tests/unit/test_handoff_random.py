"""The handoff's world walked at random, with more faults than can be explored, and led to an end at last."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.handoff_moves import moves
from tests.handoff_world import Faults, World

PATIENCE = 400  # moves to an end, once no more faults come


class Handoff(RuleBasedStateMachine):
    """Whatever comes next is drawn, one move at a time."""

    world = World(1, Faults(), shared=False)

    @initialize(
        connections=st.integers(1, 3),
        shared=st.booleans(),
        faults=st.builds(Faults, *[st.integers(0, 3)] * len(Faults._fields)),
    )
    def begin(self, connections: int, shared: bool, faults: Faults) -> None:
        self.world = World(connections, faults, shared=shared)

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        possible = list(moves(self.world))
        if possible:
            chosen = possible[data.draw(st.integers(0, len(possible) - 1), "choice")]
            self.world = chosen.world

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        world = self.world
        for turn in range(PATIENCE):
            if world.ended and world.started:
                return
            possible = [move for move in moves(world) if move.free]
            world = possible[turn % len(possible)].world
            world.check()
        raise AssertionError("it does not end")


TestHandoff = Handoff.TestCase
TestHandoff.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
