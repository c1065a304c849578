"""The numbers of many TCP sockets at once, as the kernel keeps them: what a dump needs, for 0.5 µs a socket.

Asked through getsockopt(2) the same takes thirteen calls. A BPF program (`kernel.bpf`) goes from this thread's
descriptor table to the sockets and copies the fields that the kernel's type information locates. It takes no lock, so
a connection must stand still: held, and in repair mode.

Nobody promises what these fields mean. Therefore whoever uses this compares the first connection with what the
documented calls say, and goes on with those calls where they differ (`migrate.bulk`).
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from migrate.kernel import bpf
from migrate.kernel.btf import Btf, Place

__all__ = ["Negotiated", "Numbers", "Snapshot"]

BATCH = 16  # sockets a run: the kernel verifies the loop turn by turn

_PATH = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk")
_ULP, _CONGESTION = "inet_connection_sock.icsk_ulp_ops", "inet_connection_sock.icsk_ca_ops"
_NAME = "tcp_congestion_ops.name"
# Field by field, with the letter that `struct` reads it by.
_FIELDS = {
    "sock_common.skc_family": "H",
    "sock_common.skc_state": "B",
    "sock.sk_protocol": "H",
    _ULP: "Q",
    "sock_common.skc_rcv_saddr": "4s",
    "sock_common.skc_num": "H",
    "sock_common.skc_daddr": "4s",
    "sock_common.skc_dport": "2s",
    "sock_common.skc_v6_rcv_saddr": "16s",
    "sock_common.skc_v6_daddr": "16s",
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
}
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

_GET_CURRENT_TASK, _PROBE_READ_KERNEL = 35, 113  # enum bpf_func_id
_HEADS = [struct.Struct(f"=II{count}i") for count in range(BATCH + 1)]
_HEAD = _HEADS[BATCH].size


class Negotiated(NamedTuple):
    """What the bit fields say."""

    timestamps: int  # 0 none, 1 milliseconds, 2 microseconds
    sack: bool
    snd_wscale: int  # -1: none
    rcv_wscale: int
    ecn: int  # 0 none, 1 ECN, 2 AccECN


class Numbers(NamedTuple):
    """One socket's, in host order but for addresses and the peer's port; names as in struct tcp_sock."""

    family: int
    state: int
    protocol: int
    upper_layer: int  # an address, 0 for none
    local4: bytes
    local_port: int
    remote4: bytes
    remote_port: bytes  # network order
    local6: bytes
    remote6: bytes
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
    bits: bytes  # `Snapshot.negotiated` reads them
    congestion: bytes  # NUL-terminated


class Snapshot:
    """Takes snapshots. Raises OSError, LookupError or ValueError where this host or this process cannot."""

    def __init__(self) -> None:
        btf = Btf()
        self._bits = [btf.place(field) for field in _BITS]
        if any(place.size != 1 for place in self._bits):
            raise ValueError("a bit field goes over a byte's end")
        self._layout = struct.Struct("=" + "".join(_FIELDS.values()) + f"{len(_BITS)}s16s")
        self._stride = (self._layout.size + 7) // 8 * 8
        self._program = bpf.Program(_HEAD + BATCH * self._stride, self._code(btf))
        self._lock = threading.Lock()  # of the shared memory
        self.negotiated = functools.lru_cache(maxsize=256)(self._negotiated)

    def take_many(self, descriptors: Sequence[int]) -> list[tuple[Any, ...]]:
        """Of each of these descriptors of this process, which must be TCP sockets, what `Numbers` names."""
        taken: list[tuple[Any, ...]] = []
        memory, unpack, stride = self._program.memory, self._layout.unpack_from, self._stride
        with self._lock:
            for start in range(0, len(descriptors), BATCH):
                batch = descriptors[start : start + BATCH]
                count = len(batch)
                _HEADS[count].pack_into(memory, 0, count, 0, *batch)
                self._program.run()
                taken += [unpack(memory, at) for at in range(_HEAD, _HEAD + count * stride, stride)]
        return taken

    def close(self) -> None:
        """Give the program back."""
        self._program.close()

    def _negotiated(self, raw: bytes) -> Negotiated:
        tstamp, sack, wscale, snd_wscale, rcv_wscale, usec, ecn = (
            _shifted(byte, place) for byte, place in zip(raw, self._bits, strict=True)
        )
        return Negotiated(
            (2 if usec else 1) if tstamp else 0,
            sack != 0,
            snd_wscale if wscale else -1,
            rcv_wscale if wscale else -1,
            2 if ecn & _ACCECN else 1 if ecn & _ECN else 0,
        )

    def _code(self, btf: Btf) -> bytes:
        """Registers: 6 the memory, 7 the descriptor table, 8 the turn, 9 the structure at hand.

        On the stack: at -8 a pointer just read, at -16 where this socket's numbers go.
        """
        task_files, files_table, table_descriptors, *to_socket = (btf.place(step).offset for step in _PATH)
        before = bpf.call(_GET_CURRENT_TASK) + bpf.move(7, 0)
        for offset in (task_files, files_table, table_descriptors):
            before += _follow(7, 7, offset)
        before += bpf.put(8, 0)

        turn = bpf.move(1, 8) + bpf.multiply(1, 4) + bpf.add_register(1, bpf.SHARED) + bpf.load(1, 1, 8, width=4)
        turn += bpf.multiply(1, 8) + bpf.move(9, 7) + bpf.add_register(9, 1)  # the descriptor's place in the table
        for offset in (0, *to_socket):
            turn += _follow(9, 9, offset)
        turn += bpf.move(1, 8) + bpf.multiply(1, self._stride) + bpf.add_register(1, bpf.SHARED) + bpf.add(1, _HEAD)
        turn += bpf.store(bpf.FRAME, 1, -16)
        position = 0
        for field, letter in _FIELDS.items():
            size = struct.calcsize("=" + letter)
            turn += _copy(position, btf.place(field).offset, size)
            position += size
        for place in self._bits:
            turn += _copy(position, place.offset, 1)
            position += 1
        turn += _follow(9, 9, btf.place(_CONGESTION).offset) + _copy(position, btf.place(_NAME).offset, 16)
        turn += bpf.add(8, 1)

        length = len(turn) // bpf.INSTRUCTION
        stop = bpf.load(1, bpf.SHARED, 0, width=4) + bpf.jump_unless_less(8, 1, length + 1)
        again = bpf.jump_if_less(8, BATCH, -(length + 3))
        return before + stop + turn + again + bpf.put(0, 0) + bpf.leave()


def _shifted(byte: int, place: Place) -> int:
    mask = place.mask or 0xFF
    return (byte & mask) >> (mask & -mask).bit_length() - 1


def _follow(to: int, source: int, offset: int) -> bytes:
    """The pointer at ``offset`` of the structure that register ``source`` points to; null if it cannot be read."""
    return bpf.move(1, bpf.FRAME) + bpf.add(1, -8) + _read(8, source, offset) + bpf.load(to, bpf.FRAME, -8)


def _copy(position: int, offset: int, size: int) -> bytes:
    """From ``offset`` of the structure at hand to ``position`` of this socket's numbers; zeros if it cannot be read."""
    return bpf.load(1, bpf.FRAME, -16) + bpf.add(1, position) + _read(size, 9, offset)


def _read(size: int, source: int, offset: int) -> bytes:
    """Kernel memory to where register 1 points."""
    return bpf.put(2, size) + bpf.move(3, source) + bpf.add(3, offset) + bpf.call(_PROBE_READ_KERNEL)
