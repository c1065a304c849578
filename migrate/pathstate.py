"""What a connection has learnt about its path: the congestion window and the slow start threshold go along.

A restored connection would start from ten segments, like a new one, and not know where slow start should end. The name
of its congestion control is `restore`'s business; what cannot be carried is in docs/path-state.md.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from migrate.errors import Refused
from migrate.ici import Ici
from migrate.kernel.congestion import Congestion
from migrate.restore import Restored

__all__ = ["MOST", "Path", "PathState", "path"]

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
        if sock.record is None:
            raise Refused("it is not a silent restored socket")
        wanted = path(sock.record, age)
        if wanted is None:
            return
        try:
            self._congestion.set(sock, *wanted)
        except OSError:
            sock.unset.append("the congestion window")
