"""The record: written, read, refused, and never shown."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import migrate.ici
from migrate.errors import KernelError, RecordError
from migrate.ici import FIELDS, FourTuple, Ici, read_records, write_records
from tests.vectors.ici import make

QUEUES = ("sent", "unsent", "received")


def idle(**changed: Any) -> Ici:
    return Ici(**{**make.IDLE, **changed})


def fields(record: Ici) -> dict[str, Any]:
    return {name: getattr(record, name) for name in FIELDS}


# --- what an error says


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the record ends within its header, at byte 0"),
        (b"\x8aICI\x01", "the record ends within its header, at byte 5"),
        (b"PK\x03\x04", "this is no ICI record, at byte 0, field header.magic"),
        (
            make.sealed(b"", length=1 << 30),
            "the body claims 1073741824 bytes, more than 268435456, at byte 8, field header.length",
        ),
        (make.sealed(b"\x94")[:-1], "the record ends after 0 of 1 bytes of its body, at byte 16"),
        (make.sealed(b"\x94" * 2, reserved=1), "the reserved bytes are not zero, at byte 6, field header.reserved"),
        (make.sealed(b"\x94") + b"\x00\x00", "2 bytes follow the record, at byte 17"),
        (
            make.sealed(make.body({**make.LEAST, "mss": 65536})),
            "invalid body: Expected `int` <= 65535, at byte 16, field mss",
        ),
        (
            make.sealed(make.body({"family": 4})),
            "invalid body: Object missing required field `local`, at byte 16, field local",
        ),
        (
            make.sealed(make.body({**make.LEAST, "max_window": 1, "snd_wnd": 2})),
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
    bad = make.sealed(make.body({**make.LEAST, "family": 5}))
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
    bare = {key: make.IDLE[key] for key in (*make.LEAST, "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")}
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
        make.body(make.LEAST, "password"),
        make.body({**make.LEAST, "app": "password"}),
        make.body({**make.LEAST, "password": 1, "local_port": "password"}),
        make.body({**make.LEAST, "options": {"password": "password"}}),
        make.body({**make.LEAST, "options": {1: "password"}}),
        make.body({**make.LEAST, "congestion": "password" * 3}),
        make.body({**make.LEAST, "congestion": "password"}).replace(b"password", b"pass\xffword"[:8]),
        make.body(make.LEAST, b"", b"", b"password") + b"password",
    ],
)
def test_no_error_shows_content(content: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        Ici.decode(make.sealed(content))
    assert "pass" not in str(caught.value)
