"""The migration: connections leave nginx's worker on A at quiet points, a few at a time, and go on on B.

The address stays on A until the last has moved. Until then A forwards the segments of those that live on B already,
and B, which carries the address on lo, answers the clients itself. Small batches keep each connection's freeze short.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from migrate import quiet
from migrate.checkpoint import dump, release, thaw
from migrate.demo.network import ADDRESS, DEVICE, Network
from migrate.demo.owner import Owner
from migrate.demo.web import PORT
from migrate.errors import Error, HostError
from migrate.fourtuple import FourTuple
from migrate.hold import Hold
from migrate.ici import Ici
from migrate.kernel import netns, pidfd
from migrate.kernel.diag import Endpoint, list_connections
from migrate.kernel.nft import ForwardTable
from migrate.kernel.priority import undisturbed
from migrate.restore import activate, restore
from migrate.steer.vip import Vip
from migrate.tcpstate import TcpState

__all__ = ["Freeze", "Migration"]

_BATCH, _SAMPLE = 25, 400  # connections: that move together, that are looked at for that
_TIME = 60.0  # seconds to find a quiet point of each connection in
_ACCEPT = 10.0  # seconds for nginx to accept the last

_ADDRESS = socket.inet_aton(ADDRESS)


class Freeze(NamedTuple):
    """From when to when nothing could happen on a connection; seconds of CLOCK_MONOTONIC."""

    begin: float
    end: float


class Migration:
    """Made beforehand, with all that takes long; `run` is the move. A context manager."""

    frozen: dict[FourTuple, Freeze]  # of those that moved
    failed: dict[FourTuple, str]  # why they did not

    def __init__(self, network: Network, owner: Owner, count: int) -> None:
        self.frozen, self.failed = {}, {}
        self._owner = owner
        self._there = network.b.netns
        with ExitStack() as opened:
            self._sockets = _take(network.a.netns, count, opened)
            with netns.entered(network.a.netns):
                self._forwards = opened.enter_context(ForwardTable(DEVICE))
            self._before = opened.enter_context(Hold(netns=network.a.netns))
            self._after = opened.enter_context(Hold(netns=network.b.netns))
            self._leave = opened.enter_context(Vip(DEVICE, namespace=network.a.netns))
            self._come = opened.enter_context(Vip(DEVICE, namespace=network.b.netns))
            self._next_hop = socket.inet_aton(network.b.address)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def connections(self) -> Sequence[FourTuple]:
        """What is to be moved."""
        return list(self._sockets)

    def run(self, progress: Callable[[int], None]) -> None:
        """Move all. ``progress`` is told how many have moved so far, often."""
        waiting = dict(self._sockets)
        limit = time.monotonic() + _TIME
        while waiting and time.monotonic() < limit:
            batch = _choose(waiting)
            # B keeps what comes before its sockets are there.
            self._after.add(batch)
            begin = time.monotonic()
            for ready, _ in quiet.rounds({key: waiting[key] for key in batch}, self._before, seconds=0):
                self._carry([(key, waiting.pop(key)) for key in ready], begin)
            self._after.remove(key for key in batch if key not in self.frozen)
            progress(len(self.frozen))
        self.failed |= dict.fromkeys(waiting, f"it was not quiet within {_TIME:.0f} s")
        if not self.failed:
            self._come.announce(_ADDRESS)
            self._leave.withdraw(_ADDRESS)

    def _carry(self, group: Sequence[tuple[FourTuple, socket.socket]], begin: float) -> None:
        """What is held on both sides: copy, rebuild, send its segments there, let go here, let live there."""
        moving: list[tuple[FourTuple, socket.socket, socket.socket]] = []
        with netns.entered(self._there):
            for key, source in group:
                try:
                    moving.append((key, source, _rebuilt(source)))
                except Error as error:
                    self.failed[key] = str(error)
                    self._before.remove([key])
        keys = [key for key, _, _ in moving]
        self._forwards.add(dict.fromkeys(keys, self._next_hop))
        with undisturbed():
            for _, source, _ in moving:
                release(source)
        self._after.keep(packet for packets in self._before.take(keys).values() for packet in packets)
        for _, _, restored in moving:
            activate(restored)
        self._after.remove(keys)
        # Only now: the peers' acknowledgements of what the owner sends must not be held, or it is sent again.
        self._owner.give([restored for _, _, restored in moving])
        end = time.monotonic()
        self.frozen |= dict.fromkeys(keys, Freeze(begin, end))
        self._before.remove(keys)
        for _, source, restored in moving:
            source.close()
            restored.close()


def _rebuilt(source: socket.socket) -> socket.socket:
    """A silent copy of a connection in this thread's namespace, made from its record. If that fails, it lives on."""
    record = dump(source)
    try:
        return restore(Ici.decode(record.encode()), activate=False)
    except BaseException:
        thaw(source)
        raise


def _choose(waiting: Mapping[FourTuple, socket.socket]) -> list[FourTuple]:
    """The next batch. Those silent for long enough to be judged at once, and of them those that were so last."""
    ages = {}
    for key in random.sample(list(waiting), min(_SAMPLE, len(waiting))):
        with contextlib.suppress(OSError):
            ages[key] = quiet.observe(waiting[key]).sent_ago / 1000
    return sorted(ages, key=lambda key: (ages[key] < quiet.PATIENCE, ages[key]))[:_BATCH]


def _take(namespace: str, count: int, opened: ExitStack) -> dict[FourTuple, socket.socket]:
    """A descriptor of each of ``count`` connections to the floating address, out of the process that has it."""
    limit = time.monotonic() + _ACCEPT
    while len(owners := _owners(namespace)) < count:
        if time.monotonic() > limit:
            raise HostError(f"of {count} connections nginx has accepted only {len(owners)}")
        time.sleep(0.02)
    processes: dict[int, int] = {}
    sockets = {}
    for key, owner in owners.items():
        if owner.pid not in processes:
            processes[owner.pid] = pidfd.open_process(owner.pid)
            opened.callback(os.close, processes[owner.pid])
        sock = socket.socket(fileno=pidfd.get_fd(processes[owner.pid], owner.fd))
        sockets[key] = opened.enter_context(sock)
    return sockets


def _owners(namespace: str) -> dict[FourTuple, pidfd.Owner]:
    """By connection who has it; those that wait to be accepted nobody has."""
    with netns.entered(namespace):
        found = list_connections(states=[TcpState.ESTABLISHED], local=Endpoint(_ADDRESS, PORT))
    owners = pidfd.owners_of(connection.inode for connection in found if connection.inode)
    return {each.four_tuple: owners[each.inode][0] for each in found if each.inode in owners}
