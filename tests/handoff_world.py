"""Two hosts, a network and a registry as a model: where a handoff stands, all of it.

A world is a value: it can be copied, compared by its `key`, and says whether it is as it must never be (`check`) and
whether it is well at its end (`ended`). Sockets are one letter a connection, in the order of ``ids``; holds, steering
and addresses are sets of ids. What can happen in it: handoff_moves.py; what commands do to it: handoff_effects.py.
"""

from __future__ import annotations

from typing import NamedTuple

from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.ids import Connection
from migrate.handoff.machine import Machine, Step, Times
from migrate.handoff.source import SourceHandoff

BATCH = b"batch"
TIMES = Times(asks=1)
SIDES = ("source", "destination")
DECIDED = ("COMMITTING", "ACTIVE")  # rows of the destination that are followed by no other end


LETTERS = {
    "r": "runs, at its owner",
    "f": "frozen",
    "s": "silent",
    "w": "silent, and its owner waits at the gate",
    "e": "ran, and came to its end",
    "-": "none",
}


class Violation(AssertionError):
    """The world is as it must never be."""


class Faults(NamedTuple):
    """How many of each may still happen."""

    source_crashes: int = 0
    destination_crashes: int = 0
    cuts: int = 0
    early: int = 0  # timers that run down while something is still under way
    cancels: int = 0
    source_failures: int = 0  # commands that cannot be carried out
    destination_failures: int = 0
    outages: int = 0  # of the registry, before or after it did what it was asked
    refusals: int = 0  # connections that cannot be taken, frozen or rebuilt
    closes: int = 0  # connections that end by themselves, after they were moved
    kept: int = 0  # segments that come to the source's hold, and are sent on
    returns: int = 0  # of a host that was gone for good, when an operator has spoken in its place


class Stream(NamedTuple):
    """Messages under way in both directions. A broken one loses what is sent, until both ends have noticed."""

    number: int
    to_destination: tuple[say.Message, ...] = ()
    to_source: tuple[say.Message, ...] = ()
    source_open: bool = True
    destination_open: bool = True
    broken: bool = False


class Host:
    """One side. The upper half is the agent's process and is gone with a crash, the lower half is not."""

    def __init__(self, sockets: str) -> None:
        self.crash()
        self.up = True
        self.row: do.Row | None = None
        self.records: frozenset[bytes] = frozenset()
        self.sockets = sockets  # see LETTERS
        self.held: frozenset[bytes] = frozenset()
        self.carried: frozenset[bytes] = frozenset()
        self.steered: frozenset[bytes] = frozenset()
        self.reports: frozenset[str] = frozenset()
        self.died = False
        self.others: frozenset[bytes] | None = None  # of the batch, if it came here and is over

    def crash(self) -> None:
        self.up = False
        self.died = True
        self.machine: Machine | None = None
        self.steps: tuple[Step, ...] = ()  # what is still to be carried out
        self.timer: int | None = None
        self.stream: int | None = None
        self.lost: frozenset[bytes] = frozenset()  # of a claim that is being made one by one

    def copy(self) -> Host:
        other = Host.__new__(Host)
        other.__dict__.update(self.__dict__)
        return other

    @property
    def working(self) -> bool:
        """It has a machine that something can still happen to."""
        return self.up and self.machine is not None and not self.machine.over

    def change(self, command: do.OnConnections, ids: tuple[bytes, ...], letters: dict[str, str]) -> None:
        """Change the letter of each connection of the command, old to new."""
        named = {connection.id for connection in command.connections}
        pairs = zip(ids, self.sockets, strict=True)
        self.sockets = "".join(letters.get(old, old) if id in named else old for id, old in pairs)

    def finish_command(self) -> None:
        """The first command of the first step is done with."""
        first = self.steps[0]
        rest = first._replace(commands=first.commands[1:])
        self.steps = ((rest,) if rest.commands else ()) + self.steps[1:]


class World:
    """Everything. ``dead``: the side that never comes back from a crash, if there is one."""

    def __init__(self, connections: int, faults: Faults, *, shared: bool, dead: str = "") -> None:
        self.ids = tuple(bytes([97 + i]) for i in range(connections))
        self.faults = faults
        self.registry = "registry" if shared else ""
        self.dead = dead
        self.source = Host("r" * connections)
        self.destination = Host("-" * connections)
        self.claims: tuple[tuple[bytes, str], ...] = ()
        self.streams: tuple[Stream, ...] = ()
        self.dialled = 0
        self.started = False
        self.spoken = False  # an operator has, in place of the dead side
        self.points: set[str] | None = None  # where the transitions' names are collected, if anywhere

    def copy(self) -> World:
        other = World.__new__(World)
        other.__dict__.update(self.__dict__)
        other.source, other.destination = self.source.copy(), self.destination.copy()
        return other

    def host(self, side: str) -> Host:
        return self.source if side == "source" else self.destination

    def spend(self, fault: str) -> None:
        self.faults = self.faults._replace(**{fault: getattr(self.faults, fault) - 1})

    # ---- what must hold

    def check(self) -> None:
        """Raises Violation."""
        decided = self.destination.row is not None and self.destination.row.state in DECIDED
        pairs = zip(self.ids, self.source.sockets, self.destination.sockets, strict=True)
        for id, here, there in pairs:
            if here == "r" and there == "r":
                raise Violation("two owners")
            if here == "-" and there not in "re" and not decided:
                raise Violation("no owner: the source let go, and the destination will not rebuild it")
            if here == "f" and id not in self.source.held:
                raise Violation("frozen without a hold: what arrives is lost")
            if here == "-" and id not in self.source.held | self.source.steered:
                raise Violation("the source's host would answer a segment with a reset")
            if there in "sw" and id not in self.destination.held:
                raise Violation("a silent socket without a hold")
            if id in self.destination.steered and there not in "re" and id not in self.destination.held:
                raise Violation("the destination's host would answer a segment with a reset")

    @property
    def ended(self) -> bool:
        """Every connection has one owner, the network delivers to it, and nothing is left over."""
        gone = self.dead and not self.host(self.dead).up
        for host in [self.host(side) for side in SIDES if not gone or side != self.dead]:
            left = host.row or host.held or host.steps or host.records or set(host.sockets) & set("fsw")
            if not host.up or host.working or left:
                return False
        if gone:
            return True
        pairs = set(zip(self.source.sockets, self.destination.sockets, strict=True))
        moved = frozenset(id for id, there in zip(self.ids, self.destination.sockets, strict=True) if there in "re")
        steered = self.source.steered == self.destination.steered == self.destination.carried == moved
        told = {"moved" if moved else "stayed"} if self.started else set()
        heard = self.source.reports == told or (self.source.died and self.source.reports <= told)
        unclaimed = self.spoken or not self.claims  # what binds one that comes back stays
        return pairs <= {("r", "-"), ("-", "r"), ("-", "e")} and unclaimed and steered and heard

    # ---- events

    def start(self) -> None:
        connections = tuple(Connection(id, 1, FourTuple(b"", 0, b"", 0)) for id in self.ids)
        self.source.machine = SourceHandoff(BATCH, "destination", connections, registry=self.registry, times=TIMES)
        self.started = True
        self.dial()
        self.give("source", on.Start())

    def restart(self, side: str) -> None:
        host = self.host(side)
        host.up = True
        if host.row is None:  # sweep what no row claims
            host.held = frozenset()
            host.carried &= host.steered
            return
        kind = SourceHandoff if side == "source" else DestinationHandoff
        host.machine = kind.recover(host.row, TIMES)
        self.give(side, on.Restarted())

    def crash(self, side: str) -> None:
        host = self.host(side)
        host.crash()
        if side == "source":
            streams = [s._replace(source_open=False, to_source=(), broken=True) for s in self.streams]
        else:
            streams = [s._replace(destination_open=False, to_destination=(), broken=True) for s in self.streams]
            host.sockets = host.sockets.replace("s", "-").replace("w", "-")  # closed in repair mode, or by the gate
        self.streams = tuple(s for s in streams if s.source_open or s.destination_open)

    def deliver(self, side: str, message: say.Message) -> None:
        host = self.host(side)
        if side == "destination" and (host.machine is None or (host.machine.over and not host.steps)):
            others = host.others if isinstance(message, say.Query) else None
            host.machine = DestinationHandoff(
                BATCH, "source", journal="journal", registry=self.registry, others=others, times=TIMES
            )
        self.give(side, message)

    def give(self, side: str, event: on.Event) -> None:
        """An event reaches a machine, if there is one that is not over. Raises Violation where no table has it."""
        host = self.host(side)
        if not host.working or host.machine is None:
            return
        machine = type(host.machine).__new__(type(host.machine))
        machine.__dict__.update(host.machine.__dict__)
        host.machine = machine
        try:
            step = machine.receive(event)
        except (RuntimeError, Error) as error:
            raise Violation(str(error)) from None
        if self.points is not None and step.point:
            self.points.add(step.point)
        if step.commands:
            host.steps = (*host.steps, step)

    # ---- streams

    def dial(self) -> None:
        if self.source.stream is None and self.destination.up:
            self.dialled += 1
            self.source.stream = self.dialled
            self.streams = (*self.streams, Stream(self.dialled))

    def send(self, side: str, message: say.Message) -> None:
        number = self.host(side).stream
        for i, stream in enumerate(self.streams):
            if stream.number == number and not stream.broken:
                if side == "source":
                    self.replace(i, stream._replace(to_destination=(*stream.to_destination, message)))
                else:
                    self.replace(i, stream._replace(to_source=(*stream.to_source, message)))
                return

    def replace(self, i: int, stream: Stream) -> None:
        streams = (*self.streams[:i], stream, *self.streams[i + 1 :])
        self.streams = tuple(s for s in streams if s.source_open or s.destination_open)

    # ---- what two worlds must share to be the same

    def key(self) -> tuple[object, ...]:
        first = self.streams[0].number if self.streams else 0
        streams = [
            (s.number - first, *map(_message_key, s.to_destination), ":", *map(_message_key, s.to_source), *s[3:])
            for s in self.streams
        ]
        hosts = _host_key(self.source, first), _host_key(self.destination, first)
        return (self.faults, self.claims, self.started, self.spoken, *hosts, *streams)


def _host_key(host: Host, first: int) -> tuple[object, ...]:
    machine = host.machine
    lasting = (
        host.up,
        None if host.stream is None else host.stream - first,
        _row_key(host.row),
        host.records,
        host.sockets,
        host.held,
        host.carried,
        host.steered,
        host.reports,
        host.died,
        host.others,
    )
    if machine is None:
        return lasting
    return (
        *lasting,
        machine.state.name,
        frozenset(machine.refused),
        machine.held,
        machine.shared,
        min(getattr(machine, "asked", 0), TIMES.asks),
        getattr(machine, "rebuilt", False),
        host.timer == machine.serial,
        host.lost,
        *((s.fallible, *(_command_key(command, machine) for command in s.commands)) for s in host.steps),
    )


def _command_key(command: do.Command, machine: Machine) -> tuple[object, ...]:
    name = type(command).__name__
    match command:
        case do.WriteJournal(row=row):
            return (name, _row_key(row))
        case do.Send(message=message) | do.Ask(message=message):
            return (name, _message_key(message))
        case do.StartTimer(serial=serial):
            return (name, serial == machine.serial)
        case do.OnConnections(connections=connections):
            return (name, len(connections), connections[0].id)
    return (name,)


def _message_key(message: say.Message) -> tuple[object, ...]:
    refused = frozenset(getattr(message, "refused", ()))
    connections = frozenset(c.id for c in getattr(message, "connections", ()))
    return (type(message).__name__, refused, connections)


def _row_key(row: do.Row | None) -> tuple[object, ...]:
    return () if row is None else (row.state, frozenset(row.refused), row.shared)
