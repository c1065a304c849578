"""What commands do to a world: docs/handoff.md once more, as simply as it can be said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from migrate.handoff import commands as do
from migrate.handoff import events as on
from migrate.handoff import messages as say
from migrate.handoff.machine import Step
from tests.handoff_world import Violation, World

Change = Callable[[World], None]
Way = tuple[str, str, Change]  # label, the fault that it takes or "", and what it changes


def ways(side: str, command: do.Command) -> Iterator[Way]:
    """How a command can end."""
    match command:
        case do.Claim(shared=True):
            yield "", "", lambda world: _claim(world, side, command)
            yield "unheard", "outages", lambda world: _claim_fails(world, side, command, done=True)
            yield "undone", "outages", lambda world: _claim_fails(world, side, command, done=False)
        case do.Check() | do.Freeze() | do.RestoreSilent():
            yield "", "", lambda world: _examine(world, side, command, b"")
            for connection in command.connections:
                yield f"refuses {connection.id!r}", "refusals", _refusing(side, command, connection.id)
        case _:
            yield "", "", lambda world: carry_out(world, side, command)
    if isinstance(command, do.FALLIBLE):
        yield "fails", f"{side}_failures", lambda world: _fail(world, side)
    if isinstance(command, do.OnConnections) and len(command.connections) > 1 and type(command) in _EFFECTS:
        # Half of it is done when the process dies.
        yield "half, crash", f"{side}_crashes", lambda world: _half(world, side, command)


def carry_out(world: World, side: str, command: do.Command) -> None:
    """To its end, as it should be."""
    world.host(side).finish_command()
    if isinstance(command, do.Claim):
        world.give(side, on.Claimed(frozenset()))
    else:
        _EFFECTS[type(command)](world, side, command)


def _half(world: World, side: str, command: do.OnConnections) -> None:
    fields = [getattr(command, name) for name in command.__struct_fields__[1:]]
    _EFFECTS[type(command)](world, side, type(command)(command.connections[:1], *fields))
    world.crash(side)


def _fail(world: World, side: str) -> None:
    host = world.host(side)
    if not host.steps[0].fallible:
        host.finish_command()
        return
    host.steps = host.steps[1:]
    if host.machine is not None and host.machine.may_fail:
        world.give(side, on.Failed("it failed"))


# ---- those that have a result


def _refusing(side: str, command: do.Check | do.Freeze | do.RestoreSilent, id: bytes) -> Change:
    return lambda world: _examine(world, side, command, id)


def _examine(world: World, side: str, command: do.Check | do.Freeze | do.RestoreSilent, refused: bytes) -> None:
    host = world.host(side)
    host.finish_command()
    why = {refused: "refused"} if refused else {}
    taken = do.OnConnections(tuple(c for c in command.connections if c.id != refused))
    match command:
        case do.Check():
            world.give(side, on.Checked(why))
        case do.Freeze():
            host.change(taken, world.ids, {"r": "f"})
            world.give(side, on.Frozen({c.id: b"record" for c in taken.connections}, why))
        case do.RestoreSilent():
            host.change(taken, world.ids, {"-": "s"})
            world.give(side, on.Restored(why))


def _claim(world: World, side: str, command: do.Claim) -> None:
    # One connection at a time: a registry need not decide a batch as a whole.
    host = world.host(side)
    owners = dict(world.claims)
    id = command.connections[0].id
    if owners.setdefault(id, side) != side:
        host.lost |= {id}
    world.claims = tuple(sorted(owners.items()))
    host.finish_command()
    if len(command.connections) > 1:
        host.steps = (Step("", (do.Claim(command.connections[1:], True),)), *host.steps)
        return
    lost, host.lost = host.lost, frozenset()
    world.give(side, on.Claimed(lost))


def _claim_fails(world: World, side: str, command: do.Claim, *, done: bool) -> None:
    host = world.host(side)
    if done:
        world.claims = tuple(sorted({command.connections[0].id: side, **dict(world.claims)}.items()))
    host.lost = frozenset()
    host.finish_command()
    world.give(side, on.RegistryFailed())


# ---- those that have none


def _ids(command: do.OnConnections) -> frozenset[bytes]:
    return frozenset(connection.id for connection in command.connections)


def _write_journal(world: World, side: str, command: do.WriteJournal) -> None:
    host = world.host(side)
    host.row = command.row
    if command.records is not None:
        host.records = frozenset(command.records)
    elif command.row.state == "ACTIVE":
        host.records = frozenset()


def _forget(world: World, side: str, command: do.Forget) -> None:
    host = world.host(side)
    host.row = None
    host.records = frozenset()
    if command.moved:
        host.others = _ids(command) - command.moved


def _hold(world: World, side: str, command: do.OnConnections) -> None:
    world.host(side).held |= _ids(command)


def _lift_hold(world: World, side: str, command: do.OnConnections) -> None:
    world.host(side).held -= _ids(command)


def _thaw(world: World, side: str, command: do.Thaw) -> None:
    world.source.change(command, world.ids, {"f": "r"})
    world.source.held -= _ids(command)


def _discard(world: World, side: str, command: do.Discard) -> None:
    world.destination.change(command, world.ids, {"s": "-", "w": "-"})
    world.destination.held -= _ids(command)
    world.destination.carried -= _ids(command)


def _rebuild(world: World, side: str, command: do.Rebuild) -> None:
    if not _ids(command) <= world.destination.records:
        raise Violation("a committed connection cannot be rebuilt: no record")
    if any(
        there == "e" and id in _ids(command) for id, there in zip(world.ids, world.destination.sockets, strict=True)
    ):
        raise Violation("a connection that came to its end is rebuilt")
    world.destination.change(command, world.ids, {"-": "s"})


def _send_kept(world: World, side: str, command: do.SendKept) -> None:
    if command.dial:
        world.dial()
    world.send(side, say.Released(batch=command.batch))


def _ask(world: World, side: str, command: do.Ask) -> None:
    world.dial()
    world.send(side, command.message)


def _start_timer(world: World, side: str, command: do.StartTimer) -> None:
    world.host(side).timer = command.serial


def _steer(world: World, side: str, command: do.Steer) -> None:
    world.host(side).steered |= _ids(command)


def _report(world: World, side: str, command: do.Report) -> None:
    world.host(side).reports |= {command.outcome}


def _unclaim(world: World, side: str, command: do.Unclaim) -> None:
    world.claims = tuple(claim for claim in world.claims if claim[0] not in _ids(command))


def _carry(world: World, side: str, command: do.Carry) -> None:
    world.host(side).carried |= _ids(command)


def _changes(**letters: str) -> Callable[[World, str, Any], None]:
    return lambda world, side, command: world.host(side).change(command, world.ids, letters)


_EFFECTS: dict[type[do.Command], Callable[[World, str, Any], None]] = {
    do.WriteJournal: _write_journal,
    do.Forget: _forget,
    do.Hold: _hold,
    do.Rehold: _hold,
    do.LiftHold: _lift_hold,
    do.Thaw: _thaw,
    do.Release: _changes(f="-"),
    do.Carry: _carry,
    do.Rebuild: _rebuild,
    do.Discard: _discard,
    do.Adopt: _changes(s="w"),
    do.Activate: _changes(w="r"),
    do.Replay: lambda world, side, command: None,
    do.Steer: _steer,
    do.Unclaim: _unclaim,
    do.Send: lambda world, side, command: world.send(side, command.message),
    do.Ask: _ask,
    do.SendKept: _send_kept,
    do.StartTimer: _start_timer,
    do.Report: _report,
}
