"""TIME_WAIT: no descriptor leads to it, and sock_diag tells nothing of it but the time left.

Its purpose (RFC 9293, section 3.6.1) is to answer a repeated FIN and to keep old segments out of a new connection with
the same four-tuple. Where its numbers are known it is made anew: BPF tells them (`kernel.timewait`), or a record that
was made while there still was a descriptor. Else the destination keeps the four-tuple free: nothing comes in for it and
nothing leaves, until the time is over. A peer whose last FIN was not acknowledged then repeats it until it gives up, as
it would with a dead host.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

from migrate.errors import Error
from migrate.hold import Hold
from migrate.ici import Ici
from migrate.kernel import diag, timewait
from migrate.restore import restore
from migrate.tcpstate import TcpState

__all__ = ["keep_free", "records"]

_MSS = 536  # RFC 9293's for a peer that named none: which one it named is forgotten, and nothing is sent any more
_WINDOW = 0xFFFF


def records(connections: Sequence[diag.Connection]) -> list[Ici]:
    """What is to be known about connections in TIME_WAIT in this thread's network namespace."""
    known: dict[int, timewait.Numbers] = {}
    if connections:
        with contextlib.suppress(OSError, LookupError, ValueError):  # no privilege, or a kernel without BTF
            known = timewait.read()
    return [_record(connection, known.get(connection.cookie)) for connection in connections]


def _record(connection: diag.Connection, numbers: timewait.Numbers | None) -> Ici:
    local, local_port, remote, remote_port = connection.four_tuple
    ici = Ici(
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
    if numbers is not None:
        ici.snd_una, ici.rcv_nxt, ici.rcv_wnd = numbers.snd_nxt, numbers.rcv_nxt, numbers.rcv_wnd
        ici.snd_wl1 = ici.rcv_wup = ici.rcv_nxt
        ici.snd_wnd = ici.max_window = _WINDOW
        ici.snd_wscale, ici.rcv_wscale = 0, numbers.rcv_wscale
        ici.timestamps, ici.ts_value, ici.ts_recent = numbers.timestamps, numbers.ts_value, numbers.ts_recent
        ici.mss_clamp = ici.mss = _MSS
    return ici


def keep_free(records: Sequence[Ici]) -> None:
    """Each TIME_WAIT made anew, or quarantined where its numbers, or this host's address, are not known yet.

    Behind a hold: making it sends an acknowledgment, and the RST of a peer that is long through with the connection
    would end it. A quarantine is that hold: the kernel sees to it, whatever becomes of us. Raises PrivilegeError,
    HostError.
    """
    hold = Hold()
    try:
        for ici in records:
            hold.add([ici.four_tuple], timeout=max(ici.time_left / 1000, 1.0))
        hold.remove([ici.four_tuple for ici in records if ici.mss_clamp and _is_made(ici)])
    finally:
        if hold.tuples:
            hold.disown()
        else:
            hold.lift()


def _is_made(ici: Ici) -> bool:
    with contextlib.suppress(Error):
        restore(ici).close()
        return True
    return False
