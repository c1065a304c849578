"""Whose turn it is among prepared batches."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrate.agent import turns
from migrate.agent.engine import Engine
from migrate.agent.outbound import Departure
from migrate.agent.turns import Turns
from migrate.fourtuple import FourTuple
from migrate.handoff.events import Event, Frozen, LinkLost, Start
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.machine import Times
from migrate.handoff.messages import Committed, Prepared
from migrate.handoff.source import SourceHandoff

PATIENCE = 60.0


class AtOnce:
    """A thread that has ended when it is started."""

    def __init__(self, *, target: Callable[[], None], **_: object) -> None:
        self.start = target


class Stage:
    """Batches that come for their turn, and an engine whose calls are made here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int = 2) -> None:
        self.now = 1000.0
        self.others = False  # somebody else has the address
        self.looked: list[int] = []
        self.prepared: list[Departure] = []
        self.ended: list[Departure] = []
        self._calls: deque[Callable[[], object]] = deque()
        self._numbers = itertools.count(1)
        self._may: dict[Departure, bool] = {}
        monkeypatch.setattr(turns, "others_at", self._look)
        monkeypatch.setattr(turns, "threading", SimpleNamespace(Thread=AtOnce))
        monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.turns = Turns(cast(Engine, self), most, self.prepared.append)

    def _look(self, leaving: set[FourTuple]) -> bool:
        self.looked.append(len(leaving))
        return self.others

    # ---- the engine

    def call(self, call: Callable[[], object]) -> None:
        self._calls.append(call)

    def give(self, batch: Departure, event: Event) -> None:
        batch.machine.receive(event)

    def resume(self, batch: Departure) -> None:
        if batch.machine.over:
            self.ended.append(batch)
            self.turns.over(batch)
        else:
            self._may[batch] = self.turns.come(batch)

    # ---- the play

    def batch(self, *, last: bool = False) -> Departure:
        """One that comes when it is prepared, which is now."""
        connections = (Connection(new_id(), 1, FourTuple(b"\x0a\0\0\1", 80, b"\x0a\0\0\2", next(self._numbers))),)
        machine = SourceHandoff(new_id(), "b", connections, times=Times(patience=PATIENCE))
        batch = Departure(machine, cast(Any, None), turns=self.turns, last=last)
        machine.receive(Start())
        machine.receive(Prepared(batch=machine.batch, journal="", refused={}))
        self.turns.begin(batch)
        self.resume(batch)
        return batch

    def play(self) -> Stage:
        """Carry out what is called."""
        while self._calls:
            self._calls.popleft()()
        return self

    def may(self, batch: Departure) -> bool:
        return self.play()._may[batch]

    def decided(self, batch: Departure, *, refused: bool = False) -> None:
        """The destination has it, or none of it."""
        machine = batch.machine
        connection = machine.connections[0]
        machine.receive(Frozen({connection.id: b""}, {}))
        machine.receive(Committed(batch=machine.batch, journal="", refused={connection.id: "no"} if refused else {}))
        if machine.over:
            self.turns.over(batch)
        else:
            self.turns.decided(batch)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_nobody_goes_before_it_is_opened_and_then_a_few(stage: Stage) -> None:
    batches = [stage.batch() for _ in range(4)]
    assert stage.prepared == batches
    assert not any(map(stage.may, batches))
    stage.turns.open()
    assert [*map(stage.may, batches)] == [True, True, False, False]
    stage.turns.over(batches[1])
    assert [*map(stage.may, batches)] == [True, True, True, False]
    assert batches[2].turn_at == stage.now
    stage.turns.over(batches[1])  # again does nothing
    assert not stage.may(batches[3])


def test_one_that_ended_while_it_waited_is_cleaned_up_at_once(stage: Stage) -> None:
    first, second, third = (stage.batch() for _ in range(3))
    stage.turns.open()
    third.machine.receive(LinkLost())
    stage.turns.look()
    assert stage.play().ended == [third]
    stage.turns.over(first)
    stage.turns.over(second)
    assert stage.turns.idle


def test_one_that_has_waited_too_long_is_withdrawn(stage: Stage) -> None:
    batches = [stage.batch() for _ in range(3)]
    stage.turns.open()
    stage.play()
    stage.now += PATIENCE / 2 + 1
    stage.turns.over(batches[0])
    stage.play()
    assert batches[2].withdrawn
    assert batches[2].machine.state.name == "STAYED"
    assert not batches[1].withdrawn


def test_the_last_goes_when_all_others_are_decided(stage: Stage) -> None:
    last, first, second = stage.batch(last=True), stage.batch(), stage.batch()
    stage.turns.open()
    assert [*map(stage.may, (first, second, last))] == [True, True, False]
    stage.play()
    assert stage.looked == [3], "what is on its way does not count"
    stage.decided(first)
    stage.turns.over(first)
    assert not stage.may(last), "the second may yet be refused"
    stage.decided(second)
    assert stage.may(last)
    assert not last.withdrawn


def test_the_last_does_not_block_who_came_later(stage: Stage) -> None:
    last, other = stage.batch(last=True), stage.batch()
    stage.turns.open()
    assert [*map(stage.may, (last, other))] == [False, True]


@pytest.mark.parametrize("why", ["somebody else", "refused", "in doubt"])
def test_the_last_is_withdrawn_if_its_address_stays(stage: Stage, why: str) -> None:
    stage.others = why == "somebody else"
    first, last = stage.batch(), stage.batch(last=True)
    stage.turns.open()
    assert stage.may(first)
    stage.play()
    if why == "in doubt":
        stage.turns.over(first)
    else:
        stage.decided(first, refused=why == "refused")
    stage.play()
    assert last.withdrawn
    assert last.machine.state.name == "STAYED"
