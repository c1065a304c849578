"""Steering by moving the address: it leaves one host as a whole and comes to another, with all its connections."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Self

from migrate.fourtuple import FourTuple
from migrate.kernel import netns
from migrate.kernel.arp import Announcer
from migrate.kernel.link import Links

__all__ = ["Vip"]


class Vip:
    """Addresses that move as a whole on one device of this host; a `migrate.steer.Steering`, and a context manager.

    ``prefix_length`` in bits is what an address gets where it comes to; None means all of them, so that no route comes
    with it. ``namespace`` is a network namespace as `migrate.kernel.netns` names it. Making one takes some 0.2 s and
    closing it 0.02 s, its calls take a millisecond. Raises NotFound for a device that is not there, HostError for one
    without Ethernet address, PrivilegeError.
    """

    def __init__(self, device: str, *, prefix_length: int | None = None, namespace: str | None = None) -> None:
        self._device = device
        self._prefix_length = prefix_length
        with contextlib.ExitStack() as opened:
            self._links = opened.enter_context(Links(namespace))
            with netns.entered(namespace):
                self._announcer = opened.enter_context(Announcer(device))
            self._carried = self._look()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, tuples: Collection[FourTuple]) -> None:
        """The local addresses of these connections come here; see `Steering`."""
        for address in _locals(tuples):
            self.announce(address)

    def give(self, tuples: Collection[FourTuple], owner: bytes) -> None:
        """The local addresses of these connections leave; ``owner`` does not matter, it announces them itself."""
        for address in _locals(tuples):
            self.withdraw(address)

    def announce(self, address: bytes) -> None:
        """This host has the packed ``address`` from now on, and tells its neighbours. Again tells them again."""
        if self._links.add_address(self._device, address, self._prefix_length):
            self._carried.setdefault(address, set()).add(self._prefix_length or 8 * len(address))
        self._announcer.announce(address)

    def withdraw(self, address: bytes) -> None:
        """This host has the packed ``address`` no longer. Connections of it stay as they are; again does nothing."""
        if not self._remove(address, self._carried.pop(address, set())):
            self._remove(address, self._look().get(address, set()))  # somebody else gave it to the host meanwhile

    def _remove(self, address: bytes, prefix_lengths: set[int]) -> bool:
        removed = [self._links.remove_address(self._device, address, length) for length in prefix_lengths]
        return any(removed)

    def _look(self) -> dict[bytes, set[int]]:
        # The device's addresses with their prefix lengths. It takes 2 ms, so not when an address leaves.
        found: dict[bytes, set[int]] = {}
        for each in self._links.addresses():
            if each.device == self._device:
                found.setdefault(each.address, set()).add(each.prefix_length)
        return found

    def close(self) -> None:
        """Close what is open; the addresses stay where they are."""
        self._opened.close()


def _locals(tuples: Collection[FourTuple]) -> set[bytes]:
    return {each.local for each in tuples}
