"""struct tcp_info (include/uapi/linux/tcp.h): what the kernel tells about a connection, read out of raw bytes.

The bytes come from getsockopt(IPPROTO_TCP, TCP_INFO) or from a sock_diag dump (INET_DIAG_INFO). The structure only
ever grew at its end, and an older kernel returns fewer bytes. `TcpInfo` is the whole structure in the kernel's order
and with its names less the ``tcpi_``; `reader` makes a quick function for a few fields.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["SIZE", "TcpInfo", "parse", "reader", "scales"]


class TcpInfo(NamedTuple):
    """The whole structure. Lengths and windows are bytes after scaling, counts are segments unless named ``bytes``.

    What the kernel did not fill, being older, reads as 0.
    """

    state: int
    ca_state: int
    retransmits: int
    probes: int
    backoff: int
    options: int  # bits: uapi.TCPI_OPT_*
    wscales: int  # both window scales: `scales` takes them apart
    flags: int  # delivery_rate_app_limited : 1, fastopen_client_fail : 2
    rto: int  # microseconds
    ato: int  # microseconds
    snd_mss: int
    rcv_mss: int
    unacked: int  # segments; of a listener: the length of its accept queue
    sacked: int  # segments; of a listener: its backlog
    lost: int
    retrans: int
    fackets: int
    last_data_sent: int  # milliseconds ago, as the next three
    last_ack_sent: int  # always 0
    last_data_recv: int
    last_ack_recv: int
    pmtu: int
    rcv_ssthresh: int
    rtt: int  # microseconds, smoothed
    rttvar: int  # microseconds
    snd_ssthresh: int  # segments; 0x7fffffff: none yet
    snd_cwnd: int  # segments
    advmss: int
    reordering: int
    rcv_rtt: int  # microseconds
    rcv_space: int
    total_retrans: int
    pacing_rate: int  # bytes a second; all ones: no limit
    max_pacing_rate: int
    bytes_acked: int
    bytes_received: int
    segs_out: int
    segs_in: int
    notsent_bytes: int
    min_rtt: int  # microseconds
    data_segs_in: int
    data_segs_out: int
    delivery_rate: int  # bytes a second
    busy_time: int  # microseconds, as the next two
    rwnd_limited: int
    sndbuf_limited: int
    delivered: int
    delivered_ce: int
    bytes_sent: int
    bytes_retrans: int
    dsack_dups: int
    reord_seen: int
    rcv_ooopack: int
    snd_wnd: int  # the last field of Linux 5.4
    rcv_wnd: int
    rehash: int
    total_rto: int
    total_rto_recoveries: int
    total_rto_time: int  # milliseconds
    received_ce: int
    delivered_e1_bytes: int
    delivered_e0_bytes: int
    delivered_ce_bytes: int
    received_e1_bytes: int
    received_e0_bytes: int
    received_ce_bytes: int
    accecn_fail_mode: int
    accecn_opt_seen: int


# One letter a field; every member is aligned to its own size, so "=" (no padding) places them as C does.
_FORMATS = "B" * 8 + "I" * 24 + "Q" * 4 + "I" * 6 + "Q" * 4 + "II" + "QQ" + "IIII" + "II" + "HHI" + "I" * 7 + "HH"
_OFFSETS = (0, *itertools.accumulate(struct.calcsize(letter) for letter in _FORMATS))
_WHOLE = struct.Struct("=" + _FORMATS)

SIZE = _WHOLE.size  # bytes to ask getsockopt for


def parse(raw: bytes) -> TcpInfo:
    """All of it; bytes that are missing at the end count as zeros, those too many are ignored."""
    return TcpInfo._make(_WHOLE.unpack_from(raw.ljust(SIZE, b"\0")))


def reader(*names: str) -> Callable[[bytes], tuple[Any, ...]]:
    """A function from the raw bytes to the tuple of just these fields, in one unpacking.

    The names are those of `TcpInfo`, in its order, up to ``snd_wnd``: later ones are missing on some kernels.
    """
    fields = [TcpInfo._fields.index(name) for name in names]
    if fields != sorted(fields) or fields[-1] > TcpInfo._fields.index("snd_wnd"):
        raise ValueError(f"not in the order of struct tcp_info, or not on every kernel: {names}")
    layout, end = "=", 0
    for field in fields:
        layout += f"{_OFFSETS[field] - end}x{_FORMATS[field]}"
        end = _OFFSETS[field + 1]
    return struct.Struct(layout).unpack_from


def scales(wscales: int) -> tuple[int, int]:
    """(tcpi_snd_wscale, tcpi_rcv_wscale) of the byte that holds both: C bit-fields follow the machine's byte order."""
    low, high = wscales & 15, wscales >> 4
    return (low, high) if sys.byteorder == "little" else (high, low)
