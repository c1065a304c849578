"""What a connection knows of its path: the congestion window, the slow start threshold and ECN go along.

A restored connection would start from ten segments, like a new one, not know where slow start should end, and neither
mark its segments as ECN-capable nor echo marks. The name of its congestion control is `restore`'s business; what cannot
be carried is in docs/path-state.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple, Self

from migrate.errors import Error, Refused
from migrate.ici import Ici
from migrate.kernel.congestion import ECN, Congestion
from migrate.restore import Restored

__all__ = ["MOST", "Marks", "Path", "PathState", "path"]

MOST = 10_000  # segments: a record is somebody else's word, and a window is a burst
INITIAL = 10  # segments, RFC 6928: what no age takes away, for a new connection has it too
_LEAST_RTO = 0.2  # seconds, TCP_RTO_MIN in include/net/tcp.h
_MOST_SSTHRESH = 0x7FFFFFFF  # TCP_INFINITE_SSTHRESH: slow start until something is lost


class Path(NamedTuple):
    """In segments."""

    cwnd: int
    ssthresh: int


def path(ici: Ici, age: float = 0.0) -> Path | None:
    """What that record says, ``age`` seconds after its dump; None if it says nothing that a new connection has not.

    The window is at most what the peer ever offered to take. Each retransmission time-out that has passed halves it,
    as it does for an idle connection (RFC 2861, tcp_cwnd_restart() in net/ipv4/tcp_output.c).
    """
    if not ici.cwnd or not ici.mss or (ici.cwnd == INITIAL and ici.ssthresh >= _MOST_SSTHRESH):
        return None
    cwnd = max(min(ici.cwnd, -(-ici.max_window // ici.mss), MOST), 1)
    ssthresh = min(max(ici.ssthresh, 2), _MOST_SSTHRESH)
    if halvings := int(age / max(_LEAST_RTO, (ici.srtt_us + 4 * ici.rttvar_us) / 1e6)):
        ssthresh = max(ssthresh, cwnd * 3 // 4)
        cwnd = max(cwnd >> min(halvings, 32), min(cwnd, INITIAL))
    return Path(cwnd, ssthresh)


class PathState:
    """Gives restored connections what their records say. A context manager; make it before anything is frozen.

    Raises HostError, PrivilegeError where the kernel does not let us.
    """

    def __init__(self) -> None:
        self._congestion = Congestion()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; doing so again is harmless. Connections keep what they were given."""
        self._congestion.close()

    def carry(self, sock: Restored, *, age: float = 0.0) -> None:
        """To be called between ``restore(…, activate=False)`` and ``activate``; ``age`` as `path` has it.

        Where that fails, `Restored.unset` says so. Raises Refused for any other socket.
        """
        record = _record(sock)
        if (wanted := path(record, age)) is None:
            self.carry_ecn(sock)
            return
        try:
            self._congestion.set(sock, *wanted, ecn=_ecn(record))
        except OSError:
            sock.unset.append("the congestion window")

    def carry_ecn(self, sock: Restored) -> None:
        """The same for ECN alone: it is the connection's, whatever the path has become."""
        if not (ecn := _ecn(_record(sock))):
            return
        try:
            self._congestion.set(sock, ecn=ecn)
        except OSError:
            sock.unset.append("ECN")


class Marks:
    """ECN for those connections that use it, where this host can. A context manager that costs nothing until one comes;
    then getting ready takes some 0.1 s. Not for several threads.
    """

    def __init__(self) -> None:
        self._paths: PathState | None = None
        self._tried = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See `PathState.close`."""
        if self._paths is not None:
            self._paths.close()

    def prepare(self, records: Iterable[Ici]) -> None:
        """Get ready if one of these needs it: before anything is held."""
        if not self._tried and any(map(_ecn, records)):
            self._tried = True
            with contextlib.suppress(Error):
                self._paths = PathState()

    def carry(self, sock: Restored) -> None:
        """As `PathState.carry_ecn`; where this host cannot, `Restored.unset` says so."""
        record = _record(sock)
        if not record.ecn:
            return
        self.prepare([record])
        if self._paths is None or not _ecn(record):
            sock.unset.append("ECN")
        else:
            self._paths.carry_ecn(sock)


def _record(sock: Restored) -> Ici:
    if sock.record is None:
        raise Refused("it is not a silent restored socket")
    return sock.record


def _ecn(record: Ici) -> int:
    """AccECN (2) counts what came with marks, and those counters cannot be set."""
    return ECN if record.ecn == 1 else 0
