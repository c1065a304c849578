"""TCP states (placeholder: enum only, the table follows)."""

from __future__ import annotations

import enum

__all__ = ["TcpState"]


class TcpState(enum.IntEnum):
    """The eleven states of RFC 9293, numbered as Linux does (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECEIVED = 3
    FIN_WAIT_1 = 4
    FIN_WAIT_2 = 5
    TIME_WAIT = 6
    CLOSED = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
