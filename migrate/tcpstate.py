"""The TCP state machine as data: RFC 9293 figure 5 and section 3.10, and how each state is rebuilt.

What may live here: states, events, the table of transitions, named paths through it, and per state the plan by which
a connection is rebuilt. No socket, no input or output; docs/tcp-states.svg is drawn from these tables.

A pair that stands in no row cannot happen, or RFC 9293 answers the user call with an error: `step` raises IllegalEvent.
Segments that a state only answers (a repeated FIN, a SYN out of place) have rows that stay in the state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, NamedTuple

from migrate.errors import Error, HostError

__all__ = [
    "PATHS",
    "REBUILD",
    "TRANSITIONS",
    "Action",
    "Event",
    "IllegalEvent",
    "Rebuild",
    "Step",
    "TcpState",
    "Way",
    "step",
]


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

    @classmethod
    def from_kernel(cls, number: int) -> TcpState:
        """The state behind a number of the kernel's, which has two more than RFC 9293.

        12 (TCP_NEW_SYN_RECV) is a handshake in a listener's queue, 13 (TCP_BOUND_INACTIVE, seen by sock_diag only)
        a socket that is bound and nothing else. Raises HostError for a number that tcp_states.h did not have.
        """
        try:
            return cls({12: cls.SYN_RECEIVED, 13: cls.CLOSED}.get(number, number))
        except ValueError:
            raise HostError(
                f"the kernel reports TCP state {number}, which is not known here",
                hint="a newer tcpmig may know it",
            ) from None


class Event(enum.Enum):
    """What moves a connection: user calls (section 3.10.1-5), segments (3.10.7), time-outs (3.10.8)."""

    PASSIVE_OPEN = "passive OPEN"
    ACTIVE_OPEN = "active OPEN"
    SEND = "SEND"
    CLOSE = "CLOSE"  # also shutdown(SHUT_WR)
    ABORT = "ABORT"
    RCV_SYN = "rcv SYN"
    RCV_SYN_ACK = "rcv SYN,ACK"
    RCV_ACK_OF_SYN = "rcv ACK of SYN"
    RCV_FIN = "rcv FIN"
    RCV_ACK_OF_FIN = "rcv ACK of FIN"
    RCV_FIN_ACK_OF_FIN = "rcv FIN, ACK of FIN"
    RCV_RST = "rcv RST"
    RCV_RST_PASSIVE = "rcv RST, opened passively"  # the condition that figure 5 puts into its note 1
    TIME_WAIT_TIMEOUT = "2 MSL time-out"
    USER_TIMEOUT = "user time-out"
    RETRANSMISSION_EXHAUSTED = "retransmissions exhausted"  # R2 of section 3.8.3


class Action(enum.Enum):
    """What is sent in answer."""

    NOTHING = ""
    SYN = "snd SYN"
    SYN_ACK = "snd SYN,ACK"
    ACK = "snd ACK"
    DATA = "snd data"
    FIN = "snd FIN"
    RST = "snd RST"


TRANSITIONS: Final[Mapping[TcpState, Mapping[Event, tuple[TcpState, Action]]]] = {
    TcpState.CLOSED: {
        Event.PASSIVE_OPEN: (TcpState.LISTEN, Action.NOTHING),
        Event.ACTIVE_OPEN: (TcpState.SYN_SENT, Action.SYN),
        # There is no connection: this is the RST that a peer gets from a host which let go without a hold.
        Event.RCV_SYN: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN_ACK: (TcpState.CLOSED, Action.RST),
        Event.RCV_FIN: (TcpState.CLOSED, Action.RST),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.LISTEN: {
        # The two that turn a listener into a client are the RFC's alone: Linux refuses them (EISCONN, EPIPE).
        Event.ACTIVE_OPEN: (TcpState.SYN_SENT, Action.SYN),
        Event.SEND: (TcpState.SYN_SENT, Action.SYN),
        Event.CLOSE: (TcpState.CLOSED, Action.NOTHING),
        Event.ABORT: (TcpState.CLOSED, Action.NOTHING),
        # In Linux the listener stays, and a child of it makes this step.
        Event.RCV_SYN: (TcpState.SYN_RECEIVED, Action.SYN_ACK),
        Event.RCV_SYN_ACK: (TcpState.LISTEN, Action.RST),
        Event.RCV_FIN: (TcpState.LISTEN, Action.RST),
        Event.RCV_RST: (TcpState.LISTEN, Action.NOTHING),
    },
    TcpState.SYN_SENT: {
        Event.SEND: (TcpState.SYN_SENT, Action.NOTHING),
        Event.CLOSE: (TcpState.CLOSED, Action.NOTHING),
        Event.ABORT: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_SYN: (TcpState.SYN_RECEIVED, Action.SYN_ACK),
        Event.RCV_SYN_ACK: (TcpState.ESTABLISHED, Action.ACK),
        Event.RCV_FIN: (TcpState.SYN_SENT, Action.NOTHING),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.SYN_RECEIVED: {
        Event.SEND: (TcpState.SYN_RECEIVED, Action.NOTHING),
        Event.CLOSE: (TcpState.FIN_WAIT_1, Action.FIN),
        Event.ABORT: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN: (TcpState.SYN_RECEIVED, Action.ACK),
        Event.RCV_SYN_ACK: (TcpState.ESTABLISHED, Action.NOTHING),  # the other half of a simultaneous open (figure 7)
        Event.RCV_ACK_OF_SYN: (TcpState.ESTABLISHED, Action.NOTHING),
        Event.RCV_FIN: (TcpState.CLOSE_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_RST_PASSIVE: (TcpState.LISTEN, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.ESTABLISHED: {
        Event.SEND: (TcpState.ESTABLISHED, Action.DATA),
        Event.CLOSE: (TcpState.FIN_WAIT_1, Action.FIN),
        Event.ABORT: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN: (TcpState.ESTABLISHED, Action.ACK),  # the challenge ACK of RFC 5961; so in all states below
        Event.RCV_SYN_ACK: (TcpState.ESTABLISHED, Action.ACK),
        Event.RCV_FIN: (TcpState.CLOSE_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.FIN_WAIT_1: {
        Event.ABORT: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN: (TcpState.FIN_WAIT_1, Action.ACK),
        Event.RCV_FIN: (TcpState.CLOSING, Action.ACK),
        Event.RCV_ACK_OF_FIN: (TcpState.FIN_WAIT_2, Action.NOTHING),
        Event.RCV_FIN_ACK_OF_FIN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.FIN_WAIT_2: {
        Event.ABORT: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN: (TcpState.FIN_WAIT_2, Action.ACK),
        Event.RCV_FIN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),  # Linux: tcp_fin_timeout, TCP_LINGER2
    },
    TcpState.CLOSE_WAIT: {
        Event.SEND: (TcpState.CLOSE_WAIT, Action.DATA),
        Event.CLOSE: (TcpState.LAST_ACK, Action.FIN),
        Event.ABORT: (TcpState.CLOSED, Action.RST),
        Event.RCV_SYN: (TcpState.CLOSE_WAIT, Action.ACK),
        Event.RCV_FIN: (TcpState.CLOSE_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.CLOSING: {
        Event.ABORT: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_SYN: (TcpState.CLOSING, Action.ACK),
        Event.RCV_FIN: (TcpState.CLOSING, Action.ACK),
        Event.RCV_ACK_OF_FIN: (TcpState.TIME_WAIT, Action.NOTHING),
        Event.RCV_FIN_ACK_OF_FIN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.LAST_ACK: {
        Event.ABORT: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_SYN: (TcpState.LAST_ACK, Action.ACK),
        Event.RCV_FIN: (TcpState.LAST_ACK, Action.ACK),
        Event.RCV_ACK_OF_FIN: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_FIN_ACK_OF_FIN: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.USER_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
        Event.RETRANSMISSION_EXHAUSTED: (TcpState.CLOSED, Action.NOTHING),
    },
    TcpState.TIME_WAIT: {
        Event.ABORT: (TcpState.CLOSED, Action.NOTHING),
        Event.RCV_SYN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_FIN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_FIN_ACK_OF_FIN: (TcpState.TIME_WAIT, Action.ACK),
        Event.RCV_RST: (TcpState.CLOSED, Action.NOTHING),
        Event.TIME_WAIT_TIMEOUT: (TcpState.CLOSED, Action.NOTHING),
    },
}


class IllegalEvent(Error):
    """An event that cannot happen in that state; nothing changed."""

    def __init__(self, state: TcpState, event: Event) -> None:
        super().__init__(f"{event.value!r} cannot happen in {state.name}")
        self.state = state
        self.event = event


def step(state: TcpState, event: Event) -> tuple[TcpState, Action]:
    """The state after the event, and what is sent. Raises IllegalEvent for a pair without a row."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalEvent(state, event) from None


# Lives of a connection, each from CLOSED to CLOSED.
PATHS: Final[Mapping[str, tuple[Event, ...]]] = {
    "client": (
        Event.ACTIVE_OPEN,
        Event.RCV_SYN_ACK,
        Event.SEND,
        Event.CLOSE,
        Event.RCV_ACK_OF_FIN,
        Event.RCV_FIN,
        Event.TIME_WAIT_TIMEOUT,
    ),
    "server": (
        Event.PASSIVE_OPEN,
        Event.RCV_SYN,
        Event.RCV_ACK_OF_SYN,
        Event.SEND,
        Event.RCV_FIN,
        Event.CLOSE,
        Event.RCV_ACK_OF_FIN,
    ),
    "simultaneous open": (
        Event.ACTIVE_OPEN,
        Event.RCV_SYN,
        Event.RCV_SYN_ACK,
        Event.RCV_FIN,
        Event.CLOSE,
        Event.RCV_ACK_OF_FIN,
    ),
    "simultaneous close": (
        Event.ACTIVE_OPEN,
        Event.RCV_SYN_ACK,
        Event.CLOSE,
        Event.RCV_FIN,
        Event.RCV_ACK_OF_FIN,
        Event.TIME_WAIT_TIMEOUT,
    ),
    "half-close by the peer": (
        Event.PASSIVE_OPEN,
        Event.RCV_SYN,
        Event.RCV_ACK_OF_SYN,
        Event.RCV_FIN,
        Event.SEND,
        Event.CLOSE,
        Event.RCV_FIN,
        Event.RCV_ACK_OF_FIN,
    ),
    "half-close answered in one segment": (
        Event.ACTIVE_OPEN,
        Event.RCV_SYN_ACK,
        Event.CLOSE,
        Event.RCV_FIN_ACK_OF_FIN,
        Event.RCV_FIN_ACK_OF_FIN,
        Event.TIME_WAIT_TIMEOUT,
    ),
}


class Way(enum.Enum):
    """By which calls a state comes back."""

    REPAIR = "repair mode"  # connect in it, then the steps
    CONNECT = "connect again"
    LISTEN = "bind and listen"
    SOCKET = "a fresh socket"
    WAIT = "wait"
    RECREATE = "recreate or quarantine"


class Step(enum.Enum):
    """A step from ESTABLISHED towards a later state, in repair mode, after the sent part of the send queue.

    The numbers of an injected segment come from the record: ACK = snd_una always; SEQ of a FIN = rcv_nxt - 1;
    SEQ of a bare ACK = rcv_nxt, less one if the peer's FIN is still to be injected.
    """

    SHUTDOWN = "shutdown"  # with the send queue selected: then the FIN counts as sent, else it is sent
    INJECT_FIN = "inject FIN"  # the peer's
    INJECT_ACK = "inject ACK"  # of our FIN


class Rebuild(NamedTuple):
    """How a state is dumped and rebuilt. The steps were tried on Linux 6.18.

    TCP_REPAIR_WINDOW is written after the steps, with the record's numbers as they are: an injected segment overwrites
    snd_wl1, snd_wnd, max_window and rcv_wup. Unsent bytes come before SHUTDOWN, and so after repair mode.
    """

    way: Way
    reason: str
    steps: tuple[Step, ...] = ()
    dumpable: bool = True  # a file descriptor leads to it
    speaks: bool = False  # rebuilding it sends a segment, even in repair mode: a hold must stand

    @property
    def sent_fin(self) -> bool:
        """Our FIN is in the sequence space."""
        return Step.SHUTDOWN in self.steps

    @property
    def fin_acked(self) -> bool:
        """SND.UNA lies past our FIN. The send queue begins one before: SHUTDOWN counts the FIN anew."""
        return Step.INJECT_ACK in self.steps

    @property
    def received_fin(self) -> bool:
        """RCV.NXT counts the peer's FIN. The receive queue ends one before: INJECT_FIN counts the FIN anew."""
        return Step.INJECT_FIN in self.steps


REBUILD: Final[Mapping[TcpState, Rebuild]] = {
    TcpState.CLOSED: Rebuild(Way.SOCKET, "bound again if it was bound; unread bytes are still to be had"),
    TcpState.LISTEN: Rebuild(Way.LISTEN, "what waits in its accept queue is accepted and moved on its own"),
    TcpState.SYN_SENT: Rebuild(
        Way.CONNECT, "the send queue begins at snd_una, which is ISS, so that connect() repeats the SYN", speaks=True
    ),
    TcpState.SYN_RECEIVED: Rebuild(
        Way.WAIT, "its handshake is under way: it will be ESTABLISHED, or end", dumpable=False
    ),
    TcpState.ESTABLISHED: Rebuild(Way.REPAIR, "repair mode gives this state"),
    TcpState.FIN_WAIT_1: Rebuild(Way.REPAIR, "our FIN is out", (Step.SHUTDOWN,)),
    TcpState.FIN_WAIT_2: Rebuild(Way.REPAIR, "our FIN is out and acknowledged", (Step.SHUTDOWN, Step.INJECT_ACK)),
    TcpState.CLOSE_WAIT: Rebuild(Way.REPAIR, "the peer's FIN is in", (Step.INJECT_FIN,)),
    TcpState.CLOSING: Rebuild(
        Way.REPAIR,
        "the FINs crossed; the kernel acknowledges the injected one at once",
        (Step.SHUTDOWN, Step.INJECT_FIN),
        speaks=True,
    ),
    TcpState.LAST_ACK: Rebuild(Way.REPAIR, "our FIN followed the peer's", (Step.INJECT_FIN, Step.SHUTDOWN)),
    TcpState.TIME_WAIT: Rebuild(
        Way.RECREATE,
        "no descriptor: made anew where BPF tells its numbers, else the four-tuple is quarantined for the time left",
        (Step.SHUTDOWN, Step.INJECT_ACK, Step.INJECT_FIN),
        dumpable=False,
        speaks=True,
    ),
}
