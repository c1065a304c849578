"""A connection's congestion window, its slow start threshold and its ECN, set by a congestion control of our own.

No socket option sets any of them. A congestion control may, and one can be written in BPF (struct tcp_congestion_ops,
Linux 5.6; with a link that ends with its descriptor 6.4). Ours does nothing but write what it is told when a socket
takes it up; then the socket gets its real one back, which goes on from there. Other connections never see it: taking it
up needs CAP_NET_ADMIN, and making it CAP_BPF and CAP_PERFMON in the initial user namespace. It vanishes with its
descriptors, so with a process that is killed, too.

Sources: net/ipv4/bpf_tcp_ca.c (what may be written), tcp_set_congestion_control() in net/ipv4/tcp_cong.c (that taking
another one up leaves them alone), kernel/bpf/bpf_struct_ops.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import sys
import threading
from typing import Self

from migrate.errors import HostError, from_oserror
from migrate.kernel import bpf
from migrate.kernel.btf import Btf

__all__ = ["ECN", "Congestion"]

ECN = 1  # TCP_ECN_OK, since 6.18 TCP_ECN_MODE_RFC3168, in include/net/tcp.h

# include/uapi/linux/bpf.h: enum bpf_cmd, bpf_map_type, bpf_prog_type, bpf_attach_type, their flags
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _BTF_LOAD, _LINK_CREATE = 0, 2, 5, 18, 28
_ARRAY, _STRUCT_OPS_MAP, _F_MMAPABLE, _F_LINK = 2, 26, 1 << 10, 1 << 13
_STRUCT_OPS_PROGRAM, _STRUCT_OPS_LINK = 27, 44
_MAP_VALUE = 2

# union bpf_attr, as far as it is used
_CREATE = struct.Struct("=7I16s5I")  # type, sizes of key and value, entries, flags, …, name, …, BTF, …, type of value
_LOAD = struct.Struct("=IIQQ20xI16s4xI36xI")  # type, count, code, licence, flags, name, member, structure
_UPDATE = struct.Struct("=IxxxxQQQ")  # map, key, value, flags
_LINK = struct.Struct("=4I")  # map, -, type, flags
_BTF = struct.Struct("=QQII")  # data, log, their sizes

_VALUES = struct.Struct("=IIB")  # cwnd, ssthresh, ECN's flags; 0 changes nothing
_MEMBERS = ("tcp_sock.snd_cwnd", "tcp_sock.snd_ssthresh", "tcp_sock.ecn_flags")
_STRUCTURE = "tcp_congestion_ops"
_HINT = "needs Linux 6.4 with BTF and BPF's JIT compiler, and CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN outside containers"

# A map whose value is one of the kernel's structures wants some BTF beside it: the smallest there is, one integer type.
_TYPES, _NAMES = struct.pack("=4I", 1, 1 << 24, 4, 32), b"\0int\0"
_SOME_BTF = struct.pack("=HBB5I", 0xEB9F, 1, 0, 24, 0, len(_TYPES), len(_TYPES), len(_NAMES)) + _TYPES + _NAMES


class Congestion:
    """Sets what no option sets. A context manager, for any number of threads; making it takes some 100 ms.

    Raises HostError, or PrivilegeError, where the kernel offers no such thing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.name = f"tcpmig_{os.urandom(4).hex()}"  # the kernel's names are one for all namespaces
        with contextlib.ExitStack() as opened:
            try:
                self._values = opened.enter_context(self._installed(opened))
            except (OSError, LookupError, ValueError) as error:
                if isinstance(error, PermissionError):
                    raise from_oserror("making a congestion control", error, hint=_HINT) from None
                what = f"this kernel takes no congestion control written in BPF: {error}"
                raise HostError(what, hint=_HINT) from None
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; doing so again is harmless."""
        self._opened.close()

    def set(self, sock: socket.socket, cwnd: int = 0, ssthresh: int = 0, *, ecn: int = 0) -> None:
        """Both in segments, from 1 to 2**31 - 1; ``ecn`` is `ECN` to use it. 0 leaves what is.

        Raises OSError; the congestion control is what it was.
        """
        real = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        with self._lock:
            self._values[:] = _VALUES.pack(cwnd, ssthresh, ecn)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.name.encode())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, real)

    def _installed(self, opened: contextlib.ExitStack) -> mmap.mmap:
        """Make it known to the kernel; the memory that holds what to write."""

        def command(number: int, attributes: bytes) -> int:
            descriptor = bpf.command(number, attributes)
            opened.callback(os.close, descriptor)
            return descriptor

        kernel = Btf()
        values = command(_MAP_CREATE, struct.pack("=5I", _ARRAY, 4, _VALUES.size, 1, _F_MMAPABLE))
        structure = bytearray(kernel.size(f"bpf_struct_ops_{_STRUCTURE}"))
        data = kernel.place(f"bpf_struct_ops_{_STRUCTURE}.data").offset

        def write(member: str, content: bytes) -> None:
            at = data + kernel.place(f"{_STRUCTURE}.{member}").offset
            structure[at : at + len(content)] = content

        number = kernel.number(_STRUCTURE)
        members = kernel.members(_STRUCTURE)
        for member, code in _programs(kernel, values).items():
            source, licence = (ctypes.create_string_buffer(text) for text in (code, b"GPL"))
            where = ctypes.addressof(source), ctypes.addressof(licence)
            what = _LOAD.pack(_STRUCT_OPS_PROGRAM, len(code) // 8, *where, 0, b"tcpmig", members.index(member), number)
            write(member, command(_PROG_LOAD, what).to_bytes(8, sys.byteorder))
        write("name", self.name.encode())

        some, key, value = (ctypes.create_string_buffer(bytes(each)) for each in (_SOME_BTF, 4, structure))
        types = command(_BTF_LOAD, _BTF.pack(ctypes.addressof(some), 0, len(_SOME_BTF), 0))
        whole = kernel.number(f"bpf_struct_ops_{_STRUCTURE}")
        create = _CREATE.pack(_STRUCT_OPS_MAP, 4, len(structure), 1, _F_LINK, 0, 0, b"tcpmig", 0, types, 0, 0, whole)
        operations = command(_MAP_CREATE, create)
        bpf.command(_MAP_UPDATE, _UPDATE.pack(operations, ctypes.addressof(key), ctypes.addressof(value), 0))
        command(_LINK_CREATE, _LINK.pack(operations, 0, _STRUCT_OPS_LINK, 0))
        return mmap.mmap(values, _VALUES.size)


def _programs(kernel: Btf, values: int) -> dict[str, bytes]:
    """By member of the structure: what runs when a socket takes it up, and the least of what must be there."""
    sock, memory, value = 6, 2, 3  # registers
    take_up = (
        bpf.load(sock, 1, 0)  # the context is the arguments' array
        + bpf.instruction(0x18, memory, _MAP_VALUE, value=values)
        + bpf.instruction(0)
    )
    for at, member in zip((0, 4, 8), map(kernel.place, _MEMBERS), strict=True):
        take_up += bpf.load(value, memory, at, width=member.size) + bpf.jump_if_less(value, 1, 1)
        take_up += bpf.store(sock, value, member.offset, width=member.size)
    nothing = bpf.put(0, 2) + bpf.leave()
    return {"init": take_up + bpf.leave(), "ssthresh": nothing, "undo_cwnd": nothing, "cong_avoid": nothing}
