"""What a socket's options make of it: the bytes of the kernel's socket that hold them, of many sockets at once.

Two sockets whose bytes are equal have equal options, whatever those bytes mean. So it is enough to ask one of them the
long way, option by option, and to recognise the others: 0.3 µs of kernel time a socket, where a hundred getsockopt
calls take 30. Nothing here interprets a byte but the three buffer sizes, which differ from socket to socket.

A small BPF program walks from this thread's descriptor table to the sockets and copies the `FIELDS` that the kernel's
own type information locates. Whether an option really shows is not believed but tried, on sockets made for it: one
that does not is left to the caller to ask for (`Fingerprint.unproven`).
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from migrate.kernel import bpf
from migrate.kernel.btf import Btf
from migrate.kernel.option_table import BY_NAME, OPTIONS, Option, Phase

__all__ = ["Fingerprint", "Print"]

BATCH = 16  # sockets a run: the kernel verifies the loop turn by turn, and more gains little

_SIZE_OPTIONS = tuple(BY_NAME[name][1:3] for name in ("SO_SNDBUF", "SO_RCVBUF", "TCP_WINDOW_CLAMP"))
PATH = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk")  # to a socket
SIZE_FIELDS = ("sock.sk_sndbuf", "sock.sk_rcvbuf", "tcp_sock.window_clamp")
# Each field with the options that live in it; an option of which this kernel lacks a field is `unproven`. A * marks a
# pointer of which only the highest bit counts, which all addresses of the kernel have: that something is there is alike
# in many sockets, where it is differs, and what it is has to be asked for anyway.
FIELDS = {
    "sock.sk_protocol": "",
    "sock_common.skc_family": "",
    "sock_common.skc_reuse": "SO_REUSEADDR",
    "sock_common.skc_reuseport": "SO_REUSEPORT",
    "sock_common.skc_bound_dev_if": "SO_BINDTODEVICE",
    "sock_common.skc_flags": "SO_KEEPALIVE SO_OOBINLINE SO_LINGER SO_BROADCAST SO_DEBUG SO_DONTROUTE SO_RXQ_OVFL "
    "SO_ZEROCOPY SO_WIFI_STATUS SO_NOFCS SO_LOCK_FILTER SO_SELECT_ERR_QUEUE SO_RCVMARK SO_RCVPRIORITY SO_TIMESTAMP "
    "SO_TIMESTAMPNS SO_TIMESTAMPING SO_TIMESTAMP_NEW SO_TIMESTAMPNS_NEW SO_TIMESTAMPING_NEW",  # enum sock_flags
    "sock.sk_peek_off": "SO_PEEK_OFF",
    "sock.sk_ll_usec": "SO_BUSY_POLL",
    "sock.sk_prefer_busy_poll": "SO_PREFER_BUSY_POLL",
    "sock.sk_userlocks": "SO_BUF_LOCK",
    "sock.sk_filter*": "SO_ATTACH_FILTER",
    "sock.sk_rcvtimeo": "SO_RCVTIMEO",
    "sock.sk_sndtimeo": "SO_SNDTIMEO",
    "sock.sk_rcvlowat": "SO_RCVLOWAT",
    "sock.sk_reserved_mem": "SO_RESERVE_MEM",
    "sock.sk_tsflags": "SO_TIMESTAMPING SO_TIMESTAMPING_NEW",
    "sock.sk_max_pacing_rate": "SO_MAX_PACING_RATE",
    "sock.sk_priority": "SO_PRIORITY",
    "sock.sk_mark": "SO_MARK",
    "sock.sk_no_check_tx": "SO_NO_CHECK",
    "sock.sk_lingertime": "SO_LINGER",
    "sock.sk_txrehash": "SO_TXREHASH",
    "inet_sock.inet_flags": "IP_FREEBIND IP_TRANSPARENT IP_RECVERR IP_RECVERR_RFC4884 IP_BIND_ADDRESS_NO_PORT "
    "IP_PKTINFO IP_RECVTTL IP_RECVTOS IP_RECVOPTS IP_RETOPTS IP_PASSSEC IP_RECVORIGDSTADDR IP_CHECKSUM IPV6_FREEBIND "
    "IPV6_TRANSPARENT IPV6_FLOWINFO_SEND IPV6_AUTOFLOWLABEL IPV6_DONTFRAG IPV6_RECVERR IPV6_RECVERR_RFC4884",
    "inet_sock.inet_opt*": "IP_OPTIONS",
    "inet_sock.uc_ttl": "IP_TTL",
    "inet_sock.tos": "IP_TOS",
    "inet_sock.min_ttl": "IP_MINTTL",
    "inet_sock.pmtudisc": "IP_MTU_DISCOVER",
    "inet_sock.local_port_range": "IP_LOCAL_PORT_RANGE",
    "inet_connection_sock.icsk_accept_queue.rskq_defer_accept": "TCP_DEFER_ACCEPT",
    "inet_connection_sock.icsk_rto_min": "TCP_RTO_MIN_US",
    "inet_connection_sock.icsk_rto_max": "TCP_RTO_MAX_MS",
    "inet_connection_sock.icsk_delack_max": "TCP_DELACK_MAX_US",
    "inet_connection_sock.icsk_syn_retries": "TCP_SYNCNT",
    "inet_connection_sock.icsk_ack.pingpong": "TCP_QUICKACK",
    "inet_connection_sock.icsk_user_timeout": "TCP_USER_TIMEOUT",
    "tcp_sock.notsent_lowat": "TCP_NOTSENT_LOWAT",
    "tcp_sock.recvmsg_inq": "TCP_INQ",
    "tcp_sock.nonagle": "TCP_NODELAY TCP_CORK",
    "tcp_sock.thin_lto": "TCP_THIN_LINEAR_TIMEOUTS",
    "tcp_sock.keepalive_probes": "TCP_KEEPCNT",
    "tcp_sock.keepalive_time": "TCP_KEEPIDLE",
    "tcp_sock.keepalive_intvl": "TCP_KEEPINTVL",
    "tcp_sock.linger2": "TCP_LINGER2",
    "tcp_sock.tcp_tx_delay": "TCP_TX_DELAY",
}
# The same behind a pointer of the socket; where that is none (the last one, of an IPv4 socket) it reads as zeros.
BEHIND = {
    "sock_common.skc_net": {"net.net_cookie": ""},  # defaults are a network namespace's
    "inet_connection_sock.icsk_ca_ops": {"tcp_congestion_ops.name": "TCP_CONGESTION"},
    "inet_sock.pinet6": {
        "ipv6_pinfo.flow_label": "IPV6_FLOWLABEL_MGR",
        "ipv6_pinfo.opt*": "IPV6_HOPOPTS IPV6_RTHDRDSTOPTS IPV6_RTHDR IPV6_DSTOPTS",
        "ipv6_pinfo.hop_limit": "IPV6_UNICAST_HOPS",
        "ipv6_pinfo.pmtudisc": "IPV6_MTU_DISCOVER",
        "ipv6_pinfo.tclass": "IPV6_TCLASS",
        "ipv6_pinfo.srcprefs": "IPV6_ADDR_PREFERENCES",
        "ipv6_pinfo.min_hopcount": "IPV6_MINHOPCOUNT",
        "ipv6_pinfo.rxopt": "IPV6_RECVPKTINFO IPV6_RECVHOPLIMIT IPV6_RECVHOPOPTS IPV6_RECVRTHDR IPV6_RECVDSTOPTS "
        "IPV6_RECVPATHMTU IPV6_RECVTCLASS IPV6_RECVORIGDSTADDR IPV6_RECVFRAGSIZE IPV6_FLOWINFO IPV6_2292PKTINFO "
        "IPV6_2292HOPOPTS IPV6_2292DSTOPTS IPV6_2292RTHDR IPV6_2292HOPLIMIT",
    },
}
# Believed, not tried: trying throws a switch of the whole machine for good, or needs what a host may not have.
UNTRIED = {"IP_MINTTL", "IPV6_MINHOPCOUNT", "TCP_TX_DELAY", "TCP_CONGESTION", "SO_RESERVE_MEM", "IPV6_FLOWLABEL_MGR"}

_GET_CURRENT_TASK, _PROBE_READ_KERNEL = 35, 113  # enum bpf_func_id
# The memory begins with a count, a hole and room for a batch of descriptors; the fingerprints follow.
_HEADS = [struct.Struct(f"=II{count}i") for count in range(BATCH + 1)]
_HEAD = _HEADS[BATCH].size

_SIZES = 12  # bytes of three sizes, with which each of them begins
_unpack_sizes = struct.Struct("=iiI").unpack_from

# What must be equal if the options are to be; and SO_SNDBUF, SO_RCVBUF, TCP_WINDOW_CLAMP in bytes, which need not.
Print = tuple[bytes, int, int, int]
Settle = Callable[[socket.socket, Option], None]


class Fingerprint:
    """Takes fingerprints. Raises OSError, LookupError or ValueError where this host or this process cannot.

    ``settle`` gives a socket the sample value of an option. ``unproven`` are the names of the options that a
    fingerprint does not cover on this kernel.
    """

    def __init__(self, settle: Settle) -> None:
        layout = _Layout(Btf())
        self._stride, self._end = layout.stride, _HEAD + layout.length  # of the first in the memory
        self._lock = threading.Lock()  # of the shared memory
        self._program = bpf.Program(_HEAD + BATCH * layout.stride, layout.code())
        try:
            self.unproven = frozenset(_unproven(self, layout.located, settle))
        except BaseException:
            self.close()
            raise

    def take(self, descriptor: int) -> Print:
        """The fingerprint of a descriptor of this process, which must be a TCP socket's."""
        memory = self._program.memory
        with self._lock:
            _HEADS[1].pack_into(memory, 0, 1, 0, descriptor)
            self._program.run()
            return memory[_HEAD + _SIZES : self._end], *_unpack_sizes(memory, _HEAD)

    def take_many(self, descriptors: Sequence[int]) -> list[Print]:
        """The same for many, at a third of the cost each."""
        taken: list[Print] = []
        memory, stride, rest = self._program.memory, self._stride, self._end - _HEAD - _SIZES
        with self._lock:
            for start in range(0, len(descriptors), BATCH):
                batch = descriptors[start : start + BATCH]
                count = len(batch)
                _HEADS[count].pack_into(memory, 0, count, 0, *batch)
                self._program.run()
                for at in range(_HEAD, _HEAD + count * stride, stride):
                    send, receive, clamp = _unpack_sizes(memory, at)
                    taken.append((memory[at + _SIZES : at + _SIZES + rest], send, receive, clamp))
        return taken

    def close(self) -> None:
        """Give the program back."""
        self._program.close()


def _unproven(fingerprint: Fingerprint, located: Set[str], settle: Settle) -> Iterator[str]:
    """The options whose change no fingerprint shows. Raises ValueError if fingerprints are not what they should be."""

    def taken(family: int, *options: Option) -> Print:
        with socket.socket(family) as sock:
            for option in options:
                settle(sock, option)
            taken = fingerprint.take(sock.fileno())
            if taken[1:] != tuple(sock.getsockopt(level, number) for level, number in _SIZE_OPTIONS):
                raise ValueError("the kernel keeps its buffer sizes elsewhere")
            return taken

    for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
        fresh = taken(family)
        if fresh != taken(family):
            raise ValueError("two fresh sockets differ: the fields hold more than options")
        for option in OPTIONS:
            if option.phase is Phase.UNCONNECTED or not option.readable or option.family not in (0, version):
                continue
            shown = option.name in located
            if shown and option.name not in UNTRIED:
                try:
                    shown = taken(family, option) != fresh
                except OSError:  # this process may not set it, or the kernel has none
                    shown = False
            if not shown:
                yield option.name


class _Layout:
    """Which bytes of the kernel's structures make a fingerprint, and the program that collects them."""

    def __init__(self, btf: Btf) -> None:
        self.located = {option.name for option in OPTIONS}  # those that live in fields which this kernel has
        self._path = [btf.place(step).offset for step in PATH]
        self._sizes = [btf.place(field).offset for field in SIZE_FIELDS]
        self._parts: list[tuple[int | None, list[_Run]]] = [(None, self._runs(btf, FIELDS))]
        self._parts += [(btf.place(pointer).offset, self._runs(btf, fields)) for pointer, fields in BEHIND.items()]
        self.length = _SIZES + sum(len(run.masks) for _pointer, runs in self._parts for run in runs)
        self.stride = (self.length + 7) // 8 * 8

    def _runs(self, btf: Btf, fields: Mapping[str, str]) -> list[_Run]:
        masks: dict[int, int] = {}  # by offset: the bits of that byte
        for field, options in fields.items():
            try:
                place = btf.place(field.removesuffix("*"))
            except LookupError:
                self.located.difference_update(options.split())
                continue
            mask = place.mask or (1 << 8 * place.size) - 1
            if field.endswith("*"):
                mask = 1 << 8 * place.size - 1
            bits = mask.to_bytes(place.size, sys.byteorder)
            for offset, bit in enumerate(bits, place.offset):
                if bit:
                    masks[offset] = masks.get(offset, 0) | bit
        runs: list[_Run] = []
        for offset, mask in sorted(masks.items()):
            if runs and runs[-1].offset + len(runs[-1].masks) == offset:
                runs[-1].masks.append(mask)
            else:
                runs.append(_Run(offset, [mask]))
        return runs

    def code(self) -> bytes:
        """The program. Registers: 6 the memory, 7 the descriptor table, 8 the turn, 9 the structure at hand.

        On the stack: at -8 a pointer just read, at -16 the socket, at -24 where this socket's fingerprint goes.
        """
        task_files, files_table, table_descriptors, *to_socket = self._path
        before = bpf.call(_GET_CURRENT_TASK) + bpf.move(7, 0)
        for offset in (task_files, files_table, table_descriptors):
            before += _follow(7, 7, offset)
        before += bpf.put(8, 0)

        turn = bpf.move(1, 8) + bpf.multiply(1, 4) + bpf.add_register(1, bpf.SHARED) + bpf.load(1, 1, 8, width=4)
        turn += bpf.multiply(1, 8) + bpf.move(9, 7) + bpf.add_register(9, 1)  # the descriptor's place in the table
        for offset in (0, *to_socket):
            turn += _follow(9, 9, offset)
        turn += bpf.store(bpf.FRAME, 9, -16)
        turn += bpf.move(1, 8) + bpf.multiply(1, self.stride) + bpf.add_register(1, bpf.SHARED) + bpf.add(1, _HEAD)
        turn += bpf.store(bpf.FRAME, 1, -24)
        position = 0
        for offset in self._sizes:
            turn += _copy(position, offset, 4)
            position += 4
        for pointer, runs in self._parts:
            if pointer is not None:
                turn += bpf.load(9, bpf.FRAME, -16) + _follow(9, 9, pointer)
            for run in runs:
                turn += _copy(position, run.offset, len(run.masks))
                for at, mask in enumerate(run.masks, position):
                    turn += _mask(at, mask) if mask != 0xFF else b""
                position += len(run.masks)
        turn += bpf.add(8, 1)

        length = len(turn) // bpf.INSTRUCTION
        stop = bpf.load(1, bpf.SHARED, 0, width=4) + bpf.jump_unless_less(8, 1, length + 1)
        again = bpf.jump_if_less(8, BATCH, -(length + 3))
        return before + stop + turn + again + bpf.put(0, 0) + bpf.leave()


class _Run(NamedTuple):
    """Bytes in a row, from ``offset`` on, and of each the bits that count."""

    offset: int
    masks: list[int]


def _follow(to: int, source: int, offset: int) -> bytes:
    """The pointer at ``offset`` of the structure that register ``source`` points to; null if it cannot be read."""
    return bpf.move(1, bpf.FRAME) + bpf.add(1, -8) + _read(8, source, offset) + bpf.load(to, bpf.FRAME, -8)


def _copy(position: int, offset: int, size: int) -> bytes:
    """From ``offset`` of the structure at hand to ``position`` of the fingerprint; zeros if it cannot be read."""
    return bpf.load(1, bpf.FRAME, -24) + bpf.add(1, position) + _read(size, 9, offset)


def _read(size: int, source: int, offset: int) -> bytes:
    """Kernel memory to where register 1 points."""
    return bpf.put(2, size) + bpf.move(3, source) + bpf.add(3, offset) + bpf.call(_PROBE_READ_KERNEL)


def _mask(position: int, mask: int) -> bytes:
    """Keep of a byte of the fingerprint only some bits."""
    byte = bpf.load(1, bpf.FRAME, -24) + bpf.load(2, 1, position, width=1)
    return byte + bpf.mask(2, mask) + bpf.store(1, 2, position, width=1)
