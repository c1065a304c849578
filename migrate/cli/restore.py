"""tcpmig restore: bring the connections of a file back to life, each with an owner."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from migrate import quarantine
from migrate.adopt import Adopter, Adoption
from migrate.adopt.child import ChildAdoption, InetdAdopter, SystemdAdopter
from migrate.adopt.relay import RelayAdopter
from migrate.adopt.spawner import Gate, Spawner
from migrate.adopt.unix import UnixAdopter
from migrate.cli import holds, sealing
from migrate.cli.completion import completes_files
from migrate.cli.epochs import Epochs, memory
from migrate.cli.guard import Guard
from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.cli.show import opened
from migrate.cli.steering import vip
from migrate.errors import Conflict, Error, HostError, RecordTruncated, UsageError
from migrate.hold import Hold
from migrate.ici import FourTuple, Ici
from migrate.kernel.diag import SockDiag
from migrate.pathstate import Marks, PathState
from migrate.relocate import relocate
from migrate.restore import Restored, activate, discard, restore
from migrate.sealed import read_records
from migrate.tcpstate import TcpState

__all__ = ["add_arguments", "run"]

_PAUSE = 0.002  # seconds between two looks for an address
Failures = list[tuple[Ici, Error]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file and the owner."""
    completes_files(parser.add_argument("file", metavar="FILE", help="a file of records, or - for standard input"))
    parser.add_argument(
        "--systemd", action="store_true", help="hand all connections to one CMD, from descriptor 3 on (LISTEN_FDS)"
    )
    parser.add_argument("--relay", metavar="HOST:PORT", help="carry every connection's bytes to and from that server")
    parser.add_argument("--adopter", metavar="PATH", help="the application that listens at this unix socket gets them")
    parser.add_argument("--steer", metavar="vip:DEV", help="first let the connections' addresses come to that device")
    parser.add_argument(
        "--local", metavar="ADDR[:PORT]", help="the connections' end on this host, where a NAT hides it from the peers"
    )
    parser.add_argument(
        "--before-address",
        action="store_true",
        help="rebuild at once, and let the connections live as soon as their addresses have come (within --hold)",
    )
    parser.add_argument("--hold-open", action="store_true", help="own the connections, doing nothing, until they end")
    parser.add_argument("--detach", action="store_true", help="do not wait for the commands to end")
    parser.add_argument("--again", action="store_true", help="also records that were restored here before")
    parser.add_argument(
        "--hold",
        metavar="SECONDS",
        type=holds.seconds,
        default=60.0,
        help="what cannot be restored may be tried again: keep this host from answering its peer that long (60)",
    )
    sealing.add_arguments(parser)
    parser.add_argument(
        "--path-state",
        action="store_true",
        help="go on with the congestion windows that the connections had, as far as they are fresh",
    )
    parser.set_defaults(command=[])
    parser.usage = "%(prog)s [-h] [OPTION ...] FILE [-- CMD ...]"
    parser.epilog = "-- CMD ... is run once a connection, with the socket as its standard input and output (inetd)."


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Restore silently, hand over, activate, replay."""
    adopter = _adopter(arguments)
    adopter.check()
    key = sealing.key(arguments.key)
    with opened(arguments.file) as file:
        records = list(read_records(file, key))
    if not records:
        raise RecordTruncated(f"{arguments.file!r} holds no record", offset=0)
    if arguments.local is not None:
        for record in records:
            relocate(record, arguments.local)
    steering = None if arguments.steer is None else vip(arguments.steer)
    failures: Failures = []
    with ExitStack() as kept:
        paths = kept.enter_context(PathState()) if arguments.path_state else None
        marks = kept.enter_context(Marks())
        seen = memory(output)
        if seen is not None:
            kept.enter_context(contextlib.closing(seen))
        wanted = list(_usable(records, None if arguments.again else seen, failures))
        holds.refuse_moving([record.four_tuple for record in wanted])
        restored: dict[FourTuple, tuple[Ici, Restored]] = {}
        adoptions: Sequence[Adoption] = ()
        over = [record for record in wanted if record.state == TcpState.TIME_WAIT]
        connections = [record for record in wanted if record.state != TcpState.TIME_WAIT]
        if paths is None:
            marks.prepare(connections)
        with _held(connections, restored, arguments.hold) as hold:
            if steering is not None:
                steering.take({record.four_tuple for record in wanted})
            if over:
                quarantine.keep_free(over)
            for record in connections:
                try:
                    sock = _silent(record, before_address=arguments.before_address)
                except Error as error:
                    failures.append((record, error))
                    continue
                kept.callback(sock.close)
                restored[record.four_tuple] = record, sock
                if paths is None:
                    marks.carry(sock)
                else:
                    paths.carry(sock, age=max(time.time() - record.origin_time / 1e9, 0.0))
            if arguments.before_address:
                _await_addresses({record.local for record, _ in restored.values()}, arguments.hold)
            if hold is not None and restored:
                adoptions = _hand_over(adopter, restored, hold, failures)
            if seen is not None:
                seen.live(restored.values())
        for record, sock in restored.values():
            if sock.unset:
                output.warn(f"{record.four_tuple}: this host could not set {', '.join(sorted(set(sock.unset)))}")
    with contextlib.nullcontext() if arguments.detach else _stopped_together(adoptions):
        _report([*restored, *(record.four_tuple for record in over)], failures, output)
        if not arguments.detach:
            _wait(adoptions)
    if not failures:
        return 0
    return PARTIAL if restored or over else max(error.exit_code for _, error in failures)


def _adopter(arguments: argparse.Namespace) -> Adopter:
    """Who owns them."""
    ways = [
        bool(arguments.command),
        arguments.relay is not None,
        arguments.adopter is not None,
        arguments.hold_open,
    ]
    if sum(ways) != 1 or (arguments.systemd and not arguments.command):
        raise UsageError(
            "who shall own the connections?",
            hint="exactly one of: [--systemd] -- CMD, --relay HOST:PORT, --adopter PATH, --hold-open",
        )
    if arguments.hold_open:
        return _Keeper()
    if arguments.adopter is not None:
        return UnixAdopter(arguments.adopter)
    if arguments.relay is not None:
        return RelayAdopter(arguments.relay, session=arguments.detach)
    style = SystemdAdopter if arguments.systemd else InetdAdopter
    return style(arguments.command, session=arguments.detach)


class _Keeper:
    """A process that owns connections and does nothing; they outlive a command that is killed."""

    def check(self) -> None:
        self.spawner = Spawner()

    def adopt(self, sockets: Sequence[socket.socket]) -> Sequence[Adoption]:
        return [_Kept(self.spawner, self.spawner.keep(sockets))]


class _Kept:
    """What a keeper has."""

    def __init__(self, spawner: Spawner, gate: Gate) -> None:
        self.pid = spawner.pid
        self._spawner, self._gate = spawner, gate

    def go(self) -> None:
        self._gate.go()
        self._end()

    def abort(self) -> None:
        self._gate.abort()
        self._end()

    def _end(self) -> None:
        os.close(self._gate.status)
        self._spawner.close()


def _usable(records: Iterable[Ici], seen: Epochs | None, failures: Failures) -> Iterator[Ici]:
    """Those whose connection is not here and was not."""
    known = set()
    with SockDiag() as diag:
        for record in records:
            name = record.four_tuple
            refused = None if seen is None else seen.refusal(record)
            if name in known:
                refused = Conflict(f"{name}: the file has two records of it", hint="restore them one after the other")
            elif diag.find(name):
                refused = Conflict(f"{name}: this connection exists here already", hint="tcpmig list shows its owner")
            known.add(name)
            if refused is None:
                yield record
            else:
                failures.append((record, refused))


@contextlib.contextmanager
def _held(
    records: Sequence[Ici], restored: dict[FourTuple, tuple[Ici, Restored]], seconds: float
) -> Iterator[Hold | None]:
    """The connections are held meanwhile, and after it those that did not come to life: their peers shall wait."""
    if not records:
        yield None
        return
    name, tuples = holds.new_name(), [record.four_tuple for record in records]
    guard = Guard(lambda *_: _keep_waiting(name, seconds))
    failed = True
    try:
        # The way out, too: bytes that were never sent are queued by a socket that could speak, if this process were
        # killed just then, and the timers of what was sent run on.
        with Hold(tuples, name=name, timeout=seconds + holds.MARGIN) as hold:
            try:
                holds.release_others(tuples)
                yield hold
                failed = len(restored) < len(records)
            finally:
                if failed:
                    with contextlib.suppress(Error):
                        hold.remove(list(restored))
                    hold.disown()
    finally:
        if failed:
            guard.leave()
        else:
            guard.dismiss()


def _keep_waiting(name: str, seconds: float) -> None:
    hold = holds.adopt(name)
    if hold is not None:
        holds.linger(hold, seconds)


def _await_addresses(addresses: set[bytes], seconds: float) -> None:
    limit = time.monotonic() + seconds
    for address in addresses:
        while not _is_here(address):
            if time.monotonic() > limit:
                raise HostError("the connections' addresses have not come", hint="give --hold more seconds")
            time.sleep(_PAUSE)


def _is_here(address: bytes) -> bool:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    with socket.socket(family) as trial:
        try:
            trial.bind((socket.inet_ntop(family, address), 0))
        except OSError:
            return False
    return True


def _silent(record: Ici, *, before_address: bool) -> Restored:
    sock = restore(record, activate=False, before_address=before_address)
    assert isinstance(sock, Restored)
    return sock


def _hand_over(
    adopter: Adopter, restored: dict[FourTuple, tuple[Ici, Restored]], hold: Hold, failures: Failures
) -> Sequence[Adoption]:
    """Give silent sockets to their owner, activate them, replay what arrived, let the owner run.

    In this order: what a silent socket were given it would acknowledge, and it dies with this process.
    """
    everyone = list(restored.values())
    adoptions = adopter.adopt([sock for _, sock in everyone])
    hold.add(list(restored), outgoing=False)
    for record, sock in everyone:
        try:
            activate(sock)
        except Error as error:
            _failed(record, sock, error, restored, failures)
    hold.replay(list(restored))
    for position, adoption in enumerate(adoptions):
        try:
            adoption.go()
        except Error as error:
            for record, sock in [everyone[position]] if len(adoptions) == len(everyone) else everyone:
                _failed(record, sock, error, restored, failures)
    return adoptions


def _failed(
    record: Ici, sock: Restored, error: Error, restored: dict[FourTuple, tuple[Ici, Restored]], failures: Failures
) -> None:
    if restored.pop(record.four_tuple, None):
        failures.append((record, error))
    discard(sock)


def _report(restored: Iterable[FourTuple], failures: Failures, output: Output) -> None:
    for four_tuple in restored:
        output.data(f"{four_tuple}: restored", {"connection": str(four_tuple), "ok": True})
    for record, error in failures:
        output.failure(str(record.four_tuple), error)


@contextlib.contextmanager
def _stopped_together(adoptions: Sequence[Adoption]) -> Iterator[None]:
    """What merely keeps connections open goes with this process when that is told to stop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        for child in adoptions:
            if isinstance(child, _Kept):
                os.kill(child.pid, signal.SIGKILL)
        raise


def _wait(adoptions: Sequence[Adoption]) -> None:
    """Until the commands have ended."""
    for child in adoptions:
        if isinstance(child, ChildAdoption | _Kept):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
