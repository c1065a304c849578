"""Records at rest, encrypted: AES-256-GCM in chunks, so that a stream of any length needs the memory of one.

What may live here: the key, the container, and ICI records in it. docs/sealed-records.md says the same byte by byte for
readers in other languages. Every container has a key of its own, derived from the key file's and a random salt, so a
counter serves as nonce; the last chunk's nonce differs from all others, so that an end cut off shows.

Importing `cryptography` takes longer than a blackout should: make the `Key` before anything is frozen.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Self

from migrate import ici
from migrate.errors import (
    NotFound,
    PrivilegeError,
    RecordError,
    RecordTruncated,
    RecordVersionError,
    UsageError,
    from_oserror,
)
from migrate.ici import Buffer, Ici

__all__ = ["CHUNK", "KEY_LENGTH", "MAGIC", "Key", "read_records", "write_records"]

KEY_LENGTH = 32  # bytes
CHUNK = 1 << 16  # bytes of plaintext in a chunk, at most
MAGIC = b"\x8aICS"

_PLAIN = b"\x8aICI"  # how records begin that are not sealed
_VERSION = 1
_HEADER = struct.Struct(">4sB3s16s16s")  # magic, version, reserved, salt, key check
_LENGTH = struct.Struct(">I")  # of a chunk's plaintext, and whether it is the last
_LAST = 1 << 31
_TAG = 16
_LABEL = b"tcpmig sealed records"
_OFFSET_OF_CHECK = 24
_READY = 4  # containers that are prepared, at most
_DAMAGED = "the chunk was changed after it was written"


class Key:
    """A key of 32 bytes; every container is sealed under one derived from it."""

    def __init__(self, secret: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(secret) != KEY_LENGTH:
            raise UsageError(f"a key has {KEY_LENGTH} bytes, not {len(secret)}")
        self._secret, self._cipher, self._invalid = secret, AESGCM, InvalidTag
        self._ready: deque[_Container] = deque()

    @classmethod
    def read(cls, path: str) -> Self:
        """The key in a file: 32 bytes, or 64 hexadecimal digits, in a file that only its owner may read.

        Raises NotFound, PrivilegeError if others may read it too, UsageError for any other content, KernelError.
        """
        try:
            with open(path, "rb") as file:
                mode, text = os.fstat(file.fileno()).st_mode, file.read(2 * KEY_LENGTH + 3)
        except FileNotFoundError:
            hint = "(umask 077; openssl rand -hex 32 >FILE) makes one"
            raise NotFound(f"there is no key file {path!r}", hint=hint) from None
        except PermissionError:
            raise PrivilegeError(f"the key file {path!r} may not be read", hint="it belongs to somebody else") from None
        except OSError as error:
            raise from_oserror(f"reading the key file {path!r}", error) from None
        if mode & 0o077:
            hint = f"chmod 600 {path}; if somebody was there, make a new key"
            raise PrivilegeError(f"others than its owner may use the key file {path!r}", hint=hint)
        if len(text) == KEY_LENGTH:
            return cls(text)
        if re.fullmatch(rb"[0-9a-fA-F]{64}\r?\n?", text):
            return cls(bytes.fromhex(text.decode()))
        raise UsageError(f"{path!r} holds no key", hint="a key file holds 32 bytes, or 64 hexadecimal digits")

    @classmethod
    def kept(cls, path: str) -> Self:
        """The key in that file, which is made with a random one if there is none; several may do so at once."""
        with contextlib.suppress(NotFound):
            return cls.read(path)
        beside = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, os.urandom(KEY_LENGTH))
                with contextlib.suppress(FileExistsError):
                    os.link(beside, path)
            finally:
                os.close(descriptor)
                os.unlink(beside)
        except OSError as error:
            raise from_oserror(f"making the key file {path!r}", error, hint="is its directory there?") from None
        return cls.read(path)

    def prepare(self) -> None:
        """Derive the key of a container now, so that the next `seal` is quicker; for a few of them at most."""
        if len(self._ready) < _READY:
            self._ready.append(_Container(self, os.urandom(16)))

    def seal(self, data: Buffer, context: bytes = b"") -> bytes:
        """A container of that data. Whoever opens it must give the same ``context``: whose row it is, for one."""
        return b"".join(self.seal_parts([data], context))

    def seal_parts(self, parts: Iterable[Buffer], context: bytes = b"") -> Iterator[bytes]:
        """The same for data in parts, a piece at a time, so that no memory is needed for all of it."""
        try:
            container = self._ready.popleft()
        except IndexError:
            container = _Container(self, os.urandom(16))
        container.context = context
        yield container.header
        last = memoryview(b"")
        for part in parts:
            view = memoryview(part).cast("B")
            for at in range(0, len(view), CHUNK):
                if last:
                    yield container.seal(last, False)
                last = view[at : at + CHUNK]
        yield container.seal(last, True)

    def open(self, container: Buffer, context: bytes = b"") -> bytes:
        """The data of a container. Raises RecordError as `read_records` does."""
        return _Reader(io.BytesIO(container), self, context).readall()

    def __repr__(self) -> str:
        return "<Key>"

    def _derived(self, salt: bytes) -> bytes:
        """HKDF-SHA-256 (RFC 5869), 48 bytes: the container's key, then what tells the right key from another."""
        pseudorandom = hmac.digest(salt, self._secret, "sha256")
        first = hmac.digest(pseudorandom, _LABEL + b"\1", "sha256")
        return first + hmac.digest(pseudorandom, first + _LABEL + b"\2", "sha256")[:16]


class _Container:
    """The cipher of one container and how far it has come."""

    def __init__(self, key: Key, salt: bytes, context: bytes = b"") -> None:
        derived = key._derived(salt)
        self.header = _HEADER.pack(MAGIC, _VERSION, bytes(3), salt, derived[KEY_LENGTH:])
        self._cipher, self._invalid = key._cipher(derived[:KEY_LENGTH]), key._invalid
        self.context, self._count = context, 0

    def seal(self, plain: Buffer, last: bool) -> bytes:
        length = _LENGTH.pack(len(plain) | (_LAST if last else 0))
        return length + self._cipher.encrypt(self._nonce(last), plain, self.header + self.context)

    def open(self, sealed: Buffer, last: bool) -> bytes | None:
        """None if it was tampered with."""
        try:
            return self._cipher.decrypt(self._nonce(last), sealed, self.header + self.context)
        except self._invalid:
            return None

    def _nonce(self, last: bool) -> bytes:
        self._count += 1
        return (self._count - 1).to_bytes(11, "big") + bytes([last])


class _Reader(io.RawIOBase):
    """The plaintext of a container; no byte of it is given before its chunk has been verified."""

    def __init__(self, file: BinaryIO, key: Key, context: bytes) -> None:
        self._file, self._offset, self._ended, self._plain = file, 0, False, memoryview(b"")
        header = self._take(_HEADER.size, "its header")
        magic, version, reserved, salt, _ = _HEADER.unpack(header)
        if magic != MAGIC:
            hint = "these records are not encrypted: leave the key out" if magic == _PLAIN else None
            raise RecordError("this is no container of sealed records", offset=0, field="header.magic", hint=hint)
        if version != _VERSION:
            what = f"the container has version {version}, this reader knows {_VERSION}"
            raise RecordVersionError(
                what, offset=4, field="header.version", hint="open it with the tcpmig that wrote it"
            )
        if any(reserved):
            raise RecordError("the reserved bytes are not zero", offset=5, field="header.reserved")
        self._container = _Container(key, salt, context)
        if not hmac.compare_digest(header, self._container.header):
            what, hint = "sealed with another key", "or its header is damaged"
            raise RecordError(what, offset=_OFFSET_OF_CHECK, field="header.check", hint=hint)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._plain and not self._ended:
            self._plain = memoryview(self._next())
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size

    def _next(self) -> bytes:
        start = self._offset
        (word,) = _LENGTH.unpack(self._take(_LENGTH.size, "the length of a chunk"))
        length, last = word & ~_LAST, bool(word & _LAST)
        if length > CHUNK:
            raise RecordError(f"a chunk claims {length} bytes, more than {CHUNK}", offset=start, field="chunk.length")
        plain = self._container.open(self._take(length + _TAG, "a chunk"), last)
        if plain is None:
            raise RecordError(_DAMAGED, offset=start, field="chunk")
        if last:
            self._ended = True
            if self._file.read(1):
                raise RecordError("bytes follow the last chunk", offset=self._offset)
        return plain

    def _take(self, length: int, within: str) -> bytes:
        try:
            data = self._file.read(length)
        except OSError as error:
            raise from_oserror("reading sealed records", error) from None
        self._offset += len(data)
        if len(data) < length:
            raise RecordTruncated(f"the container ends within {within}", offset=self._offset)
        return data


def read_records(file: BinaryIO, key: Key | None) -> Iterator[Ici]:
    """The records of a file, one at a time: sealed if there is a key, else plain. The file reads what it is asked for.

    Raises RecordError for another key and for what was changed, RecordTruncated for what was cut off, both with the
    offset in the file; what `migrate.ici.read_records` raises for the records within counts the plaintext.
    """
    if key is not None:
        yield from ici.read_records(io.BufferedReader(_Reader(file, key, b""), CHUNK))
        return
    if isinstance(file, io.BufferedReader) and file.peek(len(MAGIC))[: len(MAGIC)] == MAGIC:
        raise RecordError("these records are encrypted", offset=0, hint="give --key FILE, the key of their dump")
    yield from ici.read_records(file)


def write_records(descriptor: int, records: Iterable[Ici], key: Key) -> int:
    """Write sealed records; returns the number of bytes. Raises as `migrate.ici.write_records` does."""
    container = _Container(key, os.urandom(16), b"")
    pending = bytearray()
    try:
        with open(descriptor, "wb", closefd=False) as file:
            total = file.write(container.header)
            for record in records:
                for part in record.encode_parts():
                    view = memoryview(part).cast("B")
                    while view:
                        taken = view[: CHUNK - len(pending)]
                        pending += taken
                        view = view[len(taken) :]
                        if len(pending) == CHUNK:
                            total += file.write(container.seal(pending, False))
                            pending.clear()
            return total + file.write(container.seal(pending, True))
    except OSError as error:
        raise from_oserror("writing records", error) from None
