"""Where the running kernel keeps what: the layout of its structures, from BTF (/sys/kernel/btf/vmlinux).

Format: Documentation/bpf/btf.rst and include/uapi/linux/btf.h. A header, then one record a type, then the names; a
type is referred to by its place in the row, so the row is walked once, as far as somebody asks.
"""

from __future__ import annotations

import bisect
import enum
import struct
import sys
from typing import NamedTuple

__all__ = ["PATH", "Btf", "Place"]

PATH = "/sys/kernel/btf/vmlinux"
MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")  # struct btf_header

# In words of 32 bits: what every record of a kind takes, and what it takes for each of its vlen members.
_FIXED = (0, 4, 3, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3, 4, 3, 3)
_MEMBER = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)


class _Kind(enum.IntEnum):  # BTF_KIND_*, as far as they matter here
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    TYPE_TAG = 18


_ALIASES = frozenset({_Kind.TYPEDEF, _Kind.VOLATILE, _Kind.CONST, _Kind.RESTRICT, _Kind.TYPE_TAG})


class Place(NamedTuple):
    """Where a member lies: ``offset`` and ``size`` in bytes; of a bit field ``mask`` has its bits in them."""

    offset: int
    size: int
    mask: int = 0


class Btf:
    """The types of one kernel. Raises OSError where the kernel offers none, ValueError where it is none we can read."""

    def __init__(self, path: str = PATH) -> None:
        with open(path, "rb") as file:
            self._raw = file.read()
        magic, version, _flags, header, types, length, names, size = _HEADER.unpack_from(self._raw)
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{path} is no BTF of version 1 in this machine's byte order")
        self._types: int = header + types
        self._words = memoryview(self._raw)[self._types : self._types + length].cast("I")
        self._names: int = header + names
        self._names_end = self._names + size
        self._found: dict[tuple[str, int], int | None] = {}
        self._starts = [0, 0]  # by type number; number 0 is void and has no record

    def place(self, path: str) -> Place:
        """Where ``path`` lies in its structure: ``"sock.sk_mark"``, ``"inet_connection_sock.icsk_ack.pingpong"``.

        Members of unnamed structures and unions count as the outer one's. Raises LookupError if there is none.
        """
        name, *members = path.split(".")
        at = self._seen(name)
        offset, found = 0, None
        for member in members:
            if at is None or (found := self._member(at, member)) is None:
                raise LookupError(f"the kernel has no {path}")
            start, bits, number = found
            offset += start
            at = self._aggregate(number)
        if found is None:
            raise LookupError(f"{path} names no member")
        if bits:  # at most seven bits into its first byte
            size = (offset % 8 + bits + 7) // 8
            mask = ((1 << bits) - 1) << offset % 8
            if sys.byteorder == "big":  # bits are counted from the most significant one
                mask = ((1 << bits) - 1) << (8 * size - bits - offset % 8)
            return Place(offset // 8, size, mask)
        return Place(offset // 8, self._size(number))

    def number(self, name: str) -> int:
        """The type number of a structure. Raises LookupError if there is none."""
        return self._number(self._known(name))

    def function(self, name: str) -> int:
        """The type number of a function. Raises LookupError if there is none."""
        return self._number(self._known(name, _Kind.FUNC))

    def _number(self, at: int) -> int:
        while self._starts[-1] < at:
            self._record(len(self._starts))
        return bisect.bisect_left(self._starts, at, 1)

    def size(self, name: str) -> int:
        """The size of a structure in bytes. Raises LookupError if there is none."""
        return int(self._words[self._known(name) + 2])

    def members(self, name: str) -> list[str]:
        """The names of a structure's members, in their order. Raises LookupError if there is no such structure."""
        at = self._known(name)
        labels = self._words[at + 3 : at + 3 + 3 * (self._words[at + 1] & 0xFFFF) : 3]
        return [self._raw[(start := self._names + label) : self._raw.index(0, start)].decode() for label in labels]

    def _known(self, name: str, kind: int = _Kind.STRUCT) -> int:
        """The record of a named structure or function: found by looking for the name's own offset, which starts it."""
        if (at := self._seen(name, kind)) is None:
            raise LookupError(f"the kernel has no {name}")
        return at

    def _seen(self, name: str, kind: int = _Kind.STRUCT) -> int | None:
        if (name, kind) not in self._found:
            self._found[name, kind] = self._find(name, kind)
        return self._found[name, kind]

    def _find(self, name: str, kind: int) -> int | None:
        where = self._raw.find(b"\0%s\0" % name.encode(), self._names, self._names_end)
        if where < 0:
            return None
        wanted = struct.pack("=I", where + 1 - self._names)
        end = self._types + len(self._words) * 4
        at = self._types - 1
        while (at := self._raw.find(wanted, at + 1, end)) >= 0:
            word = (at - self._types) // 4
            if at % 4 == self._types % 4 and self._kind(word) == kind:
                return word
        return None

    def _member(self, at: int, name: str) -> tuple[int, int, int] | None:
        """Offset in bits, bits of a bit field or 0, and type number of a member of the aggregate recorded at ``at``."""
        info = self._words[at + 1]
        for word in range(at + 3, at + 3 + 3 * (info & 0xFFFF), 3):
            label, number, offset = self._words[word : word + 3]
            bits = 0
            if info >> 31:  # kind_flag: bit fields stand in the offset's upper byte
                bits, offset = offset >> 24, offset & 0xFFFFFF
            if label:
                if self._name_is(label, name):
                    return offset, bits, number
            elif (inner := self._aggregate(number)) is not None and (found := self._member(inner, name)):
                return offset + found[0], found[1], found[2]
        return None

    def _name_is(self, label: int, name: str) -> bool:
        return self._raw.startswith(name.encode() + b"\0", self._names + label)

    def _kind(self, at: int) -> int:
        return self._words[at + 1] >> 24 & 31

    def _record(self, number: int) -> int:
        """The record of a type number, as an index of words."""
        starts, words = self._starts, self._words
        at = starts[-1]
        for _ in range(number + 1 - len(starts)):
            info = words[at + 1]
            kind = info >> 24 & 31
            at += _FIXED[kind] + _MEMBER[kind] * (info & 0xFFFF)
            starts.append(at)
        return starts[number]

    def _resolved(self, number: int) -> int:
        """The record behind typedef, const, volatile and the like."""
        at = self._record(number)
        while self._kind(at) in _ALIASES:
            at = self._record(self._words[at + 2])
        return at

    def _aggregate(self, number: int) -> int | None:
        at = self._resolved(number)
        return at if self._kind(at) in (_Kind.STRUCT, _Kind.UNION) else None

    def _size(self, number: int) -> int:
        at = self._resolved(number)
        match self._kind(at):
            case _Kind.PTR:
                return struct.calcsize("P")
            case _Kind.ARRAY:
                element, _index, count = self._words[at + 3 : at + 6]
                return count * self._size(element)
            case _:
                return int(self._words[at + 2])
