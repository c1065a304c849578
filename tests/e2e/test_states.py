"""Every state of RFC 9293, moved between two hosts, and then on through the rest of its life.

The cases are `migrate.tcpstate`'s: for each state the first of its PATHS that comes through it. The events up to there
happen on one host, the rest on the other; after each of them the kernel agrees with TRANSITIONS, at the end the wire.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from migrate.tcpstate import PATHS, REBUILD, Event, TcpState, Way, step
from tests.fix_netns import Lan
from tests.lives import FAMILIES, Life, judge, option_values_of
from tests.moving import Mover
from tests.waiting import until

FEATURES = {
    "timestamps": "net.ipv4.tcp_timestamps",
    "sack": "net.ipv4.tcp_sack",
    "scaling": "net.ipv4.tcp_window_scaling",
}


class Field:
    """A client, two hosts, and one mover for each family; tests leave nothing but TIME_WAIT in it."""

    def __init__(self, net: Lan, stack: contextlib.ExitStack) -> None:
        self.net = net
        a, b = net.host("a"), net.host("b")
        for host in (a, b):  # a write larger than an initial window shall not wait for autotuning
            host.sysctl("net.ipv4.tcp_wmem", "4096 262144 4194304")
        four = stack.enter_context(Mover(a, b, net.vip4))
        self.movers = {"ipv4": four, "mapped": four, "ipv6": stack.enter_context(Mover(a, b, net.vip6))}

    def life(self, family: str, *, full: bool = False) -> Life:
        self.movers[family].settle()
        return Life(self.net, self.movers[family], family, full=full)


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    with contextlib.ExitStack() as stack:
        net = Lan(("client", "a", "b"))
        stack.callback(net.close)
        yield Field(net, stack)


def way_to(state: TcpState) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
    """The events from CLOSED to the state, and those from there on."""
    for path in PATHS.values():
        now = TcpState.CLOSED
        for position, event in enumerate(path, 1):
            now = step(now, event)[0]
            if now is state:
                return path[:position], path[position:]
    raise AssertionError(f"no path comes through {state.name}")


def begin(life: Life, events: tuple[Event, ...]) -> TcpState:
    """From CLOSED up to the state that is moved."""
    state = TcpState.CLOSED
    if events[0] is Event.ACTIVE_OPEN:
        life.connect(prepare)
        state, rest = TcpState.SYN_SENT, events[1:]
    else:
        life.passive(prepare)
        state, rest = TcpState.ESTABLISHED, events[3:]
    return go_on(life, state, rest)


def go_on(life: Life, state: TcpState, events: tuple[Event, ...]) -> TcpState:
    """Bring the events about; after each the kernel is where the table says."""
    for event in events:
        if event is Event.TIME_WAIT_TIMEOUT:
            break  # a minute; that the entry is there tells enough
        life.happen(event)
        state = step(state, event)[0]
        until(lambda state=state: life.state() is state, what=f"{event.value} leads to {state.name}")  # type: ignore[misc]
    return state


def prepare(sock: socket.socket) -> None:
    """Some options that are not the default."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)


CONNECTED = [state for state, plan in REBUILD.items() if plan.way in (Way.REPAIR, Way.CONNECT)]

DATA = [state for state in CONNECTED if state is not TcpState.SYN_SENT]


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", CONNECTED, ids=lambda state: state.name)
def test_a_connection_lives_on(field: Field, state: TcpState, family: str, full: bool) -> None:
    lives_on(field, state, family, full)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("without", FEATURES)
@pytest.mark.parametrize("state", DATA, ids=lambda state: state.name)
def test_without_a_feature(field: Field, state: TcpState, without: str, family: str) -> None:
    for host in field.net.hosts.values():
        host.sysctl(FEATURES[without], 0)
    try:
        lives_on(field, state, family, True)
    finally:
        for host in field.net.hosts.values():
            host.sysctl(FEATURES[without], 1)


def lives_on(field: Field, state: TcpState, family: str, full: bool) -> None:
    before, after = way_to(state)
    with field.life(family, full=full) as life:
        assert begin(life, before) is state
        if state in DATA and not REBUILD[state].sent_fin:
            life.fill()
        options = option_values_of(life.ours)
        life.move()
        assert life.state() is state
        assert option_values_of(life.ours) == options
        assert life.mover.record
        if full and state in DATA:
            assert life.mover.record.received
            assert bool(life.mover.record.sent) != REBUILD[state].fin_acked
        end = go_on(life, state, after)
        life.deliver()
        until(lambda: life.at_end(life.ours) and life.at_end(life.peer), what="both read the end")
        life.peer.close()
        assert end in (TcpState.TIME_WAIT, TcpState.CLOSED)
        until(lambda: {life.state(), life.peer_state()} <= {TcpState.TIME_WAIT, TcpState.CLOSED})
        judge(life.wire.segments, life.four_tuple)
