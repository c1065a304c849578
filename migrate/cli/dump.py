"""tcpmig dump: take connections out of running processes, into a file."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from migrate import quarantine, quiet
from migrate.checkpoint import check, dump, release, thaw
from migrate.cli import handshakes, holds, sealing, selector
from migrate.cli.completion import completes_files
from migrate.cli.epochs import memory
from migrate.cli.guard import Guard
from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.cli.recordfile import RecordFile
from migrate.cli.steering import vip
from migrate.errors import Error, Gone, NotFound, Refused, UsageError
from migrate.hold import Hold
from migrate.ici import FourTuple, Ici
from migrate.kernel import pidfd, sockopt
from migrate.kernel.priority import undisturbed
from migrate.sealed import Key
from migrate.tcpstate import TcpState
from migrate.unconnected import accepted, frozen_listener

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Selectors, where to, and how."""
    selector.add_arguments(parser)
    completes_files(
        parser.add_argument(
            "-o", "--output", metavar="FILE", required=True, help="file to make (0600), or - for stdout"
        )
    )
    parser.add_argument("--steer", metavar="vip:DEV", help="then take the connections' addresses from that device")
    parser.add_argument("--leave-running", action="store_true", help="copy the connection and let it run on")
    parser.add_argument(
        "--hold",
        metavar="SECONDS",
        type=holds.seconds,
        default=60.0,
        help="afterwards, keep this host from answering the peer that long (60)",
    )
    parser.add_argument(
        "--when-quiet",
        metavar="SECONDS",
        type=holds.seconds,
        help="wait, at most that long, until the owner has answered everything it has read",
    )
    handshakes.add_arguments(parser)
    sealing.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Find, hold, freeze, save, release."""
    chosen = selector.from_arguments(arguments)
    if chosen.empty:
        raise UsageError("which connections?", hint="give CONN or one of --local, --remote, --state, --pid")
    steering = None if arguments.steer is None else vip(arguments.steer)
    if steering is not None and arguments.leave_running:
        raise UsageError("--steer takes the address away: --leave-running would cut the connection off")
    key = sealing.key(arguments.key)
    found = handshakes.find(chosen, arguments.wait_handshakes)
    if not found:
        raise NotFound("no connection here matches", hint="tcpmig list shows them")
    failures: list[tuple[str, Error]] = []
    over = [each for each in found if each.connection.state is TcpState.TIME_WAIT]
    with ExitStack() as opened:
        sockets = _take([each for each in found if each not in over], opened, failures, output)
        if not sockets and not over and len(failures) == 1:
            raise failures[0][1]
        saved = []
        if sockets or over:
            ended = quarantine.records([connection for connection, _ in over])
            saved = _save(sockets, ended, arguments, output, failures, key=key)
    if saved and steering is not None:
        steering.give(saved, b"")
    for name, error in failures:
        output.failure(name, error)
    if not failures:
        return 0
    return PARTIAL if saved else 1


def _refuse_descriptor(pid: int, descriptor: int) -> None:
    """Say what it is, if it is a socket that cannot be dumped."""
    process = pidfd.open_process(pid)
    try:
        with socket.socket(fileno=pidfd.get_fd(process, descriptor)) as sock:
            check(sock)
    finally:
        os.close(process)


def _take(
    found: Sequence[selector.Found], opened: ExitStack, failures: list[tuple[str, Error]], output: Output
) -> dict[FourTuple, socket.socket]:
    """A descriptor of each connection, out of one of its owners; nothing is touched yet."""
    sockets: dict[FourTuple, socket.socket] = {}
    processes: dict[int, int] = {}
    for each in found:
        connection, owners = each
        name = str(connection.four_tuple)
        try:
            if (why := each.obstacle) is not None:
                raise why
            owner = owners[0]
            if owner.pid not in processes:
                processes[owner.pid] = pidfd.open_process(owner.pid)
                opened.callback(os.close, processes[owner.pid])
            sock = opened.enter_context(socket.socket(fileno=pidfd.get_fd(processes[owner.pid], owner.fd)))
            check(sock)
            if _frozen(sock):
                raise Refused("it is frozen already", hint="another program is moving it, or died while it did")
        except Error as error:
            failures.append((name, error))
            continue
        if len({owner.pid for owner in owners}) > 1:
            others = ", ".join(f"{o.comm} (pid {o.pid}, fd {o.fd})" for o in owners)
            output.warn(f"{name} has several owners, and all of them lose it: {others}")
        sockets[connection.four_tuple] = sock
    return sockets


def _save(
    sockets: dict[FourTuple, socket.socket],
    over: list[Ici],
    arguments: argparse.Namespace,
    output: Output,
    failures: list[tuple[str, Error]],
    *,
    key: Key | None,
) -> list[FourTuple]:
    """Freeze and write, with the records of what is ``over`` already; the connections saved."""
    holds.refuse_moving(sockets)
    name, seconds, stays = holds.new_name(), arguments.hold, arguments.leave_running
    listeners = [] if stays else handshakes.listening(sockets.values())
    taken: dict[FourTuple, socket.socket] = {}
    with RecordFile(arguments.output, key) as file, ExitStack() as opened:
        kept = [sock.fileno() for sock in sockets.values()] + file.descriptors
        if listeners:
            kept.append(opened.enter_context(handshakes.refusals(sockets, listeners)).fileno())
        guard = Guard(
            lambda told, taken: _finish(
                list(sockets.values()), taken, name, file, seconds, committed=told or file.committed()
            ),
            keep=kept,
            accept=lambda: itertools.chain.from_iterable(map(accepted, listeners)),
        )
        try:
            with Hold(name=name, timeout=seconds + holds.MARGIN) as hold:
                try:
                    hold.add([record.four_tuple for record in over])
                    if not stays:
                        taken = handshakes.take(sockets, guard, arguments.wait_handshakes)
                        sockets |= taken
                        for child in taken.values():
                            opened.enter_context(child)
                    names = _names(sockets, output)
                    records = _freeze(sockets, hold, arguments.when_quiet, output, failures) + over
                    for record in records:
                        record.id, record.epoch = names.get(record.four_tuple, (b"", 0))
                    if records and not stays:
                        file.write(records)
                        file.commit()
                finally:
                    if file.committed():
                        guard.commit()
                        _release(sockets.values())
                        hold.disown()
                    else:
                        _thaw(sockets.values())
        finally:
            if file.committed():
                guard.leave()
            elif taken:
                guard.leave()
                output.warn(
                    f"{len(taken)} connections that nobody had accepted wait in process {guard.pid} for {seconds:g} s: "
                    f"take them with --pid {guard.pid}, or they end"
                )
            else:
                guard.dismiss()
        if records and stays:
            file.write(records)
            file.commit()
    if listeners and records:
        output.say(f"who connects now is neither accepted nor refused here for {seconds:g} s, and tries again")
    for record in records:
        if arguments.output == "-":
            output.say(f"{record.four_tuple}: saved")
        else:
            output.data(
                f"{record.four_tuple}: saved to {arguments.output}",
                {"connection": str(record.four_tuple), "ok": True, "file": arguments.output},
            )
    return [record.four_tuple for record in records]


def _names(sockets: dict[FourTuple, socket.socket], output: Output) -> dict[FourTuple, tuple[bytes, int]]:
    """Ids and epochs for the records, while there is time."""
    seen = memory(output)
    if seen is None:
        return {}
    with contextlib.closing(seen):
        return dict(zip(sockets, seen.name(list(sockets.values())), strict=True))


def _finish(
    sockets: Sequence[socket.socket],
    taken: Sequence[socket.socket],
    name: str,
    file: RecordFile,
    seconds: float,
    *,
    committed: bool,
) -> None:
    """In the guard, once the dump is over or dead: with complete records in their place release, without them thaw.

    What was ``taken`` from a listener's queue has no owner; without records it is kept here.
    """
    hold = holds.adopt(name)
    everything = [*sockets, *taken]
    if committed:
        _release(everything)
        for sock in everything:
            sock.close()
        file.close()
        if hold is not None:
            holds.linger(hold, seconds)
    else:
        if hold is not None:
            with contextlib.suppress(Error):
                hold.replay()  # first: it opens the way out again, which the probe of a thaw needs
        _thaw(everything)
        if hold is not None:
            hold.lift()
        file.remove()
        file.close()
        for sock in sockets:
            sock.close()
        handshakes.keep(taken, seconds)


def _frozen(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return sockopt.in_repair(sock) or frozen_listener(sock)
    return False


def _thaw(sockets: Iterable[socket.socket]) -> None:
    for sock in filter(_frozen, sockets):
        with contextlib.suppress(Error):  # one connection's failure must not keep the others frozen
            thaw(sock)


def _release(sockets: Iterable[socket.socket]) -> None:
    # The owner wakes up at once. If it ran before repair mode is left, it would see EPERM instead of ECONNABORTED.
    with undisturbed():
        for sock in filter(_frozen, sockets):
            with contextlib.suppress(Error):
                release(sock)


def _freeze(
    sockets: dict[FourTuple, socket.socket],
    hold: Hold,
    when_quiet: float | None,
    output: Output,
    failures: list[tuple[str, Error]],
) -> list[Ici]:
    """Hold and dump, at once or as each connection becomes quiet."""
    records: list[Ici] = []
    missed = set(sockets)
    for group in _groups(sockets, hold, when_quiet):
        for key in group:
            missed.discard(key)
            try:
                record = dump(sockets[key])
            except Error as error:
                failures.append((str(key), error))
                hold.remove([key])
                continue
            if record.received and when_quiet is None:
                output.warn(f"{key} is busy: what its owner has read and not answered stays with the owner")
            records.append(record)
    failures += [(str(key), _never_quiet(sockets[key])) for key in missed]
    return records


def _never_quiet(sock: socket.socket) -> Refused:
    with contextlib.suppress(OSError):
        sock.getpeername()
        return Refused("it was never quiet", hint="give --when-quiet more seconds")
    return Gone("the connection ended while it was waited for")


def _groups(sockets: dict[FourTuple, socket.socket], hold: Hold, when_quiet: float | None) -> Iterator[list[FourTuple]]:
    if when_quiet is None:
        hold.add(list(sockets))
        yield list(sockets)
        return
    for group, _ in quiet.rounds(sockets, hold, seconds=when_quiet):
        yield group
