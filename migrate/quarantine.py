"""TIME_WAIT: no descriptor leads to it, and the kernel tells nothing of it but the time left.

Its purpose (RFC 9293, section 3.6.1) is to answer a repeated FIN and to keep old segments out of a new connection with
the same four-tuple. Where its numbers are known, from a record that was made while there still was a descriptor, it is
made anew. Else the destination keeps the four-tuple free: nothing comes in for it and nothing leaves, until the time is
over. A peer whose last FIN was not acknowledged then repeats it until it gives up, as it would with a dead host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from migrate.hold import Hold
from migrate.ici import Ici
from migrate.kernel import diag
from migrate.restore import restore
from migrate.tcpstate import TcpState

__all__ = ["quarantine", "record", "recreate", "waits"]


def record(connection: diag.Connection) -> Ici:
    """What is to be known about a connection in TIME_WAIT."""
    local, local_port, remote, remote_port = connection.four_tuple
    return Ici(
        connection.family,
        local,
        local_port,
        remote,
        remote_port,
        TcpState.TIME_WAIT,
        0,
        0,
        origin_host=os.uname().nodename,
        origin_time=time.time_ns(),
        origin_kernel=os.uname().release,
        time_left=max(connection.expires, 0),
    )


def waits(ici: Ici) -> bool:
    """Whether it is a record of TIME_WAIT without numbers, for `quarantine`."""
    return ici.state == TcpState.TIME_WAIT and not ici.mss_clamp


def recreate(ici: Ici) -> None:
    """Make TIME_WAIT here, for its whole time, from a record that has the numbers. Raises as `restore`."""
    restore(ici).close()


def quarantine(records: Iterable[Ici]) -> None:
    """Keep the four-tuples free for the time that each has left; the kernel sees to it, whatever becomes of us.

    Raises PrivilegeError, HostError.
    """
    for ici in records:
        Hold([ici.four_tuple], timeout=max(ici.time_left / 1000, 1.0)).disown()
