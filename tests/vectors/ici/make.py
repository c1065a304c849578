"""Writes the test vectors beside it, with nothing of tcpmig in it: struct, zlib and msgpack.

    python make.py

Each vector is NAME.hex, a stream of records, and NAME.json, what a reader must make of it (README.md); they lie in
good/ and bad/. A vector that was published never changes; a new case is a new row here.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

HERE = Path(__file__).parent
Fields = dict[str, Any]

IDLE: Fields = {
    "id": bytes(range(16)),
    "epoch": 3,
    "family": 4,
    "local": bytes((10, 0, 0, 1)),
    "local_port": 80,
    "remote": bytes((10, 0, 0, 9)),
    "remote_port": 53972,
    "state": 1,
    "snd_una": 3141592653,
    "rcv_nxt": 2718281828,
    "snd_wl1": 2718281828,
    "snd_wnd": 64256,
    "max_window": 64256,
    "rcv_wnd": 65152,
    "rcv_wup": 2718281828,
    "mss_clamp": 1460,
    "mss": 1448,
    "snd_wscale": 7,
    "rcv_wscale": 7,
    "sack": True,
    "timestamps": 1,
    "ts_value": 1234567890,
    "congestion": "cubic",
    "cwnd": 10,
    "ssthresh": 0x7FFFFFFF,
    "srtt_us": 30125,
    "rttvar_us": 1250,
    "options": {"SO_KEEPALIVE": 1, "TCP_NODELAY": 1},
    "origin_host": "web-1",
    "origin_time": 1760000000123456789,
    "origin_kernel": "6.18.0",
}
LEAST: Fields = {
    "family": 4,
    "local": bytes((10, 0, 0, 1)),
    "local_port": 80,
    "remote": bytes((10, 0, 0, 9)),
    "remote_port": 53972,
    "state": 1,
    "snd_una": 0x01020304,
    "rcv_nxt": 0x50607080,
}
ONE6, NINE6 = bytes.fromhex("fd" + 14 * "00" + "01"), bytes.fromhex("fd" + 14 * "00" + "09")
MAPPED = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 1))


class Vector(NamedTuple):
    """A stream, and what a reader says about it: records, or error, offset and field."""

    stream: bytes
    because: str
    records: list[Fields]
    error: str | None = None
    offset: int | None = None
    field: str | None = None


def sealed(body: bytes, *, major: int = 1, minor: int = 0, reserved: int = 0, length: int | None = None) -> bytes:
    """Header and body, with the right checksum."""
    covered = struct.pack(">4sBBHI", b"\x8aICI", major, minor, reserved, len(body) if length is None else length)
    return covered + struct.pack(">I", zlib.crc32(covered + body)) + body


def body(fields: Fields, sent: Any = b"", unsent: Any = b"", received: Any = b"", *more: Any) -> bytes:
    """The array of map, three queues, and whatever a later version appends."""
    packed: bytes = msgpack.packb([fields, sent, unsent, received, *more])
    return packed


def good(because: str, fields: Fields, stream: bytes | None = None, **queues: bytes) -> Vector:
    """One record, read as these fields and queues."""
    return Vector(sealed(body(fields, **queues)) if stream is None else stream, because, [{**fields, **queues}])


def bad(because: str, content: bytes, field: str | None = None) -> Vector:
    """A body that is refused behind a header that is right."""
    return Vector(sealed(content), because, [], "RecordError", 16, field)


def wrong(because: str, field: str, value: Any, **others: Any) -> Vector:
    """A field that is refused."""
    return bad(because, body({**LEAST, **others, field: value}), field)


def good_ones() -> Iterator[tuple[str, Vector]]:
    """What every reader takes."""
    yield "example", good("the example of docs/ici-format.md", LEAST, _EXAMPLE, received=b"hello")
    yield "idle", good("an idle connection over IPv4", IDLE)
    ends6 = {"family": 6, "local": ONE6, "remote": NINE6}
    yield "idle-ipv6", good("an idle connection over IPv6", {**IDLE, **ends6})
    yield "mapped", good("IPv4 through an IPv6 socket: family 6, addresses of 4 bytes", {**IDLE, "family": 6})
    yield "least", good("nothing but the fields that must be there", LEAST)
    yield (
        "queues",
        good(
            "all three queues, an urgent byte, application state",
            {**IDLE, "urgent": 3, "app": b"\0\x01\xffstate", "ecn": 2, "timestamps": 2},
            sent=b"in flight",
            unsent=b"never sent",
            received=bytes(range(256)),
        ),
    )
    options = {"SO_LINGER": struct.pack("<ii", 1, 5), "SO_MAX_PACING_RATE": 2**64 - 1, "SO_PRIORITY": -1}
    yield "options", good("options as bytes, the largest unsigned and a negative number", {**LEAST, "options": options})
    wrapped = {"snd_una": 2**32 - 2, "rcv_nxt": 5, "rcv_wup": 2**32 - 10, "snd_wl1": 2**32 - 20, "rcv_wnd": 100}
    yield "wrapped", good("sequence numbers about to wrap, and just wrapped", {**LEAST, **wrapped}, sent=b"abcd")
    extreme = {"snd_wscale": 14, "rcv_wscale": 0, "snd_wnd": 65535 << 14, "max_window": 65535 << 14, "mss": 536}
    yield "extreme-windows", good("the largest window and shift", {**LEAST, **extreme})
    listener = {**LEAST, "remote": bytes(4), "remote_port": 0, "state": 10, "snd_una": 0, "rcv_nxt": 0}
    yield "listener", good("a listener has no peer", listener)
    yield "closed", good("an unbound socket has neither port", {**listener, "local_port": 0, "state": 7})
    yield "fin-wait-2", good("snd_una lies past the FIN; unread bytes", {**IDLE, "state": 5}, received=b"unread")
    yield "close-wait", good("rcv_nxt counts the peer's FIN", {**IDLE, "state": 8}, sent=b"answer")
    over = {"state": 6, "snd_wscale": 0, "time_left": 59_000, "ts_recent": 0xFFFFFFFF}
    yield "time-wait", good("version 1.2: the peer's last timestamp", IDLE | over, sealed(body(IDLE | over), minor=2))
    later = {**LEAST, "later": {"deep": [[1.5, None], b"x", msgpack.ExtType(5, b"y")]}, "also_later": "…"}
    yield (
        "later-minor",
        good("version 1.9: unknown keys and elements", LEAST, sealed(body(later, b"", b"", b"", 5), minor=9)),
    )
    yield "wide", good("every value in the longest encoding that it has", LEAST, sealed(_wide(LEAST)))
    yield "explicit-defaults", good("defaults may be there", {**LEAST, "epoch": 0, "options": {}, "snd_wscale": -1})
    yield "empty", Vector(b"", "no records are a valid stream", [])
    yield "two", Vector(sealed(body(LEAST)) + sealed(body(IDLE)), "one record after the other", [LEAST, IDLE])


def bad_headers() -> Iterator[tuple[str, Vector]]:
    """What is refused before the body is looked at."""
    record = sealed(body(LEAST))
    damaged = bytearray(record)
    damaged[30] ^= 1
    for name, because, stream, error, offset, field in (
        ("cut-in-magic", "two bytes of a record", record[:2], "RecordTruncated", 2, None),
        ("cut-in-header", "the header ends early", record[:15], "RecordTruncated", 15, None),
        ("cut-before-body", "a header and no body", record[:16], "RecordTruncated", 16, None),
        ("cut-in-body", "the last byte is missing", record[:-1], "RecordTruncated", len(record) - 1, None),
        ("other-file", "no record at all", b"\x7fELF\x02\x01\x01\0", "RecordError", 0, "header.magic"),
        ("short-other-file", "one byte that begins no record", b"I", "RecordError", 0, "header.magic"),
        ("as-text", "the high bit of the magic was lost", b"\x0a" + record[1:], "RecordError", 0, "header.magic"),
        ("later-major", "version 2.0", sealed(b"", major=2), "RecordVersionError", 4, "header.major"),
        ("major-0", "version 0.9", sealed(b"", major=0, minor=9), "RecordVersionError", 4, "header.major"),
        ("reserved", "the reserved bytes", sealed(body(LEAST), reserved=256), "RecordError", 6, "header.reserved"),
        ("one-gib", "a body of 1 GiB", sealed(b"", length=1 << 30), "RecordError", 8, "header.length"),
        ("longest-plus-1", "a byte too long", sealed(b"", length=(256 << 20) + 1), "RecordError", 8, "header.length"),
        (
            "claims-more",
            "a body of 250 MiB, of which nothing is there",
            sealed(b"", length=250 << 20),
            "RecordTruncated",
            16,
            None,
        ),
        ("damaged", "a bit of the body is flipped", bytes(damaged), "RecordError", 12, "header.crc32"),
        (
            "damaged-minor",
            "a bit of the header is flipped",
            record[:5] + b"\x10" + record[6:],
            "RecordError",
            12,
            "header.crc32",
        ),
    ):
        yield name, Vector(stream, because, [], error, offset, field)
    second = record + record[:-5]
    yield "cut-in-second", Vector(second, "the second record ends early", [LEAST], "RecordTruncated", len(second), None)
    trailing = record + b"\n"
    yield "trailing", Vector(trailing, "a byte behind the record", [LEAST], "RecordError", len(record), "header.magic")


def bad_bodies() -> Iterator[tuple[str, Vector]]:
    """What is no array of a map and three queues."""
    least = msgpack.packb(LEAST)
    yield "no-body", bad("a body of no bytes", b"")
    yield "body-is-map", bad("a map where the array should be", msgpack.packb(LEAST))
    yield "body-of-3", bad("an array of three", msgpack.packb([LEAST, b"", b""]))
    yield "fields-are-array", bad("an array where the map should be", msgpack.packb([[1, 2], b"", b"", b""]))
    yield "after-the-array", bad("a byte behind the array", body(LEAST) + b"\0")
    yield "bin-claims-112-mib", bad("a queue that claims 112 MiB", b"\x94" + least + b"\xc6\x07\0\0\0")
    yield "map-claims-4-gi", bad("a map that claims 2^32 - 1 entries", b"\x94\xdf\xff\xff\xff\xff")
    yield "array-claims-4-gi", bad("an array that claims 2^32 - 1 elements", b"\xdd\xff\xff\xff\xff" + body(LEAST)[1:])
    yield "never-used", bad("the byte c1, which MessagePack never uses", b"\x94\xc1")
    yield "deep", bad("5000 arrays in each other, under an unknown key", _under_unknown_key(b"\x91" * 5000 + b"\x00"))
    yield "number-as-key", bad("a key that is no string", body({**LEAST, 1: 2}))  # type: ignore[dict-item]
    yield "map-as-key", bad("a key that is a map", b"\x94\x81\x80\x01" + b"\xc4\0" * 3)
    yield (
        "not-utf-8",
        bad("a string that is not UTF-8", body(LEAST | {"congestion": "xxx"}).replace(b"xxx", b"\xff\xfe\xfd")),
    )
    yield "queue-as-str", bad("a queue that is a string", body(LEAST, "text"), "sent")
    yield "queue-as-nil", bad("a queue that is nil", body(LEAST, b"", b"", None), "received")
    yield "queue-in-map", wrong("a queue among the fields", "unsent", b"x")


def bad_fields() -> Iterator[tuple[str, Vector]]:
    """What no single field may be, and what must agree."""
    for name in LEAST:
        content = body({key: value for key, value in LEAST.items() if key != name})
        yield f"without-{name.replace('_', '-')}", bad(f"{name} is missing", content, name)
    six = {"family": 6, "local": ONE6, "remote": NINE6}
    long_names = {"A" * 41: 1}
    for name, because, field, value, others in (
        ("port-as-str", "a number as a string", "local_port", "80", {}),
        ("port-as-float", "a number as a float", "local_port", 80.0, {}),
        ("port-65536", "one too large", "remote_port", 65536, {}),
        ("port-negative", "below 0", "remote_port", -1, {}),
        ("address-as-str", "an address as a string", "local", "10.0.0.1", {}),
        ("sack-as-int", "a truth value as a number", "sack", 1, {}),
        ("family-5", "neither 4 nor 6", "family", 5, {}),
        ("family-4-address-6", "an IPv6 address in an IPv4 socket", "local", ONE6, {"remote": NINE6}),
        ("address-of-3", "an address of 3 bytes", "remote", b"abc", {}),
        ("address-of-5", "an address of 5 bytes", "local", b"abcde", {"family": 6, "remote": b"abcde"}),
        ("address-of-17", "an address of 17 bytes", "local", bytes(17), six),
        ("mixed-families", "ends of two families", "remote", bytes((10, 0, 0, 9)), six),
        ("mapped-in-16", "an IPv4-mapped address in 16 bytes", "local", MAPPED, six),
        ("mapped-peer-in-16", "an IPv4-mapped peer in 16 bytes", "remote", MAPPED, six),
        ("state-0", "no state", "state", 0, {}),
        ("state-12", "a kernel's own state", "state", 12, {}),
        ("no-local-port", "port 0 in ESTABLISHED", "local_port", 0, {}),
        ("no-remote-port", "port 0 in ESTABLISHED", "remote_port", 0, {}),
        ("sequence-33-bits", "2^32", "snd_una", 2**32, {}),
        ("sequence-negative", "-1", "rcv_nxt", -1, {}),
        ("window-too-large", "more than 65535 << 14", "rcv_wnd", (65535 << 14) + 1, {}),
        ("scale-15", "a shift of 15", "snd_wscale", 15, {"rcv_wscale": 7}),
        ("scale-one-way", "scaling in one direction only", "rcv_wscale", -1, {"snd_wscale": 7}),
        ("max-window", "below snd_wnd", "max_window", 99, {"snd_wnd": 100}),
        ("rcv-wup", "after rcv_nxt", "rcv_wup", LEAST["rcv_nxt"] + 1, {}),
        ("snd-wl1", "after the window", "snd_wl1", LEAST["rcv_nxt"] + 101, {"rcv_wnd": 100}),
        ("timestamps-3", "an unknown unit", "timestamps", 3, {}),
        ("ecn-3", "an unknown ECN", "ecn", 3, {}),
        ("urgent-beyond", "the urgent byte was not received", "urgent", 1, {}),
        ("urgent-minus-2", "below -1", "urgent", -2, {}),
        ("id-of-15", "an id of 15 bytes", "id", bytes(15), {}),
        ("id-of-17", "an id of 17 bytes", "id", bytes(17), {}),
        ("epoch-64-bits", "2^63", "epoch", 2**63, {}),
        ("congestion-long", "a name of 16 characters", "congestion", "c" * 16, {}),
        ("congestion-escape", "a terminal's escape character", "congestion", "\x1b[2J", {}),
        ("host-newline", "a line feed", "origin_host", "a\nb", {}),
        ("kernel-escape", "a terminal's escape character", "origin_kernel", "6\x1b[31m", {}),
        ("option-nested", "an option with an array", "options", {"SO_X": [1]}, {}),
        ("option-as-str", "an option with a string", "options", {"SO_BINDTODEVICE": "eth0"}, {}),
        ("option-name-long", "an option's name of 41 characters", "options", long_names, {}),
        ("option-name-empty", "an option without a name", "options", {"": 1}, {}),
        ("option-name-escape", "a terminal's escape character", "options", {"\x1b[2J": 1}, {}),
        ("option-name-number", "an option's name that is a number", "options", {1: 1}, {}),
        ("options-129", "too many of them", "options", {f"O{n}": n for n in range(129)}, {}),
        ("options-as-array", "an array where the map should be", "options", [1], {}),
    ):
        yield name, wrong(because, field, value, **others)
    yield "sent-after-fin", bad("bytes to send behind an acknowledged FIN", body({**LEAST, "state": 5}, b"x"), "sent")
    yield "unsent-after-fin", bad("bytes to send in TIME-WAIT", body({**LEAST, "state": 6}, b"", b"x"), "sent")
    listener = {**LEAST, "state": 10, "remote_port": 0}
    yield "listener-sends", bad("bytes to send in LISTEN", body(listener, b"", b"x"), "sent")


def vectors() -> dict[str, Vector]:
    """All of them by name."""
    rows = [*good_ones(), *bad_headers(), *bad_bodies(), *bad_fields()]
    found = dict(rows)
    assert len(found) == len(rows), "two vectors of one name"
    return found


def files(name: str, vector: Vector) -> dict[str, str]:
    """The vector's two files, by path, and what stands in them."""
    name = f"{'bad' if vector.error else 'good'}/{name}"
    expected: dict[str, Any] = {"because": vector.because, "records": [_plain(fields) for fields in vector.records]}
    if vector.error:
        expected |= {"error": vector.error, "offset": vector.offset, "field": vector.field}
    lines = [vector.stream[at : at + 32].hex() for at in range(0, len(vector.stream), 32)]
    text = json.dumps(expected, indent=1, ensure_ascii=True)
    return {f"{name}.hex": "".join(f"{line}\n" for line in lines), f"{name}.json": text + "\n"}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _under_unknown_key(value: bytes) -> bytes:
    packed: bytes = msgpack.packb(LEAST)
    return b"\x94" + bytes((packed[0] + 1,)) + packed[1:] + b"\xa5later" + value + b"\xc4\0" * 3


def _wide(fields: Fields) -> bytes:
    out = b"\xdd" + struct.pack(">I", 4) + b"\xdf" + struct.pack(">I", len(fields))
    for key, value in fields.items():
        out += b"\xdb" + struct.pack(">I", len(key)) + key.encode()
        out += _bin_32(value) if isinstance(value, bytes) else b"\xcf" + struct.pack(">Q", value)
    return out + _bin_32(b"") * 3


def _bin_32(value: bytes) -> bytes:
    return b"\xc6" + struct.pack(">I", len(value)) + value


# As tcpmig writes it: a map 16, and a queue in bin 32.
_EXAMPLE = sealed(
    b"\x94\xde\0\x08" + msgpack.packb(LEAST)[1:] + b"\xc4\0\xc4\0" + _bin_32(b"hello"),
)

if __name__ == "__main__":
    for name, vector in vectors().items():
        for file, text in files(name, vector).items():
            path = HERE / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
