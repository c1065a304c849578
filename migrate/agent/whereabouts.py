"""Which connections are here beside those of a batch, and where the sockets of a batch are after a restart."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence

from migrate.fourtuple import FourTuple
from migrate.kernel.diag import SockDiag
from migrate.kernel.pidfd import owners_of
from migrate.selection import Takers
from migrate.tcpstate import TcpState

__all__ = ["PASSING", "living", "others_at", "taken_again"]

PASSING = {TcpState.TIME_WAIT, TcpState.SYN_RECEIVED}
"""What ends or begins by itself."""


def living(gone: Sequence[FourTuple]) -> list[FourTuple]:
    """Connections here with the local addresses of those that are gone."""
    addresses = {each.local for each in gone}
    with SockDiag() as diag:
        return [each.four_tuple for each in diag.list_connections() if each.four_tuple.local in addresses]


def others_at(going: Collection[FourTuple]) -> bool:
    """Whether connections here besides these have their local addresses."""
    local = {each.local for each in going}
    with SockDiag() as diag:
        return any(
            each.four_tuple.local in local and each.four_tuple not in going and each.state not in PASSING
            for each in diag.list_connections()
        )


def taken_again(wanted: Collection[FourTuple]) -> dict[FourTuple, socket.socket]:
    """The sockets of those that are still here, out of their owners."""
    wanted = set(wanted)
    with SockDiag() as diag:
        found = {each.four_tuple: each.inode for each in diag.list_connections() if each.four_tuple in wanted}
    owners = owners_of({inode for inode in found.values() if inode})
    with Takers() as takers:
        sockets, _ = takers.take({each: owners.get(inode, ()) for each, inode in found.items()})
    return sockets
