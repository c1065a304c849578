"""What a record says of its path, and how much of that is believed."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from migrate.ici import Ici
from migrate.pathstate import INITIAL, MOST, path

MSS = 1448


def record(cwnd: int, ssthresh: int = 100, *, offered: int = 1 << 30, srtt: float = 0.04, mss: int = MSS) -> Ici:
    """``offered`` in bytes, ``srtt`` in seconds."""
    return Ici(
        family=4,
        local=bytes(4),
        local_port=1,
        remote=bytes(4),
        remote_port=2,
        state=1,
        snd_una=0,
        rcv_nxt=0,
        mss=mss,
        max_window=min(offered, 1073725440),
        cwnd=cwnd,
        ssthresh=ssthresh,
        srtt_us=int(srtt * 1e6),
    )


@pytest.mark.parametrize(
    ("ici", "age", "expected"),
    [
        (record(200), 0, (200, 100)),
        (record(3), 0, (3, 100)),  # less than a new connection has: it learnt that
        (record(200, 0x7FFFFFFF), 0, (200, 0x7FFFFFFF)),
        (record(200, 0xFFFFFFFF), 0, (200, 0x7FFFFFFF)),
        (record(200, 0), 0, (200, 2)),
        (record(200, offered=100 * MSS), 0, (100, 100)),
        (record(200, offered=100 * MSS + 1), 0, (101, 100)),
        (record(200, offered=0), 0, (1, 100)),
        (record(0xFFFFFFFF), 0, (MOST, 100)),
        (record(200), 0.19, (200, 100)),
        (record(200), 0.2, (100, 150)),  # tcp_cwnd_restart()
        (record(200), 0.65, (25, 150)),
        (record(200), 1e9, (INITIAL, 150)),
        (record(3), 1e9, (3, 100)),
        (record(200, srtt=1.0), 0.9, (200, 100)),
    ],
)
def test_what_is_carried(ici: Ici, age: float, expected: tuple[int, int]) -> None:
    assert path(ici, age) == expected


@pytest.mark.parametrize("ici", [record(0), record(200, mss=0), record(INITIAL, 0x7FFFFFFF)])
def test_nothing_that_a_new_connection_has_not(ici: Ici) -> None:
    assert path(ici) is None


@given(st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**30), st.floats(0, 1e12))
def test_whatever_a_record_says_the_kernel_can_take_it(cwnd: int, ssthresh: int, offered: int, age: float) -> None:
    assume(cwnd != INITIAL or ssthresh < 0x7FFFFFFF)
    found = path(record(cwnd, ssthresh, offered=offered), age)
    assert found is not None
    assert 1 <= found.cwnd <= min(cwnd, MOST)
    assert 2 <= found.ssthresh < 1 << 31
