"""Scripts for one machine: an event in, the state it leads to, the commands that come out."""

from __future__ import annotations

from typing import Self

from migrate.fourtuple import FourTuple
from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.ids import Connection
from migrate.handoff.machine import Kind, Machine

A, B, C = (Connection(bytes([65 + i]) * 16, 3, FourTuple(b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 1024 + i)) for i in range(3))
BATCH = b"batch"


class Play:
    """A machine on the stage. ``last``: the commands of the latest step."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.last: tuple[do.Command, ...] = ()

    def gets(self, event: on.Event, state: str, *expected: Kind | do.Command) -> Self:
        """The event comes; then the machine is in that state and wants that done: kinds, or commands in full.

        A message class stands for sending one.
        """
        before = self.machine.state.name
        step = self.machine.receive(event)
        self.last = step.commands
        seen = [_kind(command) for command in step.commands]
        wanted = [each if isinstance(each, type) else _kind(each) for each in expected]
        assert (self.machine.state.name, seen) == (state, wanted)
        for command, each in zip(step.commands, expected, strict=True):
            assert isinstance(each, type) or command == each
        assert step.point.startswith(f"{self.machine.role}:{before}:")
        assert [point for point, _ in step.points()] == [f"{step.point}:{kind.__name__}" for kind in seen]
        return self

    def time_out(self, state: str, *expected: Kind | do.Command) -> Self:
        """The timer runs down that was started last."""
        return self.gets(on.Timeout(self.machine.serial), state, *expected)

    def said(self) -> say.Message:
        """The one message of the latest step."""
        (message,) = [command.message for command in self.last if isinstance(command, do.Send | do.Ask)]
        return message

    def wants(self, kind: type[do.Command]) -> do.Command:
        """The one command of that kind in the latest step."""
        (command,) = [command for command in self.last if isinstance(command, kind)]
        return command


def _kind(command: do.Command) -> Kind:
    return type(command.message) if isinstance(command, do.Send) else type(command)
