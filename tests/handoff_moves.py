"""What can happen in a world: every world that can come next, and whether it takes a fault or just time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from tests.handoff_effects import carry_out, ways
from tests.handoff_world import BATCH, DECIDED, SIDES, Violation, World

SENDING_ON = ("OFFERED", "DOUBT", "CLAIMING", "RELEASED", "LINGERING")
SLOW = (do.Check, do.Freeze, do.RestoreSilent, do.Claim)  # other events may come before they end


class Move(NamedTuple):
    """What happened, whether it needed no fault, and the world after it."""

    label: str
    free: bool
    world: World


def moves(world: World, *, stepwise: bool = False) -> Iterator[Move]:
    """Every move. Raises Violation if one leads to an event that a table does not have.

    Where no crash or failure can come in between, commands are carried out at once: nobody can tell the difference,
    because they meet the other side only in messages, slow commands and the registry. ``stepwise``: not even then.
    """
    for move in _moves(world):
        if not stepwise:
            _settle(move.world)
        yield move


def _settle(world: World) -> None:
    for side in SIDES:
        host = world.host(side)
        if getattr(world.faults, f"{side}_crashes") or getattr(world.faults, f"{side}_failures"):
            continue
        while host.up and host.steps and not isinstance(host.steps[0].commands[0], SLOW):
            carry_out(world, side, host.steps[0].commands[0])


def _moves(world: World) -> Iterator[Move]:
    for side in SIDES:
        yield from _commands(world, side)
        yield from _timer(world, side)
        yield from _life(world, side)
    yield from _network(world)
    yield from _segments(world)
    yield from _people(world)


def _commands(world: World, side: str) -> Iterator[Move]:
    host = world.host(side)
    if not host.up or not host.steps:
        return
    command = host.steps[0].commands[0]
    for label, fault, change in ways(side, command):
        if fault and not getattr(world.faults, fault):
            continue
        after = world.copy()
        if fault:
            after.spend(fault)
        change(after)
        yield Move(f"{side}: {type(command).__name__} {label}".rstrip(), not fault, after)


def _timer(world: World, side: str) -> Iterator[Move]:
    host = world.host(side)
    if not host.working or host.machine is None or host.timer != host.machine.serial:
        return
    quiet = not any(other.up and other.steps for other in (world.source, world.destination)) and not any(
        stream.to_destination or stream.to_source or stream.broken for stream in world.streams
    )
    if quiet or world.faults.early:
        after = world.copy()
        if not quiet:
            after.spend("early")
        after.host(side).timer = None
        after.give(side, on.Timeout(host.timer))
        yield Move(f"{side}: time-out", quiet, after)


def _life(world: World, side: str) -> Iterator[Move]:
    host = world.host(side)
    gone = world.dead == side
    if not host.up and (not gone or (world.spoken and world.faults.returns)):
        after = world.copy()
        if gone:
            after.spend("returns")
        after.restart(side)
        yield Move(f"{side}: restart", not gone, after)
    elif host.up and getattr(world.faults, f"{side}_crashes"):
        after = world.copy()
        after.spend(f"{side}_crashes")
        after.crash(side)
        yield Move(f"{side}: crash", False, after)


def _network(world: World) -> Iterator[Move]:
    for i, stream in enumerate(world.streams):
        if stream.to_destination and stream.destination_open:
            after = world.copy()
            after.replace(i, stream._replace(to_destination=stream.to_destination[1:]))
            after.destination.stream = stream.number
            after.deliver("destination", stream.to_destination[0])
            yield Move(f"destination: gets {type(stream.to_destination[0]).__name__}", True, after)
        if stream.to_source and stream.source_open:
            after = world.copy()
            after.replace(i, stream._replace(to_source=stream.to_source[1:]))
            after.deliver("source", stream.to_source[0])
            yield Move(f"source: gets {type(stream.to_source[0]).__name__}", True, after)
        if stream.broken and stream.source_open:
            after = world.copy()
            after.replace(i, stream._replace(source_open=False, to_source=()))
            after.source.stream = None
            after.give("source", on.LinkLost())
            yield Move("source: notices the cut", True, after)
        if stream.broken and stream.destination_open:
            after = world.copy()
            after.replace(i, stream._replace(destination_open=False, to_destination=()))
            if after.destination.stream == stream.number:
                after.give("destination", on.LinkLost())
            yield Move("destination: notices the cut", True, after)
        if not stream.broken and world.faults.cuts:
            after = world.copy()
            after.spend("cuts")
            after.replace(i, stream._replace(broken=True))
            yield Move("cut", False, after)


def _segments(world: World) -> Iterator[Move]:
    # The source's driver sends on what its hold keeps, from the offer on; no machine is asked.
    host = world.source
    machine = host.machine
    if not (world.faults.kept and host.up and machine is not None and host.held and host.stream is not None):
        return
    offering = any(isinstance(each, do.Send) for step in host.steps for each in step.commands)
    if machine.state.name in SENDING_ON and not (machine.state.name == "OFFERED" and offering):
        after = world.copy()
        after.spend("kept")
        after.send("source", say.Kept(batch=BATCH, kept=()))
        yield Move("source: sends on", False, after)


def _people(world: World) -> Iterator[Move]:
    if not world.started and world.source.up:
        after = world.copy()
        after.start()
        yield Move("start", True, after)
    if world.source.working and world.faults.cancels:
        after = world.copy()
        after.spend("cancels")
        after.give("source", on.Cancel())
        yield Move("the caller cancels", False, after)
    for i, there in enumerate(world.destination.sockets):
        if world.faults.closes and there == "r" and world.ids[i] not in world.destination.held:
            after = world.copy()
            after.spend("closes")
            after.destination.sockets = after.destination.sockets[:i] + "e" + after.destination.sockets[i + 1 :]
            yield Move("the peer closes", False, after)
    if not world.dead or world.host(world.dead).up:
        return
    # An operator knows that the other host is gone for good, and, where no registry does, what it had decided.
    row = world.destination.row
    decided = (row is not None and row.state in DECIDED) or "r" in world.destination.sockets
    side = "destination" if world.dead == "source" else "source"
    machine = world.host(side).machine
    state = machine.state.name if machine is not None else ""
    moved = {"RELEASED": True, "ACTIVE": True, "SETTLING": False} | ({} if world.registry else {"DOUBT": decided})
    if state in moved:
        after = world.copy()
        after.spoken = True
        after.give(side, on.Resolved(moved[state]))
        yield Move(f"the operator of the {side} resolves", True, after)


class Result(NamedTuple):
    """What an exploration came to: how many worlds there are, what is wrong in one of them and how it came to it."""

    worlds: int
    wrong: str = ""
    path: tuple[str, ...] = ()


def explore(world: World, *, stepwise: bool = False) -> Result:
    """Every world that can come of this one, breadth first, until one is wrong.

    Wrong is a Violation, a world from which no end can be reached without further faults, and that nothing ever moves.
    """
    numbers = {world.key(): 0}
    came: list[tuple[int, str]] = [(0, "")]
    before: list[list[int]] = [[]]
    ends = [0] if world.ended else []
    moved = False
    queue = deque([(0, world)])

    def path(number: int) -> tuple[str, ...]:
        labels = []
        while number:
            number, label = came[number]
            labels.append(label)
        return tuple(reversed(labels))

    while queue:
        number, here = queue.popleft()
        try:
            for label, free, after in moves(here, stepwise=stepwise):
                key = after.key()
                there = numbers.setdefault(key, len(numbers))
                if there == len(came):
                    came.append((number, label))
                    before.append([])
                    queue.append((there, after))
                    after.check()
                    if after.ended:
                        ends.append(there)
                        moved |= set(after.destination.sockets) == {"r"}
                if free:
                    before[there].append(number)
        except Violation as violation:
            return Result(len(numbers), str(violation), path(len(came) - 1))
    good = set(ends)
    while ends:
        new = set(before[ends.pop()]) - good
        good |= new
        ends.extend(new)
    for number in range(len(numbers)):
        if number not in good:
            return Result(len(numbers), "no end can be reached", path(number))
    return Result(len(numbers), "" if moved else "nothing moves")
