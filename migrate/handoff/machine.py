"""How a table becomes a machine. No I/O, no clock, no threads: events in, commands out.

A machine is walked by one literal table: state, then what happened, then the new state and the kinds of commands. A
message class among the kinds means: send it. An event that the table does not have raises and changes nothing. Fields
are replaced, never changed in place, so that a shallow copy of a machine is a machine of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import msgspec

from migrate.errors import RemoteError, UsageError
from migrate.handoff import commands as do
from migrate.handoff.events import Cancel, Event, Failed, Resolved, Timeout
from migrate.handoff.ids import Connection
from migrate.handoff.messages import Answer, Message

__all__ = ["DEFAULT_TIMES", "Builders", "Kind", "Machine", "Step", "Table", "Times", "crash_points"]

Kind = type[do.Command] | type[Message]
Table = Mapping[Any, Mapping[Any, tuple[Any, tuple[Kind, ...]]]]
Builders = Mapping[Kind, Callable[[Any, Any], do.Command]]


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds."""

    prepare: float = 10.0  # for Prepared
    patience: float = 60.0  # at the destination, for the Offer: waiting for a quiet point is part of it
    answer: float = 5.0  # for Committed or Discarded
    ask: float = 1.0  # between two questions
    asks: int = 5  # questions to the other side before the registry is asked, if there is a shared one
    linger: float = 1.0  # after the release, for segments that still reach the source


DEFAULT_TIMES = Times()


class Step(NamedTuple):
    """One transition: ``point`` names it ("source:OFFERED:COMMITTED"; "" for an event that was ignored).

    ``fallible``: if one of the FALLIBLE commands fails, the rest of the step must not be carried out.
    """

    point: str
    commands: tuple[do.Command, ...]
    fallible: bool = False

    def points(self) -> Iterator[tuple[str, do.Command]]:
        """Each command with the crash point that lies before it. After the last lies ``point``."""
        for command in self.commands:
            kind = type(command.message if isinstance(command, do.Send) else command)
            yield f"{self.point}:{kind.__name__}", command


class Machine:
    """What both sides share."""

    role: ClassVar[str]
    TRANSITIONS: ClassVar[Table]
    BUILDERS: ClassVar[Builders]

    def __init__(self, batch: bytes, peer: str, *, times: Times) -> None:
        self.batch = batch
        self.peer = peer
        self.times = times
        self.state: enum.Enum = next(iter(self.TRANSITIONS))
        self.connections: tuple[Connection, ...] = ()
        self.refused: Mapping[bytes, str] = {}
        self.steer = ""
        self.shared = False
        self.journal = ""
        self.held: frozenset[bytes] = frozenset()
        self.serial = 0

    @classmethod
    def recover(cls, row: do.Row, times: Times) -> Self:
        """The machine as its journal row knows it. Its first event is Restarted."""
        machine = cls(row.batch, row.peer, times=times)
        machine.state = next(state for state in cls.TRANSITIONS if state.name == row.state)
        machine.connections = row.connections
        machine.refused = row.refused
        machine.steer = row.steer
        machine.shared = row.shared
        machine.journal = row.journal
        machine.held = frozenset(connection.id for connection in row.connections)
        return machine

    @property
    def over(self) -> bool:
        """Nothing can happen any more: no event need be given to it, but its commands are still to be carried out."""
        return not self.TRANSITIONS[self.state]

    @property
    def may_fail(self) -> bool:
        """Whether Failed is expected here."""
        return any(on.name == "FAILED" for on in self.TRANSITIONS[self.state])

    @property
    def moving(self) -> tuple[Connection, ...]:
        """Those that are not refused."""
        return tuple(connection for connection in self.connections if connection.id not in self.refused)

    def row(self) -> do.Row:
        """What the journal keeps."""
        return do.Row(
            batch=self.batch,
            role=self.role,
            state=self.state.name,
            peer=self.peer,
            connections=self.connections,
            refused=self.refused,
            steer=self.steer,
            shared=self.shared,
            journal=self.journal,
        )

    def receive(self, event: Event) -> Step:
        """Make the transition. Raises for a pair that the table does not have, and then nothing has changed.

        RemoteError: a message that the other side must not send now. UsageError: a wish that cannot be had now.
        RuntimeError: whoever drives the machine is wrong.
        """
        if isinstance(event, Timeout) and event.serial != self.serial:
            return Step("", ())
        if isinstance(event, Answer) and self.journal and event.journal != self.journal:
            return Step("", ())
        if isinstance(event, Message):
            self._check(event)
        on = self._classify(event)
        try:
            state, kinds = self.TRANSITIONS[self.state][on]
        except KeyError:
            raise self._unexpected(event) from None
        point = f"{self.role}:{self.state.name}:{on.name}"
        self._absorb(event)
        if state is not self.state:
            self.serial += 1
            self.state = state
            self._entered(event)
        return Step(point, tuple(self._commands(kinds, event)), self.may_fail)

    def _check(self, message: Message) -> None:
        # Raises RemoteError for a message that contradicts itself or the batch.
        if message.batch != self.batch:
            raise RemoteError("the message is about another batch")

    def _classify(self, event: Event) -> enum.Enum:
        raise NotImplementedError

    def _absorb(self, event: Event) -> None:
        raise NotImplementedError

    def _entered(self, event: Event) -> None:
        raise NotImplementedError

    def _commands(self, kinds: tuple[Kind, ...], event: Event) -> Iterator[do.Command]:
        for kind in kinds:
            command = self.BUILDERS[kind](self, event)
            if not isinstance(command, do.OnConnections) or command.connections:
                yield command

    def _refuse(self, refused: Mapping[bytes, str]) -> None:
        known = {connection.id for connection in self.connections}
        self.refused = {**self.refused, **{id: why for id, why in refused.items() if id in known}}

    def _refuse_all(self, why: str) -> None:
        self._refuse({connection.id: why for connection in self.moving})

    def _all_refused(self, refused: Mapping[bytes, str]) -> bool:
        return all(connection.id in refused for connection in self.moving)

    def _chosen(self, ids: frozenset[bytes]) -> tuple[Connection, ...]:
        return tuple(connection for connection in self.connections if connection.id in ids)

    def _hold(self, event: Event) -> do.Command:
        self.held = frozenset(connection.id for connection in self.moving)
        return do.Hold(self.moving)

    def _not_moving(self) -> tuple[Connection, ...]:
        # Those that were held and are refused since. They are undone again by every step that says so: once is enough,
        # but nobody knows whether an earlier step got so far.
        return tuple(
            connection
            for connection in self.connections
            if connection.id in self.held and connection.id in self.refused
        )

    def _timer(self, seconds: float) -> do.Command:
        self.serial += 1
        return do.StartTimer(seconds, self.serial)

    def _forget(self, event: Event) -> do.Command:
        return do.Forget(self.connections, self.batch, frozenset(connection.id for connection in self.moving))

    def _unexpected(self, event: Event) -> Exception:
        what = f"{self.role} in state {self.state.name} does not expect {type(event).__name__}"
        if isinstance(event, Message):
            return RemoteError(f"the other agent broke the protocol: {what}")
        if isinstance(event, Cancel | Resolved):
            return UsageError(f"nothing to decide: {what}")
        reason = f": {event.reason}" if isinstance(event, Failed) else ""
        return RuntimeError(what + reason)


def crash_points(machine: type[Machine]) -> Iterator[str]:
    """Every place where a process can die between two effects, in the order of the table.

    "source:OFFERED:COMMITTED:Release": before that command; "source:OFFERED:COMMITTED": after the last.
    """
    for state, row in machine.TRANSITIONS.items():
        for on, (_, kinds) in row.items():
            point = f"{machine.role}:{state.name}:{on.name}"
            yield from (f"{point}:{kind.__name__}" for kind in kinds)
            yield point
