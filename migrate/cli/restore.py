"""tcpmig restore: bring the connections of a file back to life, each with an owner."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from migrate.adopt import Adopter, Adoption
from migrate.adopt.child import ChildAdoption, InetdAdopter, SystemdAdopter
from migrate.adopt.relay import RelayAdopter
from migrate.cli.guard import Guard, linger
from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.cli.show import opened
from migrate.cli.steering import vip
from migrate.errors import Error, UsageError
from migrate.hold import Hold
from migrate.ici import Ici, read_records
from migrate.restore import activate, restore

__all__ = ["add_arguments", "run"]

_HOLD = 60.0  # seconds
_MARGIN = 30.0  # seconds by which the kernel's own timeout of a hold outlasts the guard's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file and the owner."""
    parser.add_argument("file", metavar="FILE", help="a file of records, or - for standard input")
    parser.add_argument(
        "--systemd", action="store_true", help="hand all connections to one CMD, from descriptor 3 on (LISTEN_FDS)"
    )
    parser.add_argument("--relay", metavar="HOST:PORT", help="carry every connection's bytes to and from that server")
    parser.add_argument("--steer", metavar="vip:DEV", help="first let the connections' addresses come to that device")
    parser.add_argument("--hold-open", action="store_true", help="own the connections, doing nothing, until they end")
    parser.add_argument("--detach", action="store_true", help="do not wait for the commands to end")
    parser.set_defaults(command=[])
    parser.usage = "%(prog)s [-h] [OPTION ...] FILE [-- CMD ...]"
    parser.epilog = "-- CMD ... is run once a connection, with the socket as its standard input and output (inetd)."


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Restore silently, hand over, activate, replay."""
    adopter = _adopter(arguments)
    if adopter is not None:
        adopter.check()
    with opened(arguments.file) as file:
        records = list(read_records(file))
    if not records:
        raise UsageError(f"{arguments.file!r} holds no record")
    steering = None if arguments.steer is None else vip(arguments.steer)
    hold = Hold((record.four_tuple for record in records), timeout=_HOLD + _MARGIN)
    try:
        # If this process is killed half-way, the peers are kept waiting so that the file can be restored again.
        guard = Guard(lambda done: None if done else linger(hold, _HOLD))
    except Error:
        hold.lift()
        raise
    restored: list[tuple[Ici, socket.socket]] = []
    failures: list[tuple[Ici, Error]] = []
    with ExitStack() as opened_sockets:
        try:
            if steering is not None:
                steering.take({record.four_tuple for record in records})
            for record in records:
                try:
                    sock = restore(record, activate=False)
                except Error as error:
                    failures.append((record, error))
                    continue
                restored.append((record, sock))
                opened_sockets.callback(sock.close)
            children = _hand_over(adopter, [sock for _, sock in restored], hold)
        finally:
            hold.lift()
            guard.commit()
            guard.dismiss(wait=True)
        for record, _ in restored:
            output.data(f"{record.four_tuple}: restored", {"connection": str(record.four_tuple), "ok": True})
        for record, failure in failures:
            name = str(record.four_tuple)
            output.data(f"{name}: {failure}", {"connection": name, "ok": False, "reason": str(failure)})
        if adopter is None:
            _keep_open([sock for _, sock in restored])
    if not arguments.detach:
        _wait(children)
    if not failures:
        return 0
    return PARTIAL if restored else max(error.exit_code for _, error in failures)


def _adopter(arguments: argparse.Namespace) -> Adopter | None:
    """Who owns them; None is this process."""
    ways = [bool(arguments.command), arguments.relay is not None, arguments.hold_open]
    if sum(ways) != 1 or (arguments.systemd and not arguments.command):
        raise UsageError(
            "who shall own the connections?", hint="exactly one of: [--systemd] -- CMD, --relay HOST:PORT, --hold-open"
        )
    if arguments.hold_open:
        return None
    if arguments.relay is not None:
        return RelayAdopter(arguments.relay, session=arguments.detach)
    style = SystemdAdopter if arguments.systemd else InetdAdopter
    return style(arguments.command, session=arguments.detach)


def _hand_over(adopter: Adopter | None, sockets: list[socket.socket], hold: Hold) -> Sequence[Adoption]:
    """Give silent sockets to their owner, activate them, replay what arrived, let the owner run."""
    adoptions: Sequence[Adoption] = () if adopter is None or not sockets else adopter.adopt(sockets)
    for sock in sockets:
        activate(sock)
    hold.replay()
    for adoption in adoptions:
        adoption.go()
    return adoptions


def _keep_open(sockets: Sequence[socket.socket]) -> None:
    """Until the peers have closed, or a signal ends this process (which closes them)."""
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLRDHUP)
    left = len(sockets)
    while left:
        for descriptor, _ in poll.poll():
            poll.unregister(descriptor)
            left -= 1


def _wait(children: Sequence[Adoption]) -> None:
    for child in children:
        if isinstance(child, ChildAdoption):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
