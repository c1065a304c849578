"""Another local end for a connection: where a NAT hides the host from the peer, the host's own address may change.

The peer must not notice: whoever translates has to send its segments to the new address from then on (docs/nat.md).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from migrate.errors import UsageError
from migrate.fourtuple import Endpoint, FourTuple, endpoint_text, parse_endpoint
from migrate.ici import Ici

__all__ = ["LocalMap", "LocalMaps", "relocate"]

_SAME_VERSION = "the new address is of the same IP version as the old one"


def relocate(ici: Ici, end: str) -> None:
    """Give the record the local end ``ADDR`` or ``ADDR:PORT``. Raises UsageError for one that it cannot have."""
    address, port = _local_end(end)
    if len(address) != len(ici.local):
        raise UsageError(f"{ici.four_tuple} cannot get the local end {end!r}", hint=_SAME_VERSION)
    ici.local = address
    if port is not None:
        ici.local_port = port


class LocalMap(NamedTuple):
    """Connections with the local end ``old`` get ``new``. A port of None: whatever port; the connection's own."""

    old: Endpoint
    new: Endpoint

    @classmethod
    def parse(cls, old: str, new: str) -> LocalMap:
        """From two times ``ADDR`` or ``ADDR:PORT``. Raises UsageError."""
        this = cls(_local_end(old), _local_end(new))
        if len(this.old[0]) != len(this.new[0]):
            raise UsageError(f"{old} cannot become {new}", hint=_SAME_VERSION)
        if this.old == this.new:
            raise UsageError(f"a map of {old} to itself changes nothing")
        return this

    def is_about(self, each: FourTuple) -> bool:
        """Whether the connection has the old end."""
        return each.local == self.old[0] and self.old[1] in (None, each.local_port)

    def renamed(self, each: FourTuple) -> FourTuple:
        """The connection with the new end."""
        address, port = self.new
        return each._replace(local=address, local_port=each.local_port if port is None else port)


class LocalMaps:
    """Several maps: the most exact one about a connection counts, and only that."""

    def __init__(self, maps: Iterable[LocalMap] = ()) -> None:
        """Raises UsageError for two maps of one end."""
        self._maps = sorted(maps, key=lambda each: each.old[1] is None)
        if len({each.old for each in self._maps}) != len(self._maps):
            raise UsageError("two maps are of the same local end", hint="say once what it becomes")

    def __bool__(self) -> bool:
        return bool(self._maps)

    def there(self, each: FourTuple) -> FourTuple | None:
        """What the connection is called at its destination; None: as it is called here."""
        chosen = self._about(each)
        return None if chosen is None else chosen.renamed(each)

    def check_used(self, tuples: Iterable[FourTuple]) -> None:
        """Raises UsageError if a map counts for none of these: misspelt, it would let some move under their old end."""
        used = {self._about(each) for each in tuples}
        for each in self._maps:
            if each not in used:
                raise UsageError(
                    f"a map is of the local end {endpoint_text(each.old)}, which no chosen connection has",
                    hint="nothing was moved; tcpmig list shows local ends",
                )

    def clashes(self, tuples: Iterable[FourTuple]) -> set[FourTuple]:
        """Those that would get the name that another of them gets before, or has and keeps."""
        names = {each: self.there(each) for each in tuples}
        taken = {each for each, new in names.items() if new is None}
        clashing = set()
        for each, new in names.items():
            if new in taken:
                clashing.add(each)
            elif new is not None:
                taken.add(new)
        return clashing

    def _about(self, each: FourTuple) -> LocalMap | None:
        return next((one for one in self._maps if one.is_about(each)), None)


def _local_end(text: str) -> Endpoint:
    """An end that a connection can have."""
    address, port = parse_endpoint(text)
    if not address or port == 0:
        raise UsageError(f"{text!r} is no end of a connection", hint="write ADDR or ADDR:PORT")
    what = ipaddress.ip_address(address)
    if what.is_unspecified or what.is_multicast:
        raise UsageError(f"{what} is no address of a connection", hint="write an address of the new host")
    return address, port
