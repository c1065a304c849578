"""Histories with and without moves: the applications must not be able to tell which one they are in.

`scripts/soak` plays thousands of them; here are some, and every one that ever failed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.fix_netns import Lan
from tests.histories import Close, History, Lose, Move, Stage, histories

COUNT = int(os.environ.get("TCPMIG_HISTORIES", "40"))
SEED_IS_FIXED = "TCPMIG_HISTORIES" not in os.environ


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        net = Lan(("a", "b", "c", "d"))
        stack.callback(net.close)
        yield Stage(net, stack)


@pytest.mark.timeout(7200)
@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=SEED_IS_FIXED,
    database=None,
    phases=[Phase.explicit, Phase.generate] if SEED_IS_FIXED else list(Phase),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(history=histories)
@example(history=History("ipv4", (Close(1), Lose(0, 1), Close(0), Move(1), Move(0))))  # TIME_WAIT moves with its socket
def test_the_applications_cannot_tell(stage: Stage, history: History) -> None:
    assert stage.play(history) == stage.play(history, moving=False)
