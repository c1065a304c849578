"""Addresses that this host answers from and does not announce: on lo, where no neighbour hears of them.

A connection that came here alone needs its local address here, while the address itself stays where it was. What this
agent put on lo stands in a file of the state directory, since an address tells nobody who added it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from migrate.errors import from_oserror
from migrate.kernel.diag import SockDiag
from migrate.kernel.link import AddressWatch, Links

__all__ = ["Carrier"]

# Answer neighbours only for addresses of the device that was asked on, and ask them in the name of those.
_SILENT = {"arp_ignore": "1", "arp_announce": "2"}


class Carrier:
    """Not for several threads. Raises HostError, PrivilegeError, KernelError."""

    def __init__(self, file: Path) -> None:
        """``file`` remembers what was added, also for the next agent."""
        self._file = file
        self._watch = AddressWatch()  # before the first look
        self._links = Links()
        self._here: set[bytes] = set()  # addresses that this host is known to have, as long as none changes
        try:
            self._ours: set[bytes] = set(msgspec.msgpack.decode(file.read_bytes(), type=list[bytes]))
        except (FileNotFoundError, msgspec.MsgspecError):
            self._ours = set()

    def close(self) -> None:
        """What is carried is carried on."""
        self._watch.close()
        self._links.close()

    def carry(self, addresses: Iterable[bytes]) -> None:
        """Make these packed addresses ones that sockets here can be bound to."""
        self.also(self._missing(addresses))

    def obstacles(self, addresses: Iterable[bytes]) -> dict[bytes, str]:
        """Why this host cannot carry some of these, and does not have them; changes nothing."""
        found: dict[bytes, str] = {}
        for address in self._missing(addresses):
            if len(address) == 16 and not _has_ipv6():
                found[address] = "the destination has no IPv6 (net.ipv6.conf.lo.disable_ipv6)"
            elif any(_loud(name) and not os.access(_sysctl(name), os.W_OK) for name in _SILENT):
                found[address] = f"the destination's agent cannot set {_sysctl('arp_ignore')}, to carry its address"
        return found

    def also(self, addresses: Iterable[bytes]) -> None:
        """Have them on lo even if a device has them too, which will lose them."""
        for address in addresses:
            self._hush()
            self._ours.add(address)
            self._write()
            self._links.add_address("lo", address)

    def drop_unused(self, wanted: Iterable[bytes] = ()) -> None:
        """Take from lo what we put there, no connection here uses and nobody wants."""
        unused = self._ours.difference(wanted)
        if not unused:
            return
        with SockDiag() as diag:
            used = {each.four_tuple.local for each in diag.list_connections()}
        for address in unused - used:
            self._links.remove_address("lo", address)
            self._ours.discard(address)
        self._write()

    def _missing(self, addresses: Iterable[bytes]) -> set[bytes]:
        if self._watch.read():
            self._here.clear()
        wanted = set(addresses) - self._here
        if wanted:
            self._look()
        return wanted - self._here

    def _look(self) -> None:
        self._here = {each.address for each in self._links.addresses() if not each.tentative}

    def _hush(self) -> None:
        for name, value in _SILENT.items():
            try:
                if _loud(name):
                    _sysctl(name).write_text(value)
            except OSError as error:
                raise from_oserror(f"setting net.ipv4.conf.all.{name}", error) from None

    def _write(self) -> None:
        aside = self._file.with_name(f".{self._file.name}.new")
        try:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(msgspec.msgpack.encode(sorted(self._ours)))
            aside.rename(self._file)
        except OSError as error:
            raise from_oserror(f"writing {self._file}", error) from None


def _sysctl(name: str) -> Path:
    return Path("/proc/sys/net/ipv4/conf/all", name)


def _loud(name: str) -> bool:
    return int(_sysctl(name).read_text()) < int(_SILENT[name])


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError):  # a kernel that has none
        return not int(Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text())
    return False
