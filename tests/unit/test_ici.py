"""The record: its bytes, its document, its vectors, and how connections are spelt."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import os
import re
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from msgspec import inspect as shape

import migrate.ici
from migrate.errors import KernelError, RecordError, RecordVersionError, UsageError
from migrate.fourtuple import unmapped
from migrate.ici import FIELDS, FourTuple, Ici, parse_endpoint, read_records, write_records
from migrate.tcpstate import TcpState

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors" / "ici"
QUEUES = ("sent", "unsent", "received")


def beside(name: str) -> ModuleType:
    """reader.py or make.py of the vectors, which are no part of a package: they stand alone."""
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", VECTORS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READER, MAKE = beside("reader"), beside("make")
NAMES = sorted(str(path.relative_to(VECTORS).with_suffix("")) for path in VECTORS.glob("*/*.hex"))


def vector(name: str) -> tuple[bytes, dict[str, Any]]:
    expected = json.loads((VECTORS / f"{name}.json").read_text(), object_hook=plain)
    return bytes.fromhex((VECTORS / f"{name}.hex").read_text()), expected


def plain(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else value


def idle(**changed: Any) -> Ici:
    return Ici(**{**MAKE.IDLE, **changed})


def fields(record: Ici) -> dict[str, Any]:
    return {name: getattr(record, name) for name in FIELDS}


# --- the vectors


@pytest.mark.parametrize("name", NAMES)
def test_vector(name: str) -> None:
    stream, expected = vector(name)
    found, fault = [], {}
    try:
        for record in read_records(io.BytesIO(stream)):
            found.append(fields(record))
    except RecordError as error:
        fault = {"error": type(error).__name__, "offset": error.offset, "field": error.field}
    assert fault == {key: value for key, value in expected.items() if key not in ("because", "records")}
    assert found == [fields(Ici(**record)) for record in expected["records"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_enough_to_write_a_reader(name: str) -> None:
    stream, expected = vector(name)
    found, fault = [], {}
    try:
        for record in READER.read(stream):
            found.append(record)
    except READER.Fault as error:
        fault = {"error": error.kind, "offset": error.offset, "field": error.field}
    assert fault == {key: value for key, value in expected.items() if key not in ("because", "records")}
    assert found == [fields(Ici(**record)) for record in expected["records"]]


def test_the_vectors_are_what_make_writes() -> None:
    wanted: dict[str, str] = {}
    for name, made in MAKE.vectors().items():
        wanted |= MAKE.files(name, made)
    there = {str(path.relative_to(VECTORS)): path.read_text() for path in VECTORS.glob("*/*")}
    assert there == wanted, "run tests/vectors/ici/make.py"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("good")])
def test_what_we_write_others_read(name: str) -> None:
    records = list(read_records(io.BytesIO(vector(name)[0])))
    written = b"".join(record.encode() for record in records)
    assert list(READER.read(written)) == [fields(record) for record in records]


def test_every_rule_has_a_bad_vector() -> None:
    rules = set(re.findall(r'return "(\w+)"', inspect.getsource(migrate.ici._contradiction))) - {"app"}  # 8 MiB of hex
    refused = {vector(name)[1].get("field") for name in NAMES}
    assert rules <= refused
    assert set(re.findall(r'^        "(\w+)": ', inspect.getsource(READER.agree), re.MULTILINE)) == rules


# --- the document


def row(field: shape.Field) -> str:
    meaning, unit = FIELDS[field.name]
    match field.type:
        case shape.IntType(ge=low, le=high):
            kind, limits = "int", f"{low} … {high}"
        case shape.BytesType(min_length=low, max_length=high):
            kind, limits = "bin", f"{low or 0} … {high} bytes"
        case shape.StrType(max_length=high):
            kind, limits = "str", f"0 … {high} characters"
        case shape.BoolType():
            kind, limits = "bool", "false, true"
        case shape.DictType(max_length=high):
            kind, limits = "map", f"0 … {high} entries"
        case other:
            raise AssertionError(f"no row for {other}")
    default = "" if field.required else {b"": "empty", "": "empty", False: "false"}.get(field.default, field.default)
    if field.default_factory is dict:
        default = "{}"
    if kind == "int" and not field.required:
        default = field.default
    return f"| `{field.name}` | {kind} | {limits} | {default} | {meaning} | {unit} |"


def test_the_page_lists_exactly_the_fields() -> None:
    page = (ROOT / "docs" / "ici-format.md").read_text()
    record = shape.type_info(Ici)
    assert isinstance(record, shape.StructType)
    wanted = [row(field) for field in record.fields if field.name not in QUEUES]
    table = page.partition("| field | type |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == wanted
    for index, name in enumerate(QUEUES, 1):
        assert f"| {index} | bin | `{name}`: {FIELDS[name].meaning} |" in page.splitlines()


def test_the_page_lists_exactly_the_rules() -> None:
    page = (ROOT / "docs" / "ici-format.md").read_text()
    table = page.partition("| field | rule |")[2].partition("\n\n")[0]
    rules = list(dict.fromkeys(re.findall(r'return "(\w+)"', inspect.getsource(migrate.ici._contradiction))))
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [rule for rule in rules if rule != "app"]


def test_the_pages_limits_and_example_are_right() -> None:
    page = (ROOT / "docs" / "ici-format.md").read_text()
    for limit in (migrate.ici.MAX_RECORD, migrate.ici.MAX_QUEUE, migrate.ici.MAX_FIELDS):
        assert f" {limit} bytes ({limit >> 20} MiB)" in page
    assert "*Version {}.{}.*".format(*migrate.ici.VERSION) in page
    example = page.partition("## An example")[2].partition("```\n")[2].partition("```")[0]
    assert bytes.fromhex("".join(line[:38] for line in example.splitlines())) == vector("good/example")[0]
    for state in TcpState:
        assert f" {state.value} {state.name.replace('_', '-')}" in page.replace("\n", " ")


def test_every_field_has_a_meaning() -> None:
    assert tuple(FIELDS) == Ici.__struct_fields__
    assert all(field.meaning for field in FIELDS.values())
    assert str(FIELDS["cwnd"]) == "congestion window (segments)"
    assert str(FIELDS["sack"]) == "selective acknowledgments were negotiated"


# --- versions


def test_a_later_minor_version_is_read() -> None:
    body = MAKE.body({**MAKE.IDLE, "new_in_1_1": {"a": [1, 2]}}, b"x", b"", b"", "a fifth element")
    assert Ici.decode(MAKE.sealed(body, minor=1)) == idle(sent=b"x")


@pytest.mark.parametrize("major", [0, 2, 255])
def test_another_major_version_is_refused_clearly(major: int) -> None:
    with pytest.raises(RecordVersionError) as caught:
        Ici.decode(MAKE.sealed(MAKE.body(MAKE.LEAST), major=major, minor=4))
    assert str(caught.value) == (
        f"the record has format version {major}.4, this reader knows 1.x, at byte 4, field header.major "
        "(read it with the tcpmig that wrote it)"
    )


# --- what an error says


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the record ends within its header, at byte 0"),
        (b"\x8aICI\x01", "the record ends within its header, at byte 5"),
        (b"PK\x03\x04", "this is no ICI record, at byte 0, field header.magic"),
        (
            MAKE.sealed(b"", length=1 << 30),
            "the body claims 1073741824 bytes, more than 268435456, at byte 8, field header.length",
        ),
        (MAKE.sealed(b"\x94")[:-1], "the record ends after 0 of 1 bytes of its body, at byte 16"),
        (MAKE.sealed(b"\x94" * 2, reserved=1), "the reserved bytes are not zero, at byte 6, field header.reserved"),
        (MAKE.sealed(b"\x94") + b"\x00\x00", "2 bytes follow the record, at byte 17"),
        (
            MAKE.sealed(MAKE.body({**MAKE.LEAST, "mss": 65536})),
            "invalid body: Expected `int` <= 65535, at byte 16, field mss",
        ),
        (
            MAKE.sealed(MAKE.body({"family": 4})),
            "invalid body: Object missing required field `local`, at byte 16, field local",
        ),
        (
            MAKE.sealed(MAKE.body({**MAKE.LEAST, "max_window": 1, "snd_wnd": 2})),
            "smaller than snd_wnd, at byte 16, field max_window",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_an_error_says_what_and_where(data: bytes, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        Ici.decode(data)
    assert str(caught.value) == said
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_offsets_count_from_the_start_of_the_stream() -> None:
    good = idle().encode()
    bad = MAKE.sealed(MAKE.body({**MAKE.LEAST, "family": 5}))
    stream = read_records(io.BytesIO(good * 3 + bad))
    assert [next(stream).epoch for _ in range(3)] == [3, 3, 3]
    with pytest.raises(RecordError) as caught:
        next(stream)
    assert (caught.value.offset, caught.value.field) == (3 * len(good) + 16, "family")


# --- writing


def test_a_record_comes_back_as_it_was() -> None:
    record = idle(sent=b"in flight", unsent=b"\0" * 70_000, received=b"unread", app=b"\xff", urgent=2)
    again = Ici.decode(record.encode())
    assert fields(again) == fields(record)
    assert again == record
    assert again.four_tuple == FourTuple(b"\n\0\0\1", 80, b"\n\0\0\x09", 53972)


def test_an_idle_record_is_small() -> None:
    assert len(idle().encode()) <= 512
    bare = {key: MAKE.IDLE[key] for key in (*MAKE.LEAST, "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")}
    assert len(Ici(**bare).encode()) < 300


def test_queues_are_not_copied() -> None:
    sent, unsent, received = bytearray(100_000), memoryview(bytes(200_000)), b"r" * 300_000
    parts = idle(sent=memoryview(sent), unsent=unsent, received=received).encode_parts()
    views = [part for part in parts if isinstance(part, memoryview)]
    assert [view.obj for view in views] == [sent, unsent.obj, received]
    assert sum(len(part) for part in parts if isinstance(part, bytes)) < 600


def test_queues_are_read_as_views() -> None:
    data = idle(sent=b"s" * 1000, received=b"r" * 1000).encode()
    record = Ici.decode(data)
    assert isinstance(record.sent, memoryview) and record.sent.obj is data
    assert isinstance(record.received, memoryview) and record.received.obj is data


@pytest.mark.parametrize(
    "empty", [memoryview(b""), bytearray(), bytes(memoryview(b""))], ids=["view", "array", "bytes"]
)
@pytest.mark.parametrize("name", QUEUES)
def test_an_empty_queue_of_any_kind_leaves_no_trace(name: str, empty: memoryview | bytearray | bytes) -> None:
    assert idle(**{name: empty}).encode() == idle().encode()


def test_a_queue_of_wider_items_counts_bytes() -> None:
    record = idle(sent=memoryview(bytes(range(8))).cast("I"))
    assert Ici.decode(record.encode()).sent == bytes(range(8))


@pytest.mark.parametrize(
    ("changed", "field", "said"),
    [
        ({"family": 5}, "family", "neither 4 nor 6"),
        ({"rcv_wup": 2718281829}, "rcv_wup", "after rcv_nxt"),
        ({"id": b"short"}, "id", "neither empty nor 16 bytes long"),
        ({"app": bytes(migrate.ici.MAX_APP + 1)}, "app", "longer than 8388608 bytes"),
        ({"sent": bytes(migrate.ici.MAX_QUEUE + 1)}, "sent", "longer than 134217728 bytes"),
        ({"options": {"O": bytes(10 << 20)}}, None, "the fields are longer than 9437184 bytes"),
        (
            dict.fromkeys(QUEUES, bytes(migrate.ici.MAX_QUEUE)),
            None,
            "the body is longer than 268435456 bytes",
        ),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_no_reader_would_take_is_not_written(changed: dict[str, Any], field: str | None, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        idle(**changed).encode_parts()
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{said}, at byte 16")


def test_the_largest_application_state_is_written_and_read() -> None:
    assert len(Ici.decode(idle(app=bytes(migrate.ici.MAX_APP)).encode()).app) == migrate.ici.MAX_APP


# --- streams


def test_records_go_through_a_pipe_in_order() -> None:
    records = [idle(epoch=number, received=b"x" * (number * 997 % 5000)) for number in range(3000)]
    reading, writing = os.pipe()
    total: list[int] = []
    thread = threading.Thread(target=lambda: total.append(write_and_close(writing, records)))
    thread.start()
    try:
        found = [(record.epoch, len(record.received)) for record in read_records(reading)]
    finally:
        thread.join(30)
        os.close(reading)
    assert found == [(record.epoch, len(record.received)) for record in records]
    assert total == [sum(len(record.encode()) for record in records)]


def write_and_close(descriptor: int, records: list[Ici]) -> int:
    try:
        return write_records(descriptor, records)
    finally:
        os.close(descriptor)


def test_a_descriptor_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(idle().encode())
    with path.open("rb") as file:
        assert len(list(read_records(file.fileno()))) == 1
        file.seek(0)
        assert len(list(read_records(file))) == 1


@pytest.mark.parametrize("most", [1, 7, 400, 5000])
def test_partial_writes_are_continued(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [idle(sent=b"s" * 700, received=b"r" * 3), idle(), idle(unsent=b"u" * 1500)]
    calls = 0

    def writev(descriptor: int, buffers: list[bytes | memoryview]) -> int:
        nonlocal calls
        calls += 1
        return os.write(descriptor, b"".join(buffers)[:most])

    monkeypatch.setattr(os, "writev", writev)
    with (tmp_path / "records").open("wb") as file:
        total = write_records(file.fileno(), records)
    data = (tmp_path / "records").read_bytes()
    assert data == b"".join(record.encode() for record in records)
    assert total == len(data)
    assert calls == -(-total // most)


def test_many_records_go_with_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.writev

    def writev(descriptor: int, buffers: list[bytes | memoryview]) -> int:
        calls.append(len(buffers))
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "writev", writev)
    with (tmp_path / "records").open("wb") as file:
        write_records(file.fileno(), (idle() for _ in range(5000)))
    assert len(calls) <= 6
    assert max(calls) <= os.sysconf("SC_IOV_MAX")


def test_a_full_disk_is_the_kernels_error() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(KernelError, match=r"writing records: No space left on device \[ENOSPC\]"):
            write_records(full, [idle()])
    finally:
        os.close(full)


def test_an_unreadable_stream_is_the_kernels_error(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(KernelError, match="reading records"):
            list(read_records(directory))
    finally:
        os.close(directory)


# --- user data


def test_no_form_of_a_record_shows_user_data() -> None:
    secret = b"password"
    record = idle(sent=secret, unsent=secret * 2, received=secret * 3, app=secret * 4)
    told = f"10.0.0.1:80,10.0.0.9:53972 ESTABLISHED sent={8} unsent={16} received={24}"
    assert str(record) == told
    assert repr(record) == f"<Ici {told} app=32>"
    assert record.__rich_repr__() == [("", told)]
    record.urgent = 99
    with pytest.raises(RecordError) as caught:
        record.encode()
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        MAKE.body(MAKE.LEAST, "password"),
        MAKE.body({**MAKE.LEAST, "app": "password"}),
        MAKE.body({**MAKE.LEAST, "password": 1, "local_port": "password"}),
        MAKE.body({**MAKE.LEAST, "options": {"password": "password"}}),
        MAKE.body({**MAKE.LEAST, "options": {1: "password"}}),
        MAKE.body({**MAKE.LEAST, "congestion": "password" * 3}),
        MAKE.body({**MAKE.LEAST, "congestion": "password"}).replace(b"password", b"pass\xffword"[:8]),
        MAKE.body(MAKE.LEAST, b"", b"", b"password") + b"password",
    ],
)
def test_no_error_shows_content(content: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        Ici.decode(MAKE.sealed(content))
    assert "pass" not in str(caught.value)


# --- names of connections


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1:80,10.0.0.9:53972", None),
        ("[fd00::1]:80,[fd00::9]:53972", None),
        ("[::]:80,[::]:0", None),
        ("0.0.0.0:65535,255.255.255.255:1", None),
        ("[FD00:0:0:0:0:0:0:1]:80,[fd00::9]:1", "[fd00::1]:80,[fd00::9]:1"),
        ("[::ffff:10.0.0.1]:80,[::ffff:a00:9]:53972", "10.0.0.1:80,10.0.0.9:53972"),
        ("[::ffff:10.0.0.1]:80,10.0.0.9:53972", "10.0.0.1:80,10.0.0.9:53972"),
    ],
)
def test_a_four_tuple_is_spelt(text: str, canonical: str | None) -> None:
    parsed = FourTuple.parse(text)
    assert str(parsed) == (canonical or text)
    assert FourTuple.parse(str(parsed)) == parsed
    assert parsed.reversed().reversed() == parsed
    assert parsed.family == (6 if "[" in str(parsed) else 4)


CONNECTION = "(write 10.0.0.1:80,10.0.0.9:53972 or [fd00::1]:80,[fd00::9]:53972)"
ENDPOINT = "(write 10.0.0.1:80, [fd00::1]:80, or the address alone)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"'': a connection is two ends with one comma between them {CONNECTION}"),
        ("10.0.0.1:80", f"'10.0.0.1:80': a connection is two ends with one comma between them {CONNECTION}"),
        ("a,b,c", f"'a,b,c': a connection is two ends with one comma between them {CONNECTION}"),
        ("10.0.0.1,10.0.0.9:1", f"'10.0.0.1,10.0.0.9:1': each end of a connection has a port {CONNECTION}"),
        (
            "10.0.0.1:80,[fd00::9]:1",
            "'10.0.0.1:80,[fd00::9]:1': both ends of a connection are IPv4 addresses, "
            f"or both are IPv6 addresses {CONNECTION}",
        ),
        (
            "*:80,*:90",
            f"'*:80,*:90': both ends of a connection are IPv4 addresses, or both are IPv6 addresses {CONNECTION}",
        ),
        ("10.0.0.1:80,10.0.0.9:65536", f"'10.0.0.9:65536': '65536' is no port number {ENDPOINT}"),
        ("10.0.0.1:080,10.0.0.9:1", f"'10.0.0.1:080': '080' is no port number {ENDPOINT}"),
        ("10.0.0.1:80, 10.0.0.9:1", f"' 10.0.0.9:1': ' 10.0.0.9' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.1:-1,10.0.0.9:1", f"'10.0.0.1:-1': '-1' is no port number {ENDPOINT}"),
        ("10.0.0.1:,10.0.0.9:1", f"'10.0.0.1:': '' is no port number {ENDPOINT}"),
        ("10.0.0.1:٨٠,10.0.0.9:1", f"'10.0.0.1:٨٠': '٨٠' is no port number {ENDPOINT}"),
        ("10.0.1:80,10.0.0.9:1", f"'10.0.1:80': '10.0.1' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.01:80,10.0.0.9:1", f"'10.0.0.01:80': '10.0.0.01' is no IPv4 address {ENDPOINT}"),
        ("localhost:80,10.0.0.9:1", f"'localhost:80': 'localhost' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.1\0:80,10.0.0.9:1", f"'10.0.0.1\\x00:80': '10.0.0.1\\x00' is no IPv4 address {ENDPOINT}"),
        ("fd00::1:80,fd00::9:1", f"'fd00::1:80': an IPv6 address stands in brackets {ENDPOINT}"),
        ("[10.0.0.1]:80,10.0.0.9:1", f"'[10.0.0.1]:80': '10.0.0.1' is no IPv6 address {ENDPOINT}"),
        (
            "[fd00::1:80,[fd00::9]:1",
            f"'[fd00::1:80': an IPv6 address ends with ']', and then comes ':PORT' or nothing {ENDPOINT}",
        ),
        (
            "[fd00::1]80,[fd00::9]:1",
            f"'[fd00::1]80': an IPv6 address ends with ']', and then comes ':PORT' or nothing {ENDPOINT}",
        ),
        (
            "[fe80::1%eth0]:80,[fe80::2]:1",
            f"'[fe80::1%eth0]:80': a zone names an interface of one host, it means nothing on another {ENDPOINT}",
        ),
    ],
)
def test_a_misspelt_four_tuple_is_explained(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        FourTuple.parse(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("10.0.0.1:80", b"\n\0\0\1", 80),
        ("10.0.0.1", b"\n\0\0\1", None),
        ("[fd00::1]:0", b"\xfd" + bytes(14) + b"\1", 0),
        ("[fd00::1]", b"\xfd" + bytes(14) + b"\1", None),
        ("[::ffff:1.2.3.4]", b"\1\2\3\4", None),
        ("*:443", b"", 443),
        ("*", b"", None),
    ],
)
def test_an_endpoint_is_spelt(text: str, address: bytes, port: int | None) -> None:
    assert parse_endpoint(text) == (address, port)


def test_only_mapped_addresses_are_unmapped() -> None:
    assert unmapped(bytes(10) + b"\xff\xff\1\2\3\4") == b"\1\2\3\4"
    for address in (b"\1\2\3\4", bytes(16), bytes(9) + b"\xff\xff" + bytes(5)):
        assert unmapped(address) is address
