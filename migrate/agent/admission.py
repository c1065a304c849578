"""Whether connections could come to this host, as things stand: asked before anything stands still."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, Sequence

from migrate.agent.driver import Host, tuples_of
from migrate.agent.steering import FOREIGN, foreign
from migrate.errors import HostError
from migrate.handoff.ids import Connection
from migrate.kernel.diag import SockDiag

__all__ = ["EXISTS", "refusals"]

EXISTS = "this connection exists at the destination already"


def refusals(
    host: Host, diag: SockDiag, connections: Sequence[Connection], steer: str, source: str
) -> dict[bytes, str]:
    """Why some of these could not come from the agent at ``source``, by id. Changes nothing. In the engine's thread."""
    refused = host.journal.conflicts(connections)
    tuples = tuples_of(connections)
    unwanted = host.adopters.refusals(tuples)
    homeless = host.carrier.obstacles({each.local for each in tuples})
    here = diag.existing(tuples)
    left = descriptors_left()
    for connection in connections:
        if connection.id in refused:
            continue
        why = unwanted.get(connection.four_tuple) or homeless.get(connection.four_tuple.local)
        if why is None and connection.four_tuple in here:
            why = EXISTS
        if why is None and left <= 0:
            why = "the destination has no descriptor left for it"
        if why is not None:
            refused[connection.id] = why
        left -= 1
    return {**_cut_off(connections, steer, source, refused), **refused}


def _cut_off(
    connections: Sequence[Connection], steer: str, source: str, refused: Mapping[bytes, str]
) -> dict[bytes, str]:
    """Those that would be cut off, or cut others off: forwarded to here, or left behind by their address."""
    kind, _, device = steer.partition(":")
    if kind == "vip":
        try:
            socket.if_nametoindex(device)
        except OSError:
            return {each.id: f"the destination has no device {device} for its address" for each in connections}
    try:
        odd = set(foreign(tuples_of(connections), source)) if kind in ("vip", "forward") else set()
    except HostError:
        odd = set(tuples_of(connections)) if kind == "forward" else set()
    left_behind = {each.four_tuple.local for each in connections if each.id in refused}
    return {
        each.id: FOREIGN
        for each in connections
        if each.four_tuple in odd and (kind == "forward" or each.four_tuple.local in left_behind)
    }


def descriptors_left() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Since Linux 6.2 the directory's size is their number, which is quicker than to list thousands.
    return soft - (os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))) - 64
