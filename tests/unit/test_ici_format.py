"""The record's form: vectors, the page that describes it, versions."""

from __future__ import annotations

import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect as shape

import migrate.ici
from migrate.errors import RecordError, RecordVersionError
from migrate.ici import FIELDS, Ici, read_records
from migrate.tcpstate import TcpState
from tests.vectors.ici import make, reader

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors" / "ici"
QUEUES = ("sent", "unsent", "received")
NAMES = sorted(str(path.relative_to(VECTORS).with_suffix("")) for path in VECTORS.glob("*/*.hex"))


def vector(name: str) -> tuple[bytes, dict[str, Any]]:
    expected = json.loads((VECTORS / f"{name}.json").read_text(), object_hook=plain)
    return bytes.fromhex((VECTORS / f"{name}.hex").read_text()), expected


def plain(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else value


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
        for record in reader.read(stream):
            found.append(record)
    except reader.Fault as error:
        fault = {"error": error.kind, "offset": error.offset, "field": error.field}
    assert fault == {key: value for key, value in expected.items() if key not in ("because", "records")}
    assert found == [fields(Ici(**record)) for record in expected["records"]]


def test_the_vectors_are_what_make_writes() -> None:
    wanted: dict[str, str] = {}
    for name, made in make.vectors().items():
        wanted |= make.files(name, made)
    there = {str(path.relative_to(VECTORS)): path.read_text() for path in VECTORS.glob("*/*")}
    assert there == wanted, "run tests/vectors/ici/make.py"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("good")])
def test_what_we_write_others_read(name: str) -> None:
    records = list(read_records(io.BytesIO(vector(name)[0])))
    written = b"".join(record.encode() for record in records)
    assert list(reader.read(written)) == [fields(record) for record in records]


def test_every_rule_has_a_bad_vector() -> None:
    rules = set(re.findall(r'return "(\w+)"', inspect.getsource(migrate.ici._contradiction))) - {"app"}  # 8 MiB of hex
    refused = {vector(name)[1].get("field") for name in NAMES}
    assert rules <= refused
    assert set(re.findall(r'^        "(\w+)": ', inspect.getsource(reader.agree), re.MULTILINE)) == rules


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
    body = make.body({**make.IDLE, "new_in_1_1": {"a": [1, 2]}}, b"x", b"", b"", "a fifth element")
    assert Ici.decode(make.sealed(body, minor=1)) == Ici(**make.IDLE, sent=b"x")


@pytest.mark.parametrize("major", [0, 2, 255])
def test_another_major_version_is_refused_clearly(major: int) -> None:
    with pytest.raises(RecordVersionError) as caught:
        Ici.decode(make.sealed(make.body(make.LEAST), major=major, minor=4))
    assert str(caught.value) == (
        f"the record has format version {major}.4, this reader knows 1.x, at byte 4, field header.major "
        "(read it with the tcpmig that wrote it)"
    )
