"""The numbers of many TCP sockets at once, as the kernel keeps them: what a dump needs, for 0.5 µs a socket.

Asked through getsockopt(2) the same takes thirteen calls. `kernel.sockmem` reads the fields without a lock, so a
connection must stand still: held, and in repair mode.

Nobody promises what these fields mean. Therefore whoever uses this compares the first connection with what the
documented calls say, and goes on with those calls where they differ (`migrate.bulk`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from migrate.kernel.btf import Btf, Place
from migrate.kernel.sockmem import Collector, Part, Run

__all__ = ["Negotiated", "Numbers", "Snapshot"]

_CONGESTION, _NAME = "inet_connection_sock.icsk_ca_ops", "tcp_congestion_ops.name"
# Field by field, with the letter that `struct` reads it by.
_FIELDS = {
    "sock_common.skc_family": "H",
    "sock_common.skc_state": "B",
    "sock_common.skc_rcv_saddr": "4s",
    "sock_common.skc_num": "H",
    "sock_common.skc_daddr": "4s",
    "sock_common.skc_dport": "2s",
    "sock.sk_backlog.rmem_alloc": "I",
    "sock.sk_wmem_queued": "i",
    "sock.sk_rcvbuf": "i",
    "tcp_sock.write_seq": "I",
    "tcp_sock.snd_una": "I",
    "tcp_sock.snd_nxt": "I",
    "tcp_sock.rcv_nxt": "I",
    "tcp_sock.copied_seq": "I",
    "tcp_sock.snd_wl1": "I",
    "tcp_sock.snd_wnd": "I",
    "tcp_sock.max_window": "I",
    "tcp_sock.rcv_wnd": "I",
    "tcp_sock.rcv_wup": "I",
    "tcp_sock.rx_opt.mss_clamp": "H",
    "tcp_sock.mss_cache": "I",
    "tcp_sock.advmss": "H",
    "tcp_sock.tsoffset": "I",
    "tcp_sock.snd_cwnd": "I",
    "tcp_sock.snd_ssthresh": "I",
    "tcp_sock.srtt_us": "I",
    "tcp_sock.mdev_us": "I",
    "tcp_sock.urg_data": "H",
    "sock.sk_peek_off": "i",
}
_ADDRESSES6 = ("sock_common.skc_v6_rcv_saddr", "sock_common.skc_v6_daddr")
# Bit fields; of each the byte that it lies in is copied.
_BITS = (
    "tcp_sock.rx_opt.tstamp_ok",
    "tcp_sock.rx_opt.sack_ok",
    "tcp_sock.rx_opt.wscale_ok",
    "tcp_sock.rx_opt.snd_wscale",
    "tcp_sock.rx_opt.rcv_wscale",
    "tcp_sock.tcp_usec_ts",
    "tcp_sock.ecn_flags",
)
_ECN, _ACCECN = 1, 16  # TCP_ECN_OK or TCP_ECN_MODE_RFC3168, TCP_ECN_MODE_ACCECN (include/net/tcp.h)


class Negotiated(NamedTuple):
    """What the bit fields say, and the congestion control: alike for most connections."""

    timestamps: int  # 0 none, 1 milliseconds, 2 microseconds
    sack: bool
    snd_wscale: int  # -1: none
    rcv_wscale: int
    ecn: int  # 0 none, 1 ECN, 2 AccECN
    congestion: str  # its name


class Numbers(NamedTuple):
    """One socket's, in host order but for addresses and the peer's port; names as in struct tcp_sock."""

    family: int
    state: int
    local4: bytes
    local_port: int
    remote4: bytes
    remote_port: bytes  # network order
    rmem_alloc: int
    wmem_queued: int
    rcvbuf: int
    write_seq: int
    snd_una: int
    snd_nxt: int
    rcv_nxt: int
    copied_seq: int
    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int
    mss_clamp: int
    mss_cache: int
    advmss: int
    tsoffset: int
    snd_cwnd: int
    snd_ssthresh: int
    srtt_us: int  # eighths of microseconds
    mdev_us: int  # quarters of microseconds
    urg_data: int  # 0: no urgent byte is unread
    peek_off: int  # SO_PEEK_OFF
    addresses6: bytes  # local and remote, 16 bytes each
    bits: bytes  # `Snapshot.negotiated` reads them


class Snapshot:
    """Takes snapshots. Raises OSError, LookupError or ValueError where this host or this process cannot."""

    def __init__(self) -> None:
        btf = Btf()
        self._bits = [btf.place(field) for field in _BITS]
        if any(place.size != 1 for place in self._bits):
            raise ValueError("a bit field goes over a byte's end")
        own = [Run(btf.place(field).offset, struct.calcsize("=" + letter)) for field, letter in _FIELDS.items()]
        own += [Run(btf.place(field).offset, 16) for field in _ADDRESSES6]
        own += [Run(place.offset, 1) for place in self._bits]
        name = Part(btf.place(_CONGESTION).offset, [Run(btf.place(_NAME).offset, 16)])
        self._unpack = struct.Struct("=" + "".join(_FIELDS.values()) + f"32s{len(_BITS) + 16}s").unpack_from
        self._collector = Collector(btf, [Part(None, own), name])
        self.negotiated = functools.lru_cache(maxsize=256)(self._negotiated)

    def take_many(self, descriptors: Sequence[int]) -> list[tuple[Any, ...]]:
        """Of each of these descriptors of this process, which must be TCP sockets, what `Numbers` names."""
        unpack, batches = self._unpack, self._collector.batches(descriptors)
        return [unpack(memory, at) for memory, places in batches for at in places]

    def close(self) -> None:
        """Give the program back."""
        self._collector.close()

    def _negotiated(self, raw: bytes) -> Negotiated:
        tstamp, sack, wscale, snd_wscale, rcv_wscale, usec, ecn = map(_shifted, raw, self._bits)
        return Negotiated(
            (2 if usec else 1) if tstamp else 0,
            sack != 0,
            snd_wscale if wscale else -1,
            rcv_wscale if wscale else -1,
            2 if ecn & _ACCECN else 1 if ecn & _ECN else 0,
            raw[len(self._bits) :].partition(b"\0")[0].decode("ascii", "replace"),
        )


def _shifted(byte: int, place: Place) -> int:
    mask = place.mask or 0xFF
    return (byte & mask) >> (mask & -mask).bit_length() - 1
