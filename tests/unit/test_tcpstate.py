"""The state machine: RFC 9293 on one side, the table on the other."""

from __future__ import annotations

import copy

import pytest

from migrate.errors import Error, HostError
from migrate.tcpstate import PATHS, REBUILD, TRANSITIONS, Action, Event, IllegalEvent, Step, TcpState, Way, step

# Every arrow of RFC 9293 figure 5, with the two that its notes add, as they are printed there.
FIGURE_5 = """
    CLOSED        passive OPEN          LISTEN        -
    CLOSED        active OPEN           SYN_SENT      snd SYN
    LISTEN        rcv SYN               SYN_RECEIVED  snd SYN,ACK
    LISTEN        SEND                  SYN_SENT      snd SYN
    LISTEN        CLOSE                 CLOSED        -
    SYN_SENT      rcv SYN               SYN_RECEIVED  snd SYN,ACK
    SYN_SENT      rcv SYN,ACK           ESTABLISHED   snd ACK
    SYN_SENT      CLOSE                 CLOSED        -
    SYN_RECEIVED  rcv ACK of SYN        ESTABLISHED   -
    SYN_RECEIVED  CLOSE                 FIN_WAIT_1    snd FIN
    SYN_RECEIVED  rcv RST, opened passively  LISTEN   -
    ESTABLISHED   CLOSE                 FIN_WAIT_1    snd FIN
    ESTABLISHED   rcv FIN               CLOSE_WAIT    snd ACK
    FIN_WAIT_1    rcv ACK of FIN        FIN_WAIT_2    -
    FIN_WAIT_1    rcv FIN               CLOSING       snd ACK
    FIN_WAIT_1    rcv FIN, ACK of FIN   TIME_WAIT     snd ACK
    FIN_WAIT_2    rcv FIN               TIME_WAIT     snd ACK
    CLOSE_WAIT    CLOSE                 LAST_ACK      snd FIN
    CLOSING       rcv ACK of FIN        TIME_WAIT     -
    LAST_ACK      rcv ACK of FIN        CLOSED        -
    TIME_WAIT     2 MSL time-out        CLOSED        -
"""

S = TcpState
LIVES = {
    "client": [S.SYN_SENT, S.ESTABLISHED, S.ESTABLISHED, S.FIN_WAIT_1, S.FIN_WAIT_2, S.TIME_WAIT, S.CLOSED],
    "server": [S.LISTEN, S.SYN_RECEIVED, S.ESTABLISHED, S.ESTABLISHED, S.CLOSE_WAIT, S.LAST_ACK, S.CLOSED],
    "simultaneous open": [S.SYN_SENT, S.SYN_RECEIVED, S.ESTABLISHED, S.CLOSE_WAIT, S.LAST_ACK, S.CLOSED],
    "simultaneous close": [S.SYN_SENT, S.ESTABLISHED, S.FIN_WAIT_1, S.CLOSING, S.TIME_WAIT, S.CLOSED],
    "half-close by the peer": [
        *(S.LISTEN, S.SYN_RECEIVED, S.ESTABLISHED, S.CLOSE_WAIT, S.CLOSE_WAIT, S.LAST_ACK, S.LAST_ACK, S.CLOSED)
    ],
    "half-close answered in one segment": [
        *(S.SYN_SENT, S.ESTABLISHED, S.FIN_WAIT_1, S.TIME_WAIT, S.TIME_WAIT, S.CLOSED)
    ],
}


# What section 3.10 and figure 7 add to the figure, besides what `added` lists by rule.
ADDED = {
    (S.LISTEN, Event.ACTIVE_OPEN, S.SYN_SENT, Action.SYN),  # 3.10.1, what SEND does in the figure
    (S.SYN_RECEIVED, Event.RCV_SYN_ACK, S.ESTABLISHED, Action.NOTHING),  # figure 7
    (S.SYN_RECEIVED, Event.RCV_FIN, S.CLOSE_WAIT, Action.ACK),  # 3.10.7.4: its ACK comes first
    (S.CLOSING, Event.RCV_FIN_ACK_OF_FIN, S.TIME_WAIT, Action.ACK),  # a repeated FIN that acknowledges ours
    (S.LAST_ACK, Event.RCV_FIN_ACK_OF_FIN, S.CLOSED, Action.NOTHING),
    (S.TIME_WAIT, Event.RCV_FIN_ACK_OF_FIN, S.TIME_WAIT, Action.ACK),
    (S.ESTABLISHED, Event.RCV_SYN_ACK, S.ESTABLISHED, Action.ACK),  # our ACK was lost
    (S.SYN_SENT, Event.RCV_FIN, S.SYN_SENT, Action.NOTHING),  # 3.10.7.4, eighth: it cannot be validated
}
SYNCHRONISED = set(TcpState) - {S.CLOSED, S.LISTEN, S.SYN_SENT, S.SYN_RECEIVED}
UNACKNOWLEDGED = set(TcpState) - {S.CLOSED, S.LISTEN, S.FIN_WAIT_2, S.TIME_WAIT}  # something of ours may be


def added() -> set[tuple[TcpState, Event, TcpState, Action]]:
    """Resets, aborts, time-outs, calls that wait, segments that are only answered."""
    told = {S.SYN_RECEIVED, S.ESTABLISHED, S.FIN_WAIT_1, S.FIN_WAIT_2, S.CLOSE_WAIT}  # 3.10.5
    rows = {(s, Event.ABORT, S.CLOSED, Action.RST if s in told else Action.NOTHING) for s in set(S) - {S.CLOSED}}
    rows |= {(s, Event.RCV_RST, s if s is S.LISTEN else S.CLOSED, Action.NOTHING) for s in S}
    rows |= {(s, Event.USER_TIMEOUT, S.CLOSED, Action.NOTHING) for s in UNACKNOWLEDGED | {S.FIN_WAIT_2}}
    rows |= {(s, Event.RETRANSMISSION_EXHAUSTED, S.CLOSED, Action.NOTHING) for s in UNACKNOWLEDGED}
    rows |= {(s, Event.SEND, s, Action.DATA) for s in (S.ESTABLISHED, S.CLOSE_WAIT)}
    rows |= {(s, Event.SEND, s, Action.NOTHING) for s in (S.SYN_SENT, S.SYN_RECEIVED)}  # queued
    rows |= {(s, Event.RCV_SYN, s, Action.ACK) for s in SYNCHRONISED | {S.SYN_RECEIVED}}  # RFC 5961
    rows |= {(s, Event.RCV_FIN, s, Action.ACK) for s in (S.CLOSE_WAIT, S.CLOSING, S.LAST_ACK, S.TIME_WAIT)}
    rows |= {(S.CLOSED, event, S.CLOSED, Action.RST) for event in (Event.RCV_SYN, Event.RCV_SYN_ACK, Event.RCV_FIN)}
    rows |= {(S.LISTEN, event, S.LISTEN, Action.RST) for event in (Event.RCV_SYN_ACK, Event.RCV_FIN)}
    return rows


def figure_5() -> set[tuple[TcpState, Event, TcpState, Action]]:
    arrows = set()
    for line in FIGURE_5.strip().splitlines():
        before, event, after, sent = (word.strip() for word in line.split("  ") if word.strip())
        arrows.add((S.__members__[before], Event(event), S.__members__[after], Action("" if sent == "-" else sent)))
    return arrows


def test_the_table_is_figure_5_and_section_3_10() -> None:
    table = {
        (before, event, after, action) for before, row in TRANSITIONS.items() for event, (after, action) in row.items()
    }
    assert len(figure_5()) == 21
    assert table == figure_5() | ADDED | added()


def test_each_state_has_its_rows_and_its_plan() -> None:
    assert list(TcpState) == sorted(TRANSITIONS) == sorted(REBUILD)
    assert all(TRANSITIONS.values())


@pytest.mark.parametrize("state", TcpState)
@pytest.mark.parametrize("event", Event)
def test_a_pair_without_a_row_is_refused_and_changes_nothing(state: TcpState, event: Event) -> None:
    before = copy.deepcopy(TRANSITIONS)
    if event in TRANSITIONS[state]:
        assert step(state, event) == TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalEvent) as caught:
            step(state, event)
        assert (caught.value.state, caught.value.event) == (state, event)
        assert str(caught.value) == f"{event.value!r} cannot happen in {state.name}"
        assert isinstance(caught.value, Error)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert before == TRANSITIONS


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (S.CLOSED, Event.CLOSE),  # "connection does not exist"
        (S.CLOSED, Event.SEND),
        (S.LISTEN, Event.PASSIVE_OPEN),  # "connection already exists"
        (S.ESTABLISHED, Event.ACTIVE_OPEN),
        (S.ESTABLISHED, Event.RCV_ACK_OF_FIN),  # no FIN was sent
        (S.FIN_WAIT_1, Event.SEND),  # "connection closing"
        (S.FIN_WAIT_2, Event.CLOSE),
        (S.FIN_WAIT_2, Event.RCV_ACK_OF_FIN),
        (S.LAST_ACK, Event.CLOSE),
        (S.TIME_WAIT, Event.SEND),
        (S.ESTABLISHED, Event.TIME_WAIT_TIMEOUT),
        (S.TIME_WAIT, Event.RETRANSMISSION_EXHAUSTED),  # nothing is unacknowledged
        (S.FIN_WAIT_2, Event.RETRANSMISSION_EXHAUSTED),
    ],
)
def test_what_rfc_9293_calls_an_error(state: TcpState, event: Event) -> None:
    with pytest.raises(IllegalEvent):
        step(state, event)


def test_a_fin_is_sent_exactly_on_the_way_into_a_state_that_has_sent_one() -> None:
    for state, row in TRANSITIONS.items():
        for after, action in row.values():
            if action is Action.FIN:
                assert not REBUILD[state].sent_fin and REBUILD[after].sent_fin
            elif after is not S.CLOSED:
                assert REBUILD[state].sent_fin == REBUILD[after].sent_fin


def test_every_state_can_be_reached_and_every_connection_can_end() -> None:
    def reachable(start: TcpState) -> set[TcpState]:
        found, waiting = {start}, [start]
        while waiting:
            new = {after for after, _ in TRANSITIONS[waiting.pop()].values()} - found
            found |= new
            waiting += new
        return found

    assert reachable(S.CLOSED) == set(TcpState)
    assert all(S.CLOSED in reachable(state) for state in TcpState)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_leads_through_these_states(name: str) -> None:
    state, lived = S.CLOSED, []
    for event in PATHS[name]:
        state, _ = step(state, event)
        lived.append(state)
    assert lived == LIVES[name]


def test_the_paths_go_through_every_state() -> None:
    assert {state for life in LIVES.values() for state in life} == set(TcpState)


def test_a_rebuilt_state_is_where_its_steps_lead() -> None:
    """Shutdown is a CLOSE, an injected segment one that was received: from ESTABLISHED they must end in the state."""
    event = {Step.SHUTDOWN: Event.CLOSE, Step.INJECT_FIN: Event.RCV_FIN, Step.INJECT_ACK: Event.RCV_ACK_OF_FIN}
    for state, plan in REBUILD.items():
        if plan.way in (Way.REPAIR, Way.RECREATE):
            reached = S.ESTABLISHED
            for each in plan.steps:
                reached, _ = step(reached, event[each])
            assert reached is state
        else:
            assert plan.steps == ()


def test_which_fins_count_where() -> None:
    assert {state for state, plan in REBUILD.items() if plan.sent_fin} == {
        *(S.FIN_WAIT_1, S.FIN_WAIT_2, S.CLOSING, S.LAST_ACK, S.TIME_WAIT)
    }
    assert {state for state, plan in REBUILD.items() if plan.fin_acked} == {S.FIN_WAIT_2, S.TIME_WAIT}
    assert {state for state, plan in REBUILD.items() if plan.received_fin} == {
        *(S.CLOSE_WAIT, S.CLOSING, S.LAST_ACK, S.TIME_WAIT)
    }


def test_what_has_no_descriptor_cannot_be_dumped() -> None:
    assert {state for state, plan in REBUILD.items() if not plan.dumpable} == {S.SYN_RECEIVED, S.TIME_WAIT}
    assert all(plan.reason for plan in REBUILD.values())


def test_rebuilding_speaks_where_the_kernel_cannot_be_kept_silent() -> None:
    assert {state for state, plan in REBUILD.items() if plan.speaks} == {S.SYN_SENT, S.CLOSING, S.TIME_WAIT}


def test_numbers_are_the_kernels() -> None:
    """include/net/tcp_states.h; 12 and 13 are not in RFC 9293."""
    names = (
        "ESTABLISHED SYN_SENT SYN_RECEIVED FIN_WAIT_1 FIN_WAIT_2 TIME_WAIT CLOSED CLOSE_WAIT LAST_ACK LISTEN CLOSING"
    )
    assert [S.from_kernel(number).name for number in range(1, 12)] == names.split()
    assert S.from_kernel(12) is S.SYN_RECEIVED
    assert S.from_kernel(13) is S.CLOSED


@pytest.mark.parametrize("number", [0, 14, -1])
def test_an_unknown_number_is_the_hosts_fault(number: int) -> None:
    with pytest.raises(HostError, match=f"TCP state {number}, which is not known here"):
        S.from_kernel(number)
