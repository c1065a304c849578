"""The decoder against everything that is no record: it must answer with RecordError, in bounded memory, or be right."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.errors import RecordError, RecordTruncated
from migrate.ici import MAX_FIELDS, MAX_RECORD, Ici, read_records, write_records
from migrate.tcpstate import REBUILD, TcpState


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


u16, u32, u63 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 63))
scale = st.integers(0, 14)
window = st.integers(0, 65535 << 14)
printable = st.text(st.characters(exclude_categories=("C", "Z")), max_size=60)
queue = st.binary(max_size=300)
option = st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=100)


@st.composite
def records(draw: st.DrawFn) -> Ici:
    """Any record that does not contradict itself."""
    family = draw(st.sampled_from((4, 6)))
    addresses = st.binary(min_size=4, max_size=4)
    if family == 6 and draw(st.booleans()):
        addresses = st.binary(min_size=16, max_size=16).filter(lambda a: not a.startswith(bytes(10) + b"\xff\xff"))
    state = draw(st.sampled_from(TcpState))
    idle = state is TcpState.LISTEN or REBUILD[state].fin_acked
    low_port = 0 if state is TcpState.CLOSED else 1
    snd_wnd, rcv_wnd, rcv_nxt = draw(window), draw(window), draw(u32)
    received = b"" if state is TcpState.LISTEN else draw(queue)
    scales = draw(st.none() | st.tuples(scale, scale)) or (-1, -1)
    return Ici(
        id=draw(st.just(b"") | st.binary(min_size=16, max_size=16)),
        epoch=draw(u63),
        family=family,
        local=draw(addresses),
        local_port=draw(st.integers(low_port, 65535)),
        remote=draw(addresses),
        remote_port=draw(st.integers(0 if state in (TcpState.CLOSED, TcpState.LISTEN) else 1, 65535)),
        state=state,
        snd_una=draw(u32),
        rcv_nxt=rcv_nxt,
        snd_wl1=(rcv_nxt + rcv_wnd - draw(st.integers(0, 2**31 - 1))) % 2**32,
        snd_wnd=snd_wnd,
        max_window=draw(st.integers(snd_wnd, 65535 << 14)),
        rcv_wnd=rcv_wnd,
        rcv_wup=(rcv_nxt - draw(st.integers(0, 2**31 - 1))) % 2**32,
        mss_clamp=draw(u16),
        mss=draw(u16),
        snd_wscale=scales[0],
        rcv_wscale=scales[1],
        sack=draw(st.booleans()),
        timestamps=draw(st.integers(0, 2)),
        ts_value=draw(u32),
        ecn=draw(st.integers(0, 2)),
        congestion=draw(st.sampled_from(("", "cubic", "bbr", "reno"))),
        cwnd=draw(u32),
        ssthresh=draw(u32),
        srtt_us=draw(u32),
        rttvar_us=draw(u32),
        options=draw(st.dictionaries(st.from_regex("[A-Z][A-Z0-9_]{0,39}", fullmatch=True), option, max_size=8)),
        urgent=draw(st.integers(-1, len(received))),
        app=draw(st.binary(max_size=100)),
        origin_host=draw(printable),
        origin_time=draw(u63),
        origin_kernel=draw(printable),
        sent=b"" if idle else draw(queue),
        unsent=b"" if idle else draw(queue),
        received=received,
    )


def sealed(body: bytes) -> bytes:
    """A header that is right in front of a body that may be anything."""
    covered = struct.pack(">4sBBHI", b"\x8aICI", 1, 0, 0, len(body))
    return covered + struct.pack(">I", zlib.crc32(covered + body)) + body


def decoded_or_refused(data: bytes) -> Ici | None:
    """Nothing but RecordError may come out, it must know where, and what is read must be writable."""
    try:
        record = Ici.decode(data)
    except RecordError as error:
        assert 0 <= error.offset <= len(data)
        assert str(error)
        return None
    assert Ici.decode(record.encode()) == record
    return record


SMALL = Ici(
    family=4,
    local=b"\n\0\0\1",
    local_port=80,
    remote=b"\n\0\0\x09",
    remote_port=53972,
    state=TcpState.ESTABLISHED,
    snd_una=1,
    rcv_nxt=2,
    sent=b"sent",
    received=b"received",
).encode()


FULL = Ici(
    family=6,
    local=bytes(range(16)),
    local_port=80,
    remote=bytes(range(16, 32)),
    remote_port=53972,
    state=TcpState.ESTABLISHED,
    snd_una=2**32 - 3,
    rcv_nxt=2**31,
    snd_wl1=2**31 - 5,
    snd_wnd=70_000,
    max_window=80_000,
    rcv_wnd=90_000,
    rcv_wup=2**31 - 9,
    snd_wscale=7,
    rcv_wscale=8,
    sack=True,
    timestamps=2,
    ts_value=2**32 - 1,
    congestion="cubic",
    id=bytes(range(16)),
    epoch=2**40,
    options={"SO_KEEPALIVE": 1, "SO_LINGER": bytes(8), "SO_MAX_PACING_RATE": 2**64 - 1},
    urgent=3,
    app=b"state",
    origin_host="host",
    sent=b"sent",
    unsent=b"unsent",
    received=b"received",
).encode()


# --- what is right


@fuzz(100)
@given(records())
def test_any_record_comes_back(record: Ici) -> None:
    again = Ici.decode(record.encode())
    assert again == record
    assert b"".join(again.encode_parts()) == record.encode()
    assert b"".join(bytes(part) for part in record.encode_parts()) == record.encode()


@fuzz(20)
@given(st.lists(records(), max_size=4))
def test_any_stream_comes_back(several: list[Ici]) -> None:
    descriptor = os.memfd_create("records")
    with open(descriptor, "rb") as file:
        assert write_records(descriptor, several) == os.fstat(descriptor).st_size
        file.seek(0)
        assert list(read_records(file)) == several


# --- what is cut short or damaged


def test_cut_short_at_every_byte() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(RecordTruncated) as caught:
            Ici.decode(SMALL[:length])
        assert caught.value.offset == length
        stream = read_records(io.BytesIO(SMALL + SMALL[:length]))
        assert next(stream) is not None
        if length:
            with pytest.raises(RecordTruncated) as caught:
                next(stream)
            assert caught.value.offset == len(SMALL) + length
        else:
            assert list(stream) == []


def test_any_single_bit_flipped() -> None:
    for bit in range(len(SMALL) * 8):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            Ici.decode(damaged)
        with pytest.raises(RecordError):
            list(read_records(io.BytesIO(damaged)))


@fuzz(300)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    decoded_or_refused(data)
    decoded_or_refused(b"\x8aICI" + data)
    decoded_or_refused(sealed(data))


# --- bodies that lie, behind a checksum that is right


@pytest.mark.parametrize("seed", range(4))
def test_bodies_with_bytes_exchanged(seed: int) -> None:
    """Pieces are replaced by random bytes, by the heads of MessagePack values, and by other pieces of the body."""
    chance = random.Random(seed)
    heads = [bytes((head,)) for head in range(0x80, 0x100)]
    read = 0
    for _ in range(5000):
        body = bytearray(FULL[16:])
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(body) + 1)
            other = chance.randrange(len(body))
            new = chance.choice(
                (chance.randbytes(chance.randint(0, 5)), chance.choice(heads), body[other : other + 20])
            )
            body[start : start + chance.choice((len(new), chance.randint(0, 5)))] = new
        try:
            read += decoded_or_refused(sealed(bytes(body))) is not None
        except BaseException:
            print(bytes(body).hex())
            raise
    assert 100 < read < 4000


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | queue,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=10,
)


@fuzz(200)
@given(st.sampled_from(Ici.__struct_fields__), values)
def test_any_value_in_any_field(name: str, value: Any) -> None:
    fields = msgpack.unpackb(SMALL[16:])[0] | {name: value}
    decoded_or_refused(sealed(msgpack.packb([fields, b"", b"", b""])))


@fuzz(100)
@given(values, st.lists(values, max_size=5))
def test_any_body(fields: Any, elements: list[Any]) -> None:
    decoded_or_refused(sealed(msgpack.packb([fields, *elements])))


LENGTHS = (0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
HEADS = {"str": b"\xdb", "bin": b"\xc6", "array": b"\xdd", "map": b"\xdf", "ext": b"\xc9"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_hostile_length_in_every_place(head: str, length: int) -> None:
    """Where any value stands, one that claims more than there is: as a field, below one, as a queue, behind them."""
    lie = HEADS[head] + struct.pack(">I", length)
    least = msgpack.unpackb(SMALL[16:])[0]
    marked = msgpack.packb(
        [least | {"options": {"O": "MARK1"}, "app": "MARK2", "later": ["MARK3"]}, "MARK4", b"", "MARK5"]
    )
    for number in range(1, 6):
        for rest in (b"", marked):
            body = marked.replace(b"\xa5MARK%d" % number, lie + rest)
            with bounded(4 << 20):
                assert decoded_or_refused(sealed(body)) is None


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k", b"\x81"], ids=["arrays", "maps", "keys"])
@pytest.mark.parametrize("depth", [2_000, 100_000])
@pytest.mark.parametrize("field", ["later", "options", "id"])
def test_nesting_is_bounded(opening: bytes, depth: int, field: str) -> None:
    least = msgpack.unpackb(SMALL[16:])[0] | {field: "MARK"}
    body = msgpack.packb([least, b"", b"", b""]).replace(b"\xa4MARK", opening * depth + b"\xa1x")
    with bounded(4 << 20), pytest.raises(RecordError):
        Ici.decode(sealed(body))


# --- memory


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """What runs in it allocates less than that many bytes at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


class Counted(io.BytesIO):
    """A file that knows how much was asked of it."""

    asked = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and 0 <= size <= 1 << 20
        self.asked += size
        return super().read(size)


def test_a_file_that_claims_250_mib_allocates_what_is_there() -> None:
    file = Counted(struct.pack(">4sBBHII", b"\x8aICI", 1, 0, 0, 250 << 20, 0) + bytes(3 << 20))
    with bounded(6 << 20), pytest.raises(RecordTruncated, match="ends after 3145728 of 262144000 bytes of its body"):
        list(read_records(file))


def test_a_body_that_is_too_long_is_not_read() -> None:
    file = Counted(struct.pack(">4sBBHII", b"\x8aICI", 1, 0, 0, 1 << 30, 0) + bytes(1 << 20))
    with bounded(1 << 20), pytest.raises(RecordError, match="the body claims 1073741824 bytes, more than 268435456"):
        list(read_records(file))
    assert file.asked == 16


def test_a_gibibyte_of_something_else_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    with path.open("wb") as empty:
        empty.truncate(1 << 30)
    with (
        path.open("rb") as file,
        bounded(2 << 20),
        pytest.raises(RecordError, match="this is no ICI record, at byte 0"),
    ):
        list(read_records(file))


@pytest.mark.parametrize(
    "value",
    [
        b"\xdb" + struct.pack(">I", 20 << 20) + "\N{GRINNING FACE}".encode() + b"x" * ((20 << 20) - 4),
        b"\xdf" + struct.pack(">I", 4 << 20) + b"\xa1a\x01" * (4 << 20),
        b"\xdd" + struct.pack(">I", 20 << 20) + b"\x90" * (20 << 20),
        b"\xc6" + struct.pack(">I", 20 << 20) + bytes(20 << 20),
    ],
    ids=["str", "map", "array", "bin"],
)
@pytest.mark.parametrize("field", ["congestion", "options", "app", "later"])
def test_large_fields_are_refused_before_they_are_built(field: str, value: bytes) -> None:
    """20 MiB become 80 MiB as the widest str, and more as a list: nothing of it is built."""
    least = msgpack.unpackb(SMALL[16:])[0] | {field: "MARK"}
    data = sealed(msgpack.packb([least, b"", b"", b""]).replace(b"\xa4MARK", value))
    with bounded(1 << 20), pytest.raises(RecordError, match=f"the fields are longer than {MAX_FIELDS} bytes"):
        Ici.decode(data)


def test_the_largest_record_is_read_within_twice_its_size() -> None:
    """In a process of its own, whose address space is limited."""
    half = MAX_RECORD // 2
    script = f"""
import io, resource
from migrate.ici import Ici, read_records
record = Ici(family=4, local=bytes(4), local_port=1, remote=bytes(4), remote_port=1, state=1, snd_una=0, rcv_nxt=0)
record.sent = record.received = memoryview(bytes({half - 4096}))
data = record.encode()
del record
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + len(data) * 5 // 4,) * 2)
again = next(read_records(io.BytesIO(data)))
print(len(again.sent) + len(again.received))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(2 * (half - 4096)), "")
