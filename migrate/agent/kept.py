"""What the hold of a source keeps, on its way to the destination, and what becomes of it if the connections stay."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection
from migrate.kernel import segment

__all__ = ["EARLY", "SentOn", "readdressed"]

EARLY = 16 << 20
"""Bytes of a batch that are sent on before its release, and kept at the destination until its activation, at most."""


class SentOn:
    """What was sent on before the release, as it came here: whoever stays after all needs it too."""

    def __init__(self) -> None:
        self._packets: list[bytes] = []
        self._room = EARLY

    @property
    def full(self) -> bool:
        """More must wait in the hold."""
        return self._room <= 0

    def add(self, packets: Sequence[bytes]) -> None:
        """These too were sent on."""
        self._packets += packets
        self._room -= sum(map(len, packets))

    def take(self, tuples: Collection[FourTuple]) -> list[bytes]:
        """Those of these connections, which are then forgotten here."""
        packets = [(segment.four_tuple(packet) in tuples, packet) for packet in self._packets]
        self._packets = [packet for theirs, packet in packets if not theirs]
        return [packet for theirs, packet in packets if theirs]

    def clear(self) -> None:
        """They were released: nobody needs them here any more."""
        self._packets.clear()


def readdressed(packets: tuple[bytes, ...], connections: Sequence[Connection]) -> tuple[bytes, ...]:
    """The packets as the destination names their connections."""
    there = {each.four_tuple: each.there for each in connections if each.there is not None}
    if not packets or not there:
        return packets
    changed = []
    for packet in packets:
        with contextlib.suppress(Error):  # damaged: the peer repeats it
            new = there.get(segment.four_tuple(packet))
            changed.append(packet if new is None else segment.readdressed(packet, new))
    return tuple(changed)
