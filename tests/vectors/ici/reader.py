"""A reader of ICI records with nothing of tcpmig in it: docs/ici-format.md in struct, zlib and msgpack.

    python reader.py FILE.hex      prints the records, or what is wrong

It is here to show that the page says enough, and as a pattern for readers in other languages.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

U16, U32, U63 = (0, 0xFFFF), (0, 0xFFFFFFFF), (0, 0x7FFFFFFFFFFFFFFF)
WINDOW = (0, 0xFFFF << 14)
QUEUES = ("sent", "unsent", "received")
REQUIRED = object()
# name: type, range (of a number, or of a length), default
FIELDS: dict[str, tuple[type[Any], tuple[int, int], Any]] = {
    "id": (bytes, (0, 16), b""),
    "epoch": (int, U63, 0),
    "family": (int, (4, 6), REQUIRED),
    "local": (bytes, (4, 16), REQUIRED),
    "local_port": (int, U16, REQUIRED),
    "remote": (bytes, (4, 16), REQUIRED),
    "remote_port": (int, U16, REQUIRED),
    "state": (int, (1, 11), REQUIRED),
    "snd_una": (int, U32, REQUIRED),
    "rcv_nxt": (int, U32, REQUIRED),
    "snd_wl1": (int, U32, 0),
    "snd_wnd": (int, WINDOW, 0),
    "max_window": (int, WINDOW, 0),
    "rcv_wnd": (int, WINDOW, 0),
    "rcv_wup": (int, U32, 0),
    "mss_clamp": (int, U16, 0),
    "mss": (int, U16, 0),
    "snd_wscale": (int, (-1, 14), -1),
    "rcv_wscale": (int, (-1, 14), -1),
    "sack": (bool, (0, 1), False),
    "timestamps": (int, (0, 2), 0),
    "ts_value": (int, U32, 0),
    "ecn": (int, (0, 2), 0),
    "congestion": (str, (0, 15), ""),
    "cwnd": (int, U32, 0),
    "ssthresh": (int, U32, 0),
    "srtt_us": (int, U32, 0),
    "rttvar_us": (int, U32, 0),
    "options": (dict, (0, 128), {}),
    "urgent": (int, (-1, 128 << 20), -1),
    "app": (bytes, (0, 8 << 20), b""),
    "origin_host": (str, (0, 255), ""),
    "origin_time": (int, U63, 0),
    "origin_kernel": (str, (0, 255), ""),
    "ended": (int, (0, 2), 0),
    "backlog": (int, U32, 0),
    "time_left": (int, U32, 0),
    "ts_recent": (int, U32, 0),
}
CLOSED, LISTEN, FIN_ACKED = 7, 10, (5, 6)
MAPPED = bytes(10) + b"\xff\xff"


class Fault(Exception):
    """What a record is refused for: the kind, where in the stream, which field."""

    def __init__(self, kind: str, offset: int, field: str | None) -> None:
        super().__init__(f"{kind} at byte {offset}, field {field}")
        self.kind, self.offset, self.field = kind, offset, field


def read(stream: bytes) -> Iterator[dict[str, Any]]:
    """The records of a stream. Raises Fault."""
    start = 0
    while start < len(stream):
        head = stream[start : start + 16]
        if not b"\x8aICI".startswith(head[:4]):
            raise Fault("RecordError", start, "header.magic")
        if len(head) < 16:
            raise Fault("RecordTruncated", len(stream), None)
        major, _minor, reserved, length, crc = struct.unpack(">BBHII", head[4:])
        if major != 1:
            raise Fault("RecordVersionError", start + 4, "header.major")
        if reserved:
            raise Fault("RecordError", start + 6, "header.reserved")
        if length > 256 << 20:
            raise Fault("RecordError", start + 8, "header.length")
        body = stream[start + 16 : start + 16 + length]
        if len(body) < length:
            raise Fault("RecordTruncated", len(stream), None)
        if zlib.crc32(head[:12] + body) != crc:
            raise Fault("RecordError", start + 12, "header.crc32")
        try:
            yield record(body)
        except Wrong as wrong:
            raise Fault("RecordError", start + 16, wrong.field) from None
        start += 16 + length


class Wrong(Exception):
    """A fault in the body, and the field that it concerns."""

    def __init__(self, field: str | None) -> None:
        super().__init__(field)
        self.field = field


def record(body: bytes) -> dict[str, Any]:
    """The fields and queues of one body, defaults filled in. Raises Wrong."""
    try:
        elements = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError):  # what msgpack raises, for strings that are not UTF-8 and keys that are maps too
        raise Wrong(None) from None
    if not isinstance(elements, list) or len(elements) < 4 or not isinstance(elements[0], dict):
        raise Wrong(None)
    given: dict[Any, Any] = elements[0]
    if not all(isinstance(key, str) for key in given):
        raise Wrong(None)
    found: dict[str, Any] = {}
    for name, (kind, (low, high), default) in FIELDS.items():
        value = given.get(name, default)
        if type(value) is not kind:  # a bool is no int, and REQUIRED is nothing
            raise Wrong(name)
        if not low <= (value if kind in (int, bool) else len(value)) <= high:
            raise Wrong(name)
        found[name] = value
    for name, value in found["options"].items():
        if not isinstance(name, str) or not 1 <= len(name) <= 40 or type(value) not in (int, bytes):
            raise Wrong("options")
        if isinstance(value, bytes) and len(value) > 1 << 16:
            raise Wrong("options")
    for name, queue in zip(QUEUES, elements[1:4], strict=True):
        if not isinstance(queue, bytes) or len(queue) > 128 << 20 or name in given:
            raise Wrong(name)
        found[name] = queue
    agree(found)
    return found


def after(a: int, b: int) -> bool:
    """Whether a sequence number lies after another."""
    return (b - a) % 2**32 >= 2**31


def agree(r: dict[str, Any]) -> None:
    """The table "What must agree" of the page."""
    rules = {
        "family": r["family"] in (4, 6),
        "local": len(r["local"]) in ((4,) if r["family"] == 4 else (4, 16)) and not mapped(r["local"]),
        "remote": len(r["remote"]) == len(r["local"]) and not mapped(r["remote"]),
        "local_port": r["local_port"] or r["state"] == CLOSED,
        "remote_port": r["remote_port"] or r["state"] in (CLOSED, LISTEN),
        "id": len(r["id"]) in (0, 16),
        "rcv_wscale": (r["rcv_wscale"] == -1) == (r["snd_wscale"] == -1),
        "max_window": r["max_window"] >= r["snd_wnd"],
        "rcv_wup": not after(r["rcv_wup"], r["rcv_nxt"]),
        "snd_wl1": not after(r["snd_wl1"], r["rcv_nxt"] + r["rcv_wnd"]),
        "urgent": r["urgent"] <= len(r["received"]),
        "sent": r["state"] not in (LISTEN, *FIN_ACKED) or not r["sent"] + r["unsent"],
        "options": "".join(r["options"]).isprintable(),
        "congestion": r["congestion"].isprintable(),
        "origin_host": r["origin_host"].isprintable(),
        "origin_kernel": r["origin_kernel"].isprintable(),
    }
    for field, holds in rules.items():
        if not holds:
            raise Wrong(field)


def mapped(address: bytes) -> bool:
    """Whether an address is an IPv4-mapped IPv6 address."""
    return len(address) == 16 and address.startswith(MAPPED)


if __name__ == "__main__":
    try:
        for found in read(bytes.fromhex(Path(sys.argv[1]).read_text())):
            print({name: len(value) if name in QUEUES else value for name, value in found.items()})
    except Fault as fault:
        sys.exit(str(fault))
