"""Sealed records: what another reader makes of them, and that no change goes unnoticed."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import sealed
from migrate.errors import NotFound, PrivilegeError, RecordError, RecordTruncated, RecordVersionError, UsageError
from migrate.ici import Ici, read_records
from migrate.sealed import CHUNK, Key

SECRET = bytes(range(32))
KEY = Key(SECRET)
RECORD = Ici(
    family=4,
    local=b"\x0a\0\0\1",
    local_port=80,
    remote=b"\x0a\0\0\x09",
    remote_port=53972,
    state=1,
    snd_una=1,
    rcv_nxt=2,
    received=b"unread",
)
# docs/sealed-records.md prints this one: "hello" under the key 00 01 … 1f with the salt 80 81 … 8f.
EXAMPLE = Path(__file__).parents[1] / "vectors" / "sealed" / "hello.hex"


def independently(container: bytes, secret: bytes = SECRET, context: bytes = b"") -> bytes:
    """The plaintext as docs/sealed-records.md says, with other functions than the code's."""
    header, rest, plain, number, last = container[:40], container[40:], b"", 0, 0
    assert header[:8] == b"\x8aICS\1\0\0\0"
    derived = HKDF(algorithm=SHA256(), length=48, salt=header[8:24], info=b"tcpmig sealed records").derive(secret)
    assert derived[32:] == header[24:40]
    while rest:
        assert not last
        last, length = divmod(int.from_bytes(rest[:4], "big"), 1 << 31)
        assert length <= 65536
        cipher, tag, rest = rest[4 : 4 + length], rest[4 + length : 20 + length], rest[20 + length :]
        mode = modes.GCM(number.to_bytes(11, "big") + bytes([last]), tag)
        opening = Cipher(algorithms.AES256(derived[:32]), mode).decryptor()
        opening.authenticate_additional_data(header + context)
        plain += opening.update(cipher) + opening.finalize()
        number += 1
    assert last
    return plain


def written(records: list[Ici], path: Path) -> bytes:
    with path.open("wb") as file:
        length = sealed.write_records(file.fileno(), records, KEY)
    data = path.read_bytes()
    assert len(data) == length
    return data


def records_in(data: bytes, key: Key | None = KEY) -> list[Ici]:
    return list(sealed.read_records(io.BufferedReader(io.BytesIO(data)), key))


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_another_reader_agrees(length: int) -> None:
    data = os.urandom(length)
    container = KEY.seal(data, b"whose")
    assert independently(container, context=b"whose") == data == KEY.open(container, b"whose")


def test_the_documented_example() -> None:
    container = bytes.fromhex(EXAMPLE.read_text())
    assert KEY.open(container) == independently(container) == b"hello"
    page = (Path(__file__).parents[2] / "docs" / "sealed-records.md").read_text()
    lines = page.partition("(`tests/vectors/sealed/hello.hex`):\n\n```\n")[2].partition("```")[0].splitlines()
    assert bytes.fromhex("".join(line[:48] for line in lines)) == container


@given(st.lists(st.binary(max_size=3 * CHUNK), max_size=4))
@settings(max_examples=25, deadline=None)
def test_records_come_back(tmp_path_factory: pytest.TempPathFactory, queues: list[bytes]) -> None:
    records = [msgspec.structs.replace(RECORD, received=queue) for queue in queues]
    data = written(records, tmp_path_factory.getbasetemp() / "records")
    assert records_in(data) == records == list(read_records(io.BytesIO(independently(data))))


@given(st.binary(max_size=2000), st.binary(max_size=40))
def test_anything_else_is_refused_with_a_place(data: bytes, context: bytes) -> None:
    for garbage in (data, KEY.seal(data, context)[:40] + data):
        with pytest.raises(RecordError) as error:
            KEY.open(garbage, context)
        assert 0 <= error.value.offset <= len(garbage)


def test_no_container_is_like_another() -> None:
    assert len({KEY.seal(b"the same") for _ in range(100)}) == 100


SMALL = KEY.seal(b"small, but secret", b"row 7")


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_what_is_cut_off_is_missed(length: int) -> None:
    with pytest.raises(RecordTruncated) as error:
        KEY.open(SMALL[:length], b"row 7")
    assert error.value.offset == length


@pytest.mark.parametrize("bit", range(8 * len(SMALL)))
def test_every_bit_counts(bit: int) -> None:
    changed = bytearray(SMALL)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RecordError) as error:
        KEY.open(bytes(changed), b"row 7")
    assert error.value.offset <= len(SMALL)


def _chunks(container: bytes) -> Iterator[bytes]:
    at = 40
    while at < len(container):
        length = 20 + (struct.unpack_from(">I", container, at)[0] & 0x7FFFFFFF)
        yield container[at : at + length]
        at += length


def test_chunks_stay_where_and_what_they_were() -> None:
    container = KEY.seal(bytes(3 * CHUNK))
    first, second, third = _chunks(container)
    unmarked = (CHUNK).to_bytes(4, "big") + third[4:]
    marked = (CHUNK | 1 << 31).to_bytes(4, "big") + second[4:]
    other = list(_chunks(KEY.seal(bytes(3 * CHUNK))))
    for chunks, offset in [
        ((second, first, third), 40),
        ((first, third), 40 + len(first)),
        ((first, first, second, third), 40 + len(first)),
        ((first, marked), 40 + len(first)),
        ((first, second, unmarked), 40 + 2 * len(first)),
        ((first, other[1], third), 40 + len(first)),
        ((first, second, third, third), len(container)),
        ((first, second), 40 + 2 * len(first)),
        ((), 40),
    ]:
        with pytest.raises(RecordError) as error:
            KEY.open(container[:40] + b"".join(chunks))
        assert error.value.offset == offset


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (RECORD.encode(), RecordError, "leave the key out"),
        (b"some other file, long enough for a header", RecordError, "no container"),
        (b"\x8aICS\2" + SMALL[5:], RecordVersionError, "version 2"),
        (SMALL[:7] + b"\1" + SMALL[8:], RecordError, "reserved"),
        (Key(bytes(32)).seal(b"x"), RecordError, "another key"),
        (SMALL, RecordError, "changed"),  # its context is missing
        (SMALL[:40] + b"\x7f\xff\xff\xff", RecordError, "a chunk claims 2147483647 bytes"),
    ],
)
def test_the_error_says_what_it_is(data: bytes, kind: type[RecordError], words: str) -> None:
    with pytest.raises(kind, match=words):
        KEY.open(data)


def test_sealed_records_without_a_key(tmp_path: Path) -> None:
    data = written([RECORD], tmp_path / "records")
    with pytest.raises(RecordError, match=r"encrypted.*--key FILE"):
        records_in(data, None)
    assert records_in(RECORD.encode(), None) == [RECORD]


def test_a_long_stream_takes_the_memory_of_a_chunk() -> None:
    class Zeros(io.RawIOBase):
        """A container of a thousand chunks that is made while it is read."""

        def __init__(self) -> None:
            self.container = sealed._Container(KEY, bytes(16), b"")
            self.pending, self.count = self.container.header, 0

        def read(self, size: int = -1) -> bytes:
            if not self.pending and self.count < 1000:
                self.count += 1
                self.pending = self.container.seal(bytes(CHUNK), self.count == 1000)
            data, self.pending = self.pending[:size], self.pending[size:]
            return data

    tracemalloc.start()
    try:
        with io.BufferedReader(sealed._Reader(Zeros(), KEY, b""), CHUNK) as plain:  # type: ignore[arg-type]
            total = 0
            while data := plain.read(CHUNK):
                total += len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 1000 * CHUNK
    assert peak < 16 * CHUNK


@pytest.mark.parametrize("content", [SECRET, SECRET.hex().encode(), SECRET.hex().upper().encode() + b"\n"])
def test_a_key_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    assert Key.read(str(file)).open(SMALL, b"row 7") == b"small, but secret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o777])
def test_a_key_file_that_others_may_use(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(SECRET)
    file.chmod(mode)
    with pytest.raises(PrivilegeError, match="chmod 600"):
        Key.read(str(file))


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), b"0" * 63, b"0" * 65, b"g" * 64, b"0" * 64 + b"\n\n"])
def test_a_file_that_is_no_key(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        Key.read(str(file))
    with pytest.raises(NotFound, match="openssl rand -hex 32"):
        Key.read(str(tmp_path / "none"))


def test_a_kept_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "key"
    program = "import sys; from migrate.sealed import Key; print(Key.kept(sys.argv[1])._secret.hex())"
    several = [subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) for _ in range(4)]
    assert {process.communicate()[0] for process in several} == {path.read_bytes().hex().encode() + b"\n"}
    assert [path.stat().st_mode & 0o777, len(path.read_bytes())] == [0o600, 32]
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_is_not_printed() -> None:
    assert repr(KEY) == "<Key>"


def test_what_was_prepared_serves_one_container_each() -> None:
    key = Key(bytes(32))
    for _ in range(20):
        key.prepare()
    sealed = [key.seal(b"data", bytes([number])) for number in range(20)]
    assert len({each[8:24] for each in sealed}) == 20, "no salt twice: the nonces begin anew with each"
    assert [key.open(each, bytes([number])) for number, each in enumerate(sealed)] == [b"data"] * 20
    with pytest.raises(RecordError):
        key.open(sealed[0], b"another context")
