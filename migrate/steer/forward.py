"""Steering of single connections: the address stays where it is, and its host sends on what belongs to another."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Collection, Iterator
from typing import Self

from migrate.errors import HostError
from migrate.fourtuple import FourTuple
from migrate.kernel.nft import ForwardTable, tables
from migrate.kernel.route import Routes

__all__ = ["Forward", "forwarding"]

_PREFIX = "tcpmig-forward-"


class Forward:
    """Forwards flows in this thread's network namespace; a `migrate.steer.Steering`.

    A flow is expected on the device through which this host would answer it. The entries are the kernel's and outlive
    this process: a new object goes on with them. Raises PrivilegeError, HostError.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as opened:
            self._routes = opened.enter_context(Routes())
            self._tables = {key: opened.enter_context(ForwardTable(*key)) for key in _standing()}
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, tuples: Collection[FourTuple]) -> None:
        """These connections live here: what arrives for them stays; see `Steering`."""
        for table in self._tables.values():
            table.remove(tuples)

    def give(self, tuples: Collection[FourTuple], owner: bytes) -> None:
        """What arrives for these connections goes on to the neighbour with that packed address."""
        if any(len(each.local) != len(owner) for each in tuples):
            raise HostError(
                "a connection can be forwarded only to an address of its own IP version",
                hint="name the agent by an address of that version",
            )
        via = self._device(owner)
        devices = {remote: self._device(remote) for remote in {each.remote for each in tuples}}
        chosen: dict[str, dict[FourTuple, bytes]] = {}
        for each in tuples:
            chosen.setdefault(devices[each.remote], {})[each] = owner
        for device, entries in chosen.items():
            self._table(device, via).add(entries)

    def given(self) -> dict[FourTuple, bytes]:
        """What is forwarded, and to whom: as found when this was made or swept last, and changed by it since."""
        return {each: owner for table in self._tables.values() for each, owner in table.known.items()}

    def sweep(self) -> list[FourTuple]:
        """Forward no longer what has ended, as `ForwardTable.over` knows it; says what that was."""
        swept = []
        for table in self._tables.values():
            over = table.over()
            table.remove(over)
            swept += over
        return swept

    def close(self) -> None:
        """Close what is open; what is forwarded is forwarded on."""
        self._opened.close()

    def _device(self, address: bytes) -> str:
        """The device through which this host would send to a packed address."""
        return socket.if_indextoname(self._routes.find(address).device)

    def _table(self, device: str, via: str) -> ForwardTable:
        if (device, via) not in self._tables:
            self._tables[device, via] = self._opened.enter_context(ForwardTable(device, via))
        return self._tables[device, via]


def forwarding() -> bool:
    """Whether this thread's network namespace has anything to forward flows by."""
    return any(_standing())


def _standing() -> Iterator[tuple[str, str]]:
    """Device and next device of the tables that are there, as their names tell."""
    devices = {name for _, name in socket.if_nameindex()}
    for name in tables():
        rest = name.removeprefix(_PREFIX)
        if rest == name:
            continue
        if rest in devices:
            yield rest, rest
        else:
            yield from (pair for pair in itertools.permutations(devices, 2) if "-".join(pair) == rest)
