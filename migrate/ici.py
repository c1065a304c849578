"""The ICI record: everything needed to rebuild one connection elsewhere, and its form on a wire or in a file.

What may live here: names of connections, the record, its bytes. docs/ici-format.md says the same for readers in other
languages. Decoding believes nothing: lengths are checked before anything is allocated for them, types and ranges come
from the annotations below (msgspec checks them in C), and `_contradiction` holds what no single field can say.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple

import msgspec
from msgspec import Meta

from migrate.errors import RecordError, RecordTruncated, RecordVersionError, from_oserror
from migrate.fourtuple import MAPPED, FourTuple, parse_endpoint
from migrate.tcpstate import REBUILD, TcpState

__all__ = [
    "ENDED_BY_FIN",
    "ENDED_BY_RST",
    "FIELDS",
    "MAX_FIELDS",
    "MAX_QUEUE",
    "MAX_RECORD",
    "VERSION",
    "Field",
    "FourTuple",
    "Ici",
    "announced",
    "parse_endpoint",
    "read_records",
    "write_records",
]

VERSION = (1, 2)  # major, minor
MAX_RECORD = 256 << 20  # bytes of one body
MAX_QUEUE = 128 << 20  # bytes of one queue; 33 MB were seen under load
MAX_FIELDS = 9 << 20  # bytes of the map of fields: the application's state and a mebibyte for the others
MAX_APP = 8 << 20

ENDED_BY_FIN, ENDED_BY_RST = 1, 2  # values of Ici.ended


class Field(NamedTuple):
    """What a field of the record means, and in which unit."""

    meaning: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.meaning} ({self.unit})" if self.unit else self.meaning


Buffer = bytes | bytearray | memoryview

if TYPE_CHECKING:
    Queue = bytes | memoryview
else:
    # The queues are elements of the body beside the map of fields. A map that brings one is refused.
    Queue = Annotated[bytes, Meta(max_length=0)]

_Address = Annotated[bytes, Meta(min_length=4, max_length=16)]
_Port = Annotated[int, Meta(ge=0, le=0xFFFF)]
_Sequence = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
_Window = Annotated[int, Meta(ge=0, le=0xFFFF << 14)]  # RFC 7323 section 2.3
_Scale = Annotated[int, Meta(ge=-1, le=14)]
_Mss = Annotated[int, Meta(ge=0, le=0xFFFF)]
_U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
_U63 = Annotated[int, Meta(ge=0, le=0x7FFFFFFFFFFFFFFF)]
_Choice = Annotated[int, Meta(ge=0, le=2)]
_Name = Annotated[str, Meta(max_length=255)]
_Options = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=40)], int | Annotated[bytes, Meta(max_length=1 << 16)]],
    Meta(max_length=128),
]


class Ici(msgspec.Struct, omit_defaults=True, gc=False):
    """Everything needed to rebuild one connection elsewhere (Internal Connection Information).

    A queue is bytes or a memoryview. What it holds is user data: neither repr() nor str() shows it.
    """

    family: Annotated[int, Meta(ge=4, le=6), Field("the socket's: 4, or 6; 6 with 4-byte addresses is IPv4-mapped")]
    local: Annotated[_Address, Field("this end's address as on the wire, network byte order")]
    local_port: Annotated[_Port, Field("this end's port")]
    remote: Annotated[_Address, Field("the peer's address as on the wire, network byte order")]
    remote_port: Annotated[_Port, Field("the peer's port")]
    state: Annotated[int, Meta(ge=1, le=11), Field("the state, numbered as in Linux's tcp_states.h")]
    snd_una: Annotated[_Sequence, Field("SND.UNA, the oldest not acknowledged; past the FIN if that is", "sequence")]
    rcv_nxt: Annotated[_Sequence, Field("RCV.NXT, the next expected; a received FIN counts", "sequence")]
    snd_wl1: Annotated[_Sequence, Field("SND.WL1, the segment that last opened the window", "sequence")] = 0
    snd_wnd: Annotated[_Window, Field("SND.WND, what the peer offers from snd_una", "bytes")] = 0
    max_window: Annotated[_Window, Field("the largest window that the peer ever offered", "bytes")] = 0
    rcv_wnd: Annotated[_Window, Field("RCV.WND, what was offered from rcv_wup", "bytes")] = 0
    rcv_wup: Annotated[_Sequence, Field("RCV.NXT when the window was last offered", "sequence")] = 0
    mss_clamp: Annotated[_Mss, Field("the peer's MSS option, the most that a segment may carry", "bytes")] = 0
    mss: Annotated[_Mss, Field("what a segment carries at present", "bytes")] = 0
    snd_wscale: Annotated[_Scale, Field("shift of the windows that the peer offers; -1: no scaling", "bits")] = -1
    rcv_wscale: Annotated[_Scale, Field("shift of the windows offered to the peer; -1: no scaling", "bits")] = -1
    sack: Annotated[bool, Field("selective acknowledgments were negotiated")] = False
    timestamps: Annotated[_Choice, Field("0 not negotiated, 1 in milliseconds, 2 in microseconds")] = 0
    ts_value: Annotated[_U32, Field("the clock that timestamps are taken from, at the dump", "see timestamps")] = 0
    ecn: Annotated[_Choice, Field("0 not negotiated, 1 ECN, 2 AccECN")] = 0
    congestion: Annotated[str, Meta(max_length=15), Field("congestion control, the kernel's name of it")] = ""
    cwnd: Annotated[_U32, Field("congestion window", "segments")] = 0
    ssthresh: Annotated[_U32, Field("slow start threshold", "segments")] = 0
    srtt_us: Annotated[_U32, Field("smoothed round-trip time", "microseconds")] = 0
    rttvar_us: Annotated[_U32, Field("variation of the round-trip time", "microseconds")] = 0
    id: Annotated[bytes, Meta(max_length=16), Field("names the connection wherever it goes; empty: none given")] = b""
    epoch: Annotated[_U63, Field("grows with every move; of two records with one id the greater counts")] = 0
    options: Annotated[_Options, Field("socket options unlike a fresh socket's, as getsockopt() gives them")] = {}
    urgent: Annotated[
        int, Meta(ge=-1, le=MAX_QUEUE), Field("where in received the urgent byte is; -1: none", "bytes")
    ] = -1
    app: Annotated[bytes, Meta(max_length=MAX_APP), Field("the application's own state, opaque")] = b""
    origin_host: Annotated[_Name, Field("the host it was dumped on")] = ""
    origin_time: Annotated[_U63, Field("when it was dumped", "nanoseconds since 1970")] = 0
    origin_kernel: Annotated[_Name, Field("the kernel it was dumped on")] = ""
    sent: Annotated[Queue, Field("the send queue from snd_una: sent, not acknowledged", "bytes")] = b""
    unsent: Annotated[Queue, Field("the rest of the send queue: never sent", "bytes")] = b""
    received: Annotated[Queue, Field("the receive queue up to rcv_nxt: acknowledged, not read", "bytes")] = b""
    ended: Annotated[_Choice, Field("CLOSED: 0 there was no connection, 1 ended by FINs, 2 by a reset")] = 0
    backlog: Annotated[_U32, Field("LISTEN: the length that its accept queue may have", "connections")] = 0
    time_left: Annotated[_U32, Field("TIME-WAIT, also after CLOSED: how much longer it lasts", "milliseconds")] = 0
    ts_recent: Annotated[_U32, Field("TIME-WAIT: the last timestamp of the peer's; 0: none", "the peer's")] = 0

    @property
    def four_tuple(self) -> FourTuple:
        """The connection as it is on the wire."""
        return FourTuple(self.local, self.local_port, self.remote, self.remote_port)

    def __str__(self) -> str:
        state = TcpState(self.state).name
        return (
            f"{self.four_tuple} {state} sent={len(self.sent)} unsent={len(self.unsent)} received={len(self.received)}"
        )

    def __repr__(self) -> str:
        return f"<Ici {self} app={len(self.app)}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # rich would go through the fields
        return [("", str(self))]

    def encode(self) -> bytes:
        """The record's bytes. Raises RecordError for what no reader would take."""
        return b"".join(self.encode_parts())

    def encode_parts(self) -> list[bytes | memoryview]:
        """The record's bytes in pieces to be written one after the other; the queues are the record's own buffers."""
        if fault := _contradiction(self):
            raise RecordError(fault[1], offset=_HEADER.size, field=fault[0])
        if self.sent is self.unsent is self.received is _DEFAULT:
            parts: list[bytes | memoryview] = [_ARRAY_OF_4 + _encode_fields(self) + _EMPTY * 3]
        else:
            parts = _with_queues(self)
        if len(parts[0]) > MAX_FIELDS:
            raise RecordError(f"the fields are longer than {MAX_FIELDS} bytes", offset=_HEADER.size)
        length = sum(map(len, parts))
        if length > MAX_RECORD:
            raise RecordError(f"the body is longer than {MAX_RECORD} bytes", offset=_HEADER.size)
        covered = _PREAMBLE + length.to_bytes(4, "big")
        crc = zlib.crc32(covered)
        for part in parts:
            crc = zlib.crc32(part, crc)
        parts[0] = b"".join((covered, crc.to_bytes(4, "big"), parts[0]))
        return parts

    @classmethod
    def decode(cls, data: Buffer) -> "Ici":
        """The one record in the data; its queues are views of the data. Raises RecordError."""
        length, crc = announced(data, 0)
        body = memoryview(data)[_HEADER.size :]
        if len(body) > length:
            raise RecordError(f"{len(body) - length} bytes follow the record", offset=_HEADER.size + length)
        return _decoded(data, body, length, crc, 0)


FIELDS: dict[str, Field] = {name: hint.__metadata__[-1] for name, hint in Ici.__annotations__.items()}


def _contradiction(ici: Ici) -> tuple[str, str] | None:
    """The field and the reason if the record contradicts itself: all that the annotations cannot say, a rule a line."""
    state, local, remote = ici.state, ici.local, ici.remote
    if ici.family not in (4, 6):
        return "family", "neither 4 nor 6"
    if len(local) != 4 and (len(local) != 16 or ici.family == 4):
        return "local", "an address of another family than the socket's"
    if len(remote) != len(local):
        return "remote", "an address of another family than the local one"
    if len(local) == 16 and local.startswith(MAPPED):
        return "local", "an IPv4-mapped address, which is written as its 4 bytes"
    if len(local) == 16 and remote.startswith(MAPPED):
        return "remote", "an IPv4-mapped address, which is written as its 4 bytes"
    if not ici.local_port and state != _CLOSED:
        return "local_port", "0 in a state that has a port"
    if not ici.remote_port and state not in (_CLOSED, _LISTEN):
        return "remote_port", "0 in a state that has a peer"
    if len(ici.id) not in (0, 16):
        return "id", "neither empty nor 16 bytes long"
    if (ici.snd_wscale < 0) != (ici.rcv_wscale < 0):
        return "rcv_wscale", "window scaling holds for both directions or for none"
    if ici.max_window < ici.snd_wnd:
        return "max_window", "smaller than snd_wnd"
    if (ici.rcv_nxt - ici.rcv_wup) & 0xFFFFFFFF > 0x7FFFFFFF:
        return "rcv_wup", "after rcv_nxt"
    if (ici.rcv_nxt + ici.rcv_wnd - ici.snd_wl1) & 0xFFFFFFFF > 0x7FFFFFFF:
        return "snd_wl1", "after the receive window"
    if ici.urgent > len(ici.received):
        return "urgent", "beyond what was received"
    if len(ici.app) > MAX_APP:
        return "app", f"longer than {MAX_APP} bytes"
    if (ici.sent or ici.unsent) and state in _NOTHING_TO_SEND:
        return "sent", "bytes to send in a state that has none"
    if ici.options and not "".join(ici.options).isprintable():
        return "options", "characters that cannot be printed"
    if not ici.congestion.isprintable():
        return "congestion", "characters that cannot be printed"
    if not ici.origin_host.isprintable():
        return "origin_host", "characters that cannot be printed"
    if not ici.origin_kernel.isprintable():
        return "origin_kernel", "characters that cannot be printed"
    return None


def read_records(source: BinaryIO | int, start: int = 0) -> Iterator[Ici]:
    """The records of a stream (a binary file or a descriptor, which stays open), one at a time.

    No more is allocated than has arrived. Raises RecordError with the offset in the stream, where ``source`` begins at
    ``start``, and KernelError.
    """
    file = _opened(source) if isinstance(source, int) else source
    while head := _read(file, _HEADER.size):
        length, crc = announced(head, start)
        yield _decoded(head, _read(file, length), length, crc, start)
        start += _HEADER.size + length


def write_records(descriptor: int, records: Iterable[Ici]) -> int:
    """Write the records, many with one call; returns the number of bytes. Their queues must not change meanwhile.

    Raises RecordError for a record that no reader would take, KernelError if writing fails; either leaves the stream
    as far as it came.
    """
    total = size = 0
    parts: list[bytes | memoryview] = []
    for record in records:
        pieces = record.encode_parts()
        parts += pieces
        size += sum(map(len, pieces))
        if len(parts) >= _IOV_MAX or size >= _CHUNK:
            total += _write_all(descriptor, parts)
            parts, size = [], 0
    return total + _write_all(descriptor, parts)


# The wire form. Everything here is also in docs/ici-format.md.

_MAGIC = b"\x8aICI"
_PREAMBLE = _MAGIC + bytes((*VERSION, 0, 0))
_HEADER = struct.Struct(">4sBBHII")  # magic, major, minor, reserved, length of the body, CRC-32
_COVERED = 12  # bytes of the header that the CRC-32 covers, besides the body
_ARRAY_OF_4 = b"\x94"
_EMPTY = b"\xc4\0"
_DEFAULT = b""  # CPython has one empty bytes object; any other empty queue takes the longer way
_BIN_32 = struct.Struct(">BI")
_QUEUES = ("sent", "unsent", "received")
_CHUNK = 1 << 20
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_CLOSED, _LISTEN = TcpState.CLOSED, TcpState.LISTEN
_NOTHING_TO_SEND = {_LISTEN} | {state for state, plan in REBUILD.items() if plan.fin_acked}


class _Body(msgspec.Struct, array_like=True, gc=False):
    """The body; what a higher minor version appends is ignored."""

    fields: msgspec.Raw
    sent: Annotated[memoryview, Meta(max_length=MAX_QUEUE)]
    unsent: Annotated[memoryview, Meta(max_length=MAX_QUEUE)]
    received: Annotated[memoryview, Meta(max_length=MAX_QUEUE)]


_encode_fields = msgspec.msgpack.Encoder().encode
_decode_fields = msgspec.msgpack.Decoder(Ici).decode
_decode_body = msgspec.msgpack.Decoder(_Body).decode


def _with_queues(ici: Ici) -> list[bytes | memoryview]:
    """The pieces of a body; the first holds the fields."""
    fields = _encode_fields(msgspec.structs.replace(ici, sent=b"", unsent=b"", received=b""))
    parts: list[bytes | memoryview] = [_ARRAY_OF_4 + fields]
    for name, queue in zip(_QUEUES, (ici.sent, ici.unsent, ici.received), strict=True):
        view = memoryview(queue).cast("B")
        if len(view) > MAX_QUEUE:
            raise RecordError(f"longer than {MAX_QUEUE} bytes", offset=_HEADER.size, field=name)
        parts += (_BIN_32.pack(0xC6, len(view)), view) if view else (_EMPTY,)
    return parts


def announced(data: Buffer, start: int) -> tuple[int, int]:
    """Length and CRC-32 of the body, from the header at the beginning of the data."""
    if data[:4] != _MAGIC[: len(data)]:
        raise RecordError("this is no ICI record", offset=start, field="header.magic")
    if len(data) < _HEADER.size:
        raise RecordTruncated("the record ends within its header", offset=start + len(data))
    _, major, minor, reserved, length, crc = _HEADER.unpack_from(data)
    if major != VERSION[0]:
        raise RecordVersionError(
            f"the record has format version {major}.{minor}, this reader knows {VERSION[0]}.x",
            offset=start + 4,
            field="header.major",
            hint="read it with the tcpmig that wrote it",
        )
    if reserved:
        raise RecordError("the reserved bytes are not zero", offset=start + 6, field="header.reserved")
    if length > MAX_RECORD:
        what = f"the body claims {length} bytes, more than {MAX_RECORD}"
        raise RecordError(what, offset=start + 8, field="header.length")
    return length, crc


def _decoded(header: Buffer, body: Buffer, length: int, crc: int, start: int) -> Ici:
    """The record of that header and body; its header starts at that offset of the stream."""
    at = start + _HEADER.size
    if len(body) < length:
        raise RecordTruncated(f"the record ends after {len(body)} of {length} bytes of its body", offset=at + len(body))
    if zlib.crc32(body, zlib.crc32(header[:_COVERED])) != crc:
        raise RecordError("the checksum is wrong, the record is damaged", offset=start + 12, field="header.crc32")
    try:
        parts = _decode_body(body)
        if len(parts.fields) > MAX_FIELDS:
            raise RecordError(f"the fields are longer than {MAX_FIELDS} bytes", offset=at)
        ici = _decode_fields(parts.fields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error, at) from None
    if parts.sent:
        ici.sent = parts.sent
    if parts.unsent:
        ici.unsent = parts.unsent
    if parts.received:
        ici.received = parts.received
    if fault := _contradiction(ici):
        raise RecordError(fault[1], offset=at, field=fault[0])
    return ici


def _malformed(error: Exception, offset: int) -> RecordError:
    """What msgspec says of a body, in the words of a RecordError; it never quotes content."""
    if isinstance(error, RecursionError):
        return RecordError("invalid body: nested too deeply", offset=offset)
    if isinstance(error, UnicodeDecodeError):
        return RecordError("invalid body: a string that is not UTF-8", offset=offset)
    what, _, path = str(error).partition(" - at ")  # "Expected `int` <= 65535 - at `$.local_port`"
    if found := re.search(r"required field `(\w+)`", what) or re.search(r"\$\.(\w+)", path):
        field = found[1]
    elif found := re.search(r"\$\[([1-3])\]", path):
        field = _QUEUES[int(found[1]) - 1]
    else:
        field = None
    return RecordError(f"invalid body: {what}", offset=offset, field=field)


def _opened(descriptor: int) -> BinaryIO:
    try:
        return open(descriptor, "rb", closefd=False)
    except OSError as error:
        raise from_oserror("reading records", error) from None


def _read(file: BinaryIO, length: int) -> bytes | bytearray:
    """As many bytes as there are, at most that many, in pieces: a length is no reason to allocate."""
    try:
        data = file.read(min(length, _CHUNK))
        if len(data) == length:
            return data
        gathered = bytearray(data)
        while len(gathered) < length and (data := file.read(min(length - len(gathered), _CHUNK))):
            gathered += data
    except OSError as error:
        raise from_oserror("reading records", error) from None
    return gathered


def _write_all(descriptor: int, parts: list[bytes | memoryview]) -> int:
    total = 0
    while parts:
        try:
            written = os.writev(descriptor, parts[:_IOV_MAX])
        except OSError as error:
            raise from_oserror("writing records", error) from None
        total += written
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = memoryview(parts[0])[written:]
    return total
