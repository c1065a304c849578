"""Segments as bytes: what is built can be read, what is hostile is refused, checksums are right."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.kernel import segment
from migrate.kernel.segment import ACK, CWR, FIN, PSH, URG, Segment, fix_checksums, four_tuple, readdressed

V4 = FourTuple.parse("10.0.0.1:80,10.0.0.9:53972")
V6 = FourTuple.parse("[fd00::1]:80,[fd00::9]:53972")
TIMESTAMP = (8, struct.pack("!II", 7, 9))

# Made by Linux and held: 5 bytes "hello" with timestamps, the checksum left to a network card.
WIRE4 = bytes.fromhex(
    "450000395a2740004006cc950a0000010a000002d0169b635c460f20a622f32f8018003f142e00000101080aab7856fe977ae39e68656c6c6f"
)
WIRE6 = bytes.fromhex(
    "600e82a300250640fd000000000000000000000000000001fd0000000000000000000000000000029c68a4f7d0d81d1521a43562"
    "80180040fa2f00000101080a71163276ae381f5968656c6c6f"
)


def addresses(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


ports = st.integers(0, 0xFFFF)
numbers = st.integers(0, 2**32 - 1)
tuples = st.sampled_from([4, 16]).flatmap(lambda n: st.builds(FourTuple, addresses(n), ports, addresses(n), ports))
# Kinds 0 and 1 are END and NOP; 40 bytes is what a header has room for.
options = st.lists(st.tuples(st.integers(2, 255), st.binary(max_size=10)), max_size=3).map(tuple)
segments = st.builds(
    Segment,
    tuples,
    seq=numbers,
    ack=numbers,
    flags=st.integers(0, 0xFFF),
    window=ports,
    options=options,
    payload=st.binary(max_size=300),
    urgent=ports,
    traffic_class=st.integers(0, 255),
    hop_limit=st.integers(1, 255),
)


def words(data: bytes) -> int:
    """The sum of RFC 1071 as the RFC spells it, to compare with."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def covered(packet: bytes) -> bytes:
    """What a TCP checksum is over, in a packet without extensions."""
    if packet[0] >> 4 == 4:
        at = (packet[0] & 15) * 4
        return packet[12:20] + struct.pack("!HH", 6, len(packet) - at) + packet[at:]
    return packet[8:40] + struct.pack("!II", len(packet) - 40, 6) + packet[40:]


@given(segments)
def test_what_is_built_is_read_again(made: Segment) -> None:
    packet = made.build()
    assert Segment.parse(packet) == made
    assert four_tuple(packet) == made.four_tuple
    assert words(covered(packet)) == 0xFFFF
    assert packet[0] >> 4 == 6 or words(packet[:20]) == 0xFFFF
    assert fix_checksums(packet) is packet


@pytest.mark.parametrize("packet", [WIRE4, WIRE6], ids=["IPv4", "IPv6"])
def test_what_linux_sent_is_read(packet: bytes) -> None:
    read = Segment.parse(packet)
    assert read.payload == b"hello"
    assert read.flags == ACK | PSH
    assert [kind for kind, _ in read.options] == [8]
    assert str(ip_address(read.four_tuple.remote)) in ("10.0.0.1", "fd00::1")
    assert read.four_tuple.local_port == int.from_bytes(packet[-37 + 2 : -37 + 4])
    assert words(covered(packet)) != 0xFFFF == words(covered(fix_checksums(packet)))


def changed(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes((value,)) + packet[at + 1 :]


PLAIN4 = Segment(V4, 1, payload=b"x").build()
PLAIN6 = Segment(V6, 1, payload=b"x").build()
OPTION = Segment(V4, 1, options=(TIMESTAMP,)).build()


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"", "begins with no IP header"),
        (PLAIN4[:19], "begins with no IP header"),
        (PLAIN6[:39], "begins with no IP header"),
        (changed(PLAIN4, 0, 0x55), "begins with no IP header"),
        (changed(PLAIN4, 0, 0x44), "IPv4 header is too short"),
        (changed(PLAIN4, 6, 0x20), "fragment"),
        (changed(PLAIN4, 7, 0x01), "fragment"),
        (changed(PLAIN4, 9, 17), "protocol 17"),
        (changed(PLAIN6, 6, 44), "protocol 44"),
        (changed(PLAIN6, 6, 51), "protocol 51"),
        (changed(PLAIN4, 3, 39), "ends before its TCP header"),
        (PLAIN4[:39], "ends before its TCP header"),
        (changed(PLAIN4, 0, 0x4F), "ends before its TCP header"),
        (changed(PLAIN4, 32, 0x40), "TCP header claims a length"),
        (changed(PLAIN4, 32, 0xF0), "TCP header claims a length"),
        (changed(OPTION, 41, 0), "TCP options claims a length"),
        (changed(OPTION, 41, 1), "TCP options claims a length"),
        (changed(OPTION, 41, 13), "TCP options claims a length"),
        (changed(PLAIN4, 3, 42), "tells of 42 bytes, 41 are there"),
        (PLAIN6[:-1], "tells of 61 bytes, 60 are there"),
    ],
)
def test_what_is_no_segment_is_refused_with_the_reason(packet: bytes, why: str) -> None:
    with pytest.raises(Error, match=why):
        Segment.parse(packet)


@given(st.binary(max_size=120))
def test_noise_is_refused_or_read(packet: bytes) -> None:
    digest(packet)


@given(st.sampled_from([PLAIN4, PLAIN6, OPTION, WIRE4, WIRE6]), st.lists(st.tuples(ports, ports), max_size=4), ports)
def test_damage_is_refused_or_read(packet: bytes, damage: list[tuple[int, int]], length: int) -> None:
    hurt = bytearray(packet)
    for at, value in damage:
        hurt[at % len(hurt)] = value % 256
    digest(bytes(hurt[: 1 + length % len(hurt)]))


def digest(packet: bytes) -> None:
    """Whatever it is: each function reads it within its bounds or refuses it."""
    for function in (Segment.parse, four_tuple, fix_checksums):
        try:
            result = function(packet)
        except Error:
            continue
        if isinstance(result, Segment):
            assert len(result.payload) <= len(packet)


@given(st.lists(st.sampled_from([0, 43, 60]), max_size=4), st.integers(0, 3))
def test_ipv6_extension_headers_are_passed_over(kinds: list[int], words_more: int) -> None:
    body = PLAIN6[40:]
    following = [*kinds[1:], 6]
    extensions = b"".join(bytes((after, words_more)) + bytes(6 + 8 * words_more) for after in following[: len(kinds)])
    first = kinds[0] if kinds else 6
    packet = PLAIN6[:4] + struct.pack("!HB", len(extensions) + len(body), first) + PLAIN6[7:40] + extensions + body
    assert Segment.parse(packet) == Segment.parse(PLAIN6)
    assert fix_checksums(packet) is packet


def test_an_endless_chain_of_extensions_ends_with_the_packet() -> None:
    chain = b"\0\0" + bytes(6)
    with pytest.raises(Error, match="protocol 0"):
        Segment.parse(PLAIN6[:4] + struct.pack("!HB", 65528, 0) + PLAIN6[7:40] + chain * 8191)


def test_ipv4_options_are_passed_over() -> None:
    packet = changed(changed(PLAIN4[:20] + b"\1\1\1\0" + PLAIN4[20:], 0, 0x46), 3, 45)
    assert Segment.parse(packet) == Segment.parse(PLAIN4)


def test_what_follows_the_packet_is_not_its() -> None:
    assert Segment.parse(PLAIN4 + b"padding") == Segment.parse(PLAIN4)
    assert fix_checksums(PLAIN4 + b"padding") == PLAIN4


@pytest.mark.parametrize("size", [65455, 65456])
def test_a_segment_fits_into_one_packet_or_is_refused(size: int) -> None:
    made = Segment(V4, 1, payload=bytes(size), options=((2, b"\5\xb4"),) * 10)
    if size == 65455:
        assert len(made.build()) == 65535
    else:
        with pytest.raises(Error, match="too many"):
            made.build()
    with pytest.raises(Error, match="too many"):
        Segment(V4, 1, options=((2, b"\5\xb4"),) * 11).build()


def unfinished(packet: bytes) -> bytes:
    """As it looks when the network card is to do the sum (CHECKSUM_PARTIAL): that of the pseudo header alone."""
    at = 20 if packet[0] >> 4 == 4 else 40
    pseudo = covered(packet)[: 12 if at == 20 else 40]
    return packet[: at + 16] + struct.pack("!H", words(pseudo)) + packet[at + 18 :]


@given(segments)
def test_an_unfinished_checksum_is_finished(made: Segment) -> None:
    assert fix_checksums(unfinished(made.build())) == made.build()


@given(segments, st.integers(0, 10**6), st.integers(1, 255))
def test_what_the_network_damaged_is_never_repaired(made: Segment, at: int, flip: int) -> None:
    packet = made.build()
    start = 20 if packet[0] >> 4 == 4 else 40
    at = start + at % (len(packet) - start)
    hurt = changed(packet, at, packet[at] ^ flip)
    if words(covered(hurt)) == 0xFFFF or hurt == unfinished(hurt):
        return  # the damage hit the checksum so that it looks right or unfinished: 16 bits cannot tell
    with pytest.raises(Error):
        fix_checksums(hurt)


@pytest.mark.parametrize("flow", [V4, V6], ids=["IPv4", "IPv6"])
def test_what_nflog_cut_comes_back_shorter(flow: FourTuple) -> None:
    payload = bytes(range(256)) * 255
    whole = Segment(flow, 5, flags=ACK | PSH | FIN, options=(TIMESTAMP,), payload=payload)
    cut = fix_checksums(unfinished(whole.build())[:-4])
    assert Segment.parse(cut) == replace(whole, flags=ACK, payload=payload[:-4])
    with pytest.raises(Error, match="cannot be verified"):
        fix_checksums(whole.build()[:-4])


@given(segments, st.data())
def test_a_readdressed_segment_says_the_same_to_another(made: Segment, data: st.DataObject) -> None:
    size = len(made.four_tuple.local)
    new = data.draw(st.builds(FourTuple, addresses(size), ports, addresses(size), ports))
    for packet in (made.build(), unfinished(made.build())):
        moved = readdressed(packet, new)
        assert fix_checksums(moved) is moved
        assert Segment.parse(moved) == replace(made, four_tuple=new)


@given(segments, st.integers(min_value=0), st.integers(1, 255))
def test_a_damaged_segment_is_not_readdressed(made: Segment, at: int, flip: int) -> None:
    packet = bytearray(made.build())
    payload = len(packet) - len(made.payload)
    assume(made.payload)
    packet[payload + at % len(made.payload)] ^= flip
    with pytest.raises(Error):
        readdressed(bytes(packet), made.four_tuple)


@given(segments, st.integers(1, 400))
def test_split_segments_say_the_same(made: Segment, size: int) -> None:
    parts = list(made.split(size))
    assert b"".join(part.payload for part in parts) == made.payload
    assert all(len(part.payload) <= size for part in parts)
    at = made.seq
    for part in parts:
        assert part.seq == at
        at = (at + len(part.payload)) % 2**32
        assert Segment.parse(part.build()) == part
    assert parts[-1].flags & (FIN | PSH) == made.flags & (FIN | PSH)
    assert not any(part.flags & (FIN | PSH) for part in parts[:-1])
    assert not any(part.flags & CWR for part in parts[1:])
    assert all(part.options == made.options for part in parts)


def test_split_leaves_the_urgent_mark_where_it_was() -> None:
    made = Segment(V4, 100, flags=ACK | URG, payload=b"0123456789", urgent=7)
    marks = [(part.seq + part.urgent) for part in made.split(4) if part.flags & URG]
    assert marks == [107, 107]


@given(st.lists(st.binary(max_size=9000), max_size=3))
def test_sums_are_those_of_the_rfc(pieces: Iterable[bytes]) -> None:
    data = b"".join(pieces)
    ours = segment._sum(data)
    assert int.from_bytes(struct.pack("<H", ours)) % 0xFFFF == words(data) % 0xFFFF
