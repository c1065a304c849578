"""The numbers of connections in TIME_WAIT, which no descriptor leads to and sock_diag does not tell.

A BPF program (`kernel.bpf`) sees every TCP socket of this network namespace and hands over those that are a
`struct tcp_timewait_sock`; `kernel.btf` says where the numbers lie in it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from migrate.kernel import bpf
from migrate.kernel.btf import Btf

__all__ = ["Numbers", "read"]

_KTIME_GET_NS, _SEQ_WRITE = 5, 127  # enum bpf_func_id
_TIME_WAIT = 6  # TCP_TIME_WAIT; an abandoned FIN_WAIT_2 has it too, and says so in tw_substate
_SOCK = "tcp_timewait_sock"
_COMMON = "tcp_timewait_sock.tw_sk.__tw_common"
_CLOCK = struct.Struct("=Q")
# In the order in which `read` takes them, with the letter that `struct` reads each by.
_FIELDS = {
    f"{_COMMON}.skc_cookie": "Q",
    f"{_SOCK}.tw_sk.tw_substate": "B",
    f"{_COMMON}.skc_tw_snd_nxt": "I",
    f"{_COMMON}.skc_tw_rcv_nxt": "I",
    f"{_SOCK}.tw_rcv_wnd": "I",
    f"{_SOCK}.tw_ts_offset": "I",
    f"{_SOCK}.tw_ts_recent": "I",
    f"{_SOCK}.tw_ts_recent_stamp": "i",
}
_BITS = (f"{_SOCK}.tw_sk.tw_rcv_wscale", f"{_SOCK}.tw_sk.tw_usec_ts")


class Numbers(NamedTuple):
    """Of one connection; sequence numbers count both FINs."""

    snd_nxt: int
    rcv_nxt: int
    rcv_wnd: int  # bytes
    rcv_wscale: int
    timestamps: int  # 0 none, 1 milliseconds, 2 microseconds
    ts_value: int  # the clock that its timestamps are taken from
    ts_recent: int  # the peer's last


def read() -> dict[int, Numbers]:
    """All of this thread's network namespace, by the socket's cookie, as `kernel.diag` gives it.

    Raises OSError, LookupError or ValueError where this host or this process cannot.
    """
    btf = Btf()
    size = btf.size(_SOCK)
    row = struct.Struct(f"={size}s{_CLOCK.size}s")
    places = [(btf.place(field).offset, struct.Struct("=" + letter)) for field, letter in _FIELDS.items()]
    scale, microseconds = (btf.place(field) for field in _BITS)
    found: dict[int, Numbers] = {}
    for sock, clock in row.iter_unpack(bpf.iterated(_code(btf, size), btf.function("bpf_iter_tcp"))):
        cookie, state, snd_nxt, rcv_nxt, rcv_wnd, offset, recent, stamp = (
            form.unpack_from(sock, at)[0] for at, form in places
        )
        if state == _TIME_WAIT:
            unit = 2 if sock[microseconds.offset] & microseconds.mask else 1
            ticks = _CLOCK.unpack(clock)[0] // (1000 if unit == 2 else 1_000_000) + offset & 0xFFFFFFFF
            wscale = sock[scale.offset] & (scale.mask or 0xFF)
            found[cookie] = Numbers(snd_nxt, rcv_nxt, rcv_wnd, wscale, unit if stamp else 0, ticks, recent)
    return found


def _code(btf: Btf, size: int) -> bytes:
    """Registers: 6 the iterator's argument, 7 the socket. On the stack: a copy of the socket, the clock behind it."""
    length = size + _CLOCK.size
    write = bpf.call(_KTIME_GET_NS) + bpf.store(bpf.FRAME, 0, -_CLOCK.size)
    write += bpf.move(1, bpf.FRAME) + bpf.add(1, -length) + bpf.put(2, size) + bpf.move(3, 7)
    write += bpf.call(bpf.PROBE_READ_KERNEL)
    write += bpf.load(1, 6, btf.place("bpf_iter__tcp.meta").offset)
    write += bpf.load(1, 1, btf.place("bpf_iter_meta.seq").offset)
    write += bpf.move(2, bpf.FRAME) + bpf.add(2, -length) + bpf.put(3, length) + bpf.call(_SEQ_WRITE)

    test = bpf.load(1, 7, btf.place("sock_common.skc_state").offset, width=1)
    test += bpf.jump_unless_equal(1, _TIME_WAIT, len(write) // bpf.INSTRUCTION)
    begin = bpf.move(6, 1) + bpf.load(7, 6, btf.place("bpf_iter__tcp.sk_common").offset)
    begin += bpf.jump_if_equal(7, 0, len(test + write) // bpf.INSTRUCTION)
    return begin + test + write + bpf.put(0, 0) + bpf.leave()
