"""Handoff messages as they stand in proto/tcpmig/v1/handoff.proto, and back: nothing believed before it is checked.

A machine of migrate/handoff sees whole messages. On the wire a batch's connections are packed arrays, and what may be
large, the records of an Offer and the packets of a Kept or a Released, is cut into pieces.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from migrate import errors
from migrate.agent.options import CHUNK_BYTES
from migrate.agent.v1 import handoff_pb2 as pb
from migrate.agent.v1 import types_pb2
from migrate.fourtuple import MAPPED, FourTuple
from migrate.handoff import messages
from migrate.handoff.ids import ID_BYTES, Connection

__all__ = [
    "MAX_CONNECTIONS",
    "MAX_PENDING_BYTES",
    "STRING_COST",
    "VERSION",
    "Assembler",
    "negotiate",
    "pack_tuples",
    "requests_of",
    "response_of",
    "unpack_tuples",
]

VERSION = 1
"""The only version of the messages there is."""

MAX_CONNECTIONS = 16384
"""Most connections in one batch: its list takes 1 MiB."""

MAX_PENDING_BYTES = 512 << 20
"""Most bytes in all unfinished lists of one stream, each string counted with ``STRING_COST`` more."""

STRING_COST = 64
"""What a string costs beside its bytes, about: so that many empty ones are no way around the limit."""

_FOUR_TUPLE = struct.Struct("!12s4sH12s4sH")  # an IPv4 address begins as MAPPED


def negotiate(hello: pb.Hello) -> int:
    """The version to use with whoever said ``hello``. Raises RemoteError if there is none."""
    if hello.oldest_version <= VERSION <= hello.newest_version:
        return VERSION
    theirs = f"{hello.oldest_version} to {hello.newest_version}"
    raise errors.RemoteError(
        f"agent {hello.host} ({hello.software}) speaks handoff version {theirs}, this one {VERSION}",
        hint="bring both to the same release",
    )


def pack_tuples(tuples: Iterable[FourTuple]) -> bytes:
    """Four-tuples as the messages carry them, 36 bytes each."""
    pack = _FOUR_TUPLE.pack
    return b"".join(
        [
            pack(MAPPED, local, local_port, MAPPED, remote, remote_port)
            if len(local) == 4
            else pack(local[:12], local[12:], local_port, remote[:12], remote[12:], remote_port)
            for local, local_port, remote, remote_port in tuples
        ]
    )


def unpack_tuples(packed: bytes, fault: type[errors.Error]) -> list[FourTuple]:
    """The opposite. Raises ``fault`` for what is no such list."""
    if len(packed) % _FOUR_TUPLE.size:
        raise fault(f"malformed four-tuples: {len(packed)} bytes")
    new = tuple.__new__  # a named tuple's own takes twice as long
    tuples = [
        new(FourTuple, (local, local_port, remote, remote_port))
        if near == far == MAPPED
        else new(FourTuple, (near + local, local_port, far + remote, remote_port))
        for near, local, local_port, far, remote, remote_port in _FOUR_TUPLE.iter_unpack(packed)
    ]
    if any(len(each.local) == 16 and MAPPED in (each.local[:12], each.remote[:12]) for each in tuples):
        raise fault("malformed four-tuples: the ends of one are of different IP versions")
    return tuples


def requests_of(message: messages.Message) -> Iterator[pb.TransferRequest]:
    """The requests that carry one message of a source. Raises UsageError if it is larger than a destination takes."""
    batch = message.batch
    match message:
        case messages.Prepare():
            prepare = pb.Prepare(
                batch=batch,
                connections=_list_of(message.connections),
                steer=message.steer,
                registry=message.registry,
                patience_seconds=message.patience,
            )
            yield pb.TransferRequest(prepare=prepare)
        case messages.Offer():
            first: pb.ConnectionList | None = _list_of(message.connections)
            for piece in _pieces([message.records[connection.id] for connection in message.connections]):
                yield pb.TransferRequest(offer=pb.Offer(batch=batch, connections=first, records=piece))
                first = None
        case messages.Abort():
            yield pb.TransferRequest(abort=pb.AbortBatch(batch=batch))
        case messages.Query():
            yield pb.TransferRequest(query=pb.Query(batch=batch, connections=_list_of(message.connections)))
        case messages.Kept():
            for piece in _pieces(message.kept):
                yield pb.TransferRequest(kept=pb.Kept(batch=batch, kept=piece))
        case messages.Released():
            for piece in _pieces(message.kept):
                yield pb.TransferRequest(released=pb.Released(batch=batch, kept=piece))
        case _:
            raise TypeError(f"{type(message).__name__} is no message of a source")


def response_of(message: messages.Message, timings: Iterable[types_pb2.PhaseTiming] = ()) -> pb.TransferResponse:
    """The response that carries one message of a destination, and when its phases ran."""
    match message:
        case messages.Prepared(batch=batch, journal=journal, refused=refused, shared=shared):
            prepared = pb.Prepared(batch=batch, journal=journal, refused=_refusals(refused), shared=shared)
            return pb.TransferResponse(prepared=prepared, timings=timings)
        case messages.Committed(batch=batch, journal=journal, refused=refused):
            committed = pb.Committed(batch=batch, journal=journal, refused=_refusals(refused))
            return pb.TransferResponse(committed=committed, timings=timings)
        case messages.Discarded(batch=batch, journal=journal, refused=refused):
            discarded = pb.Discarded(batch=batch, journal=journal, refused=_refusals(refused))
            return pb.TransferResponse(discarded=discarded, timings=timings)
        case messages.Activated(batch=batch, journal=journal):
            return pb.TransferResponse(activated=pb.Activated(batch=batch, journal=journal), timings=timings)
    raise TypeError(f"{type(message).__name__} is no message of a destination")


class Assembler:
    """Puts the messages of one stream together again. What does not fit raises ``fault``, and the stream is over.

    ``fault`` is UsageError at the destination, where the caller hears INVALID_ARGUMENT, and RemoteError at the source.
    """

    def __init__(self, fault: type[errors.Error]) -> None:
        self._fault = fault
        self._unfinished: dict[tuple[str, bytes], _Strings] = {}

    def request(self, request: pb.TransferRequest) -> messages.Message | None:
        """The message of a source that ``request`` completes; None if more pieces follow."""
        match request.WhichOneof("message"):
            case "prepare":
                return self._prepare(request.prepare)
            case "offer":
                return self._offer(request.offer)
            case "abort":
                return messages.Abort(batch=self._batch(request.abort.batch))
            case "query":
                query = request.query
                return messages.Query(batch=self._batch(query.batch), connections=self._connections(query.connections))
            case "kept":
                batch = self._batch(request.kept.batch)
                strings = self._add("Kept", batch, request.kept.kept)
                return messages.Kept(batch=batch, kept=strings.split()) if strings else None
            case "released":
                batch = self._batch(request.released.batch)
                strings = self._add("Released", batch, request.released.kept)
                return messages.Released(batch=batch, kept=strings.split()) if strings else None
            case kind:
                raise self._fault(f"unexpected message {kind or 'of no known kind'} on a handoff stream")

    def response(self, response: pb.TransferResponse) -> messages.Message:
        """The message of a destination in ``response``."""
        match response.WhichOneof("message"):
            case "prepared":
                batch, journal, refused = self._answer(response.prepared)
                return messages.Prepared(batch=batch, journal=journal, refused=refused, shared=response.prepared.shared)
            case "committed":
                batch, journal, refused = self._answer(response.committed)
                return messages.Committed(batch=batch, journal=journal, refused=refused)
            case "discarded":
                batch, journal, refused = self._answer(response.discarded)
                return messages.Discarded(batch=batch, journal=journal, refused=refused)
            case "activated":
                activated = response.activated
                return messages.Activated(batch=self._batch(activated.batch), journal=activated.journal)
            case kind:
                raise self._fault(f"unexpected message {kind or 'of no known kind'} on a handoff stream")

    def _prepare(self, prepare: pb.Prepare) -> messages.Prepare:
        if not 0 < prepare.patience_seconds < math.inf:
            raise self._fault(f"malformed Prepare: patience of {prepare.patience_seconds} seconds")
        return messages.Prepare(
            batch=self._batch(prepare.batch),
            connections=self._connections(prepare.connections),
            steer=prepare.steer,
            registry=prepare.registry,
            patience=prepare.patience_seconds,
        )

    def _offer(self, offer: pb.Offer) -> messages.Offer | None:
        batch = self._batch(offer.batch)
        connections = self._connections(offer.connections) if offer.HasField("connections") else ()
        strings = self._add("Offer", batch, offer.records, connections)
        if strings is None:
            return None
        records, connections = strings.split(), strings.connections
        if len(records) != len(connections):
            raise self._fault(f"malformed Offer: {len(records)} records of {len(connections)} connections")
        by_id = dict(zip((connection.id for connection in connections), records, strict=True))
        return messages.Offer(batch=batch, connections=connections, records=by_id)

    def _answer(self, answer: pb.Prepared | pb.Committed | pb.Discarded) -> tuple[bytes, str, dict[bytes, str]]:
        refused = {id_: refusal.reason for refusal in answer.refused for id_ in self._ids(refusal.ids)}
        return self._batch(answer.batch), answer.journal, refused

    def _batch(self, batch: bytes) -> bytes:
        if len(batch) != ID_BYTES:
            raise self._fault(f"malformed batch id: {len(batch)} bytes, not {ID_BYTES}")
        return batch

    def _ids(self, ids: bytes) -> list[bytes]:
        if len(ids) % ID_BYTES:
            raise self._fault(f"malformed list of ids: {len(ids)} bytes, no multiple of {ID_BYTES}")
        return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]

    def _connections(self, packed: pb.ConnectionList) -> tuple[Connection, ...]:
        ids = self._ids(packed.ids)
        if not len(ids) == len(packed.epochs) == len(packed.four_tuples) / _FOUR_TUPLE.size:
            raise self._fault("malformed list of connections: ids, epochs and four-tuples differ in number")
        if not 0 < len(set(ids)) == len(ids) <= MAX_CONNECTIONS:
            raise self._fault(f"malformed list of connections: {len(ids)} ids, {len(set(ids))} of them different")
        four_tuples = unpack_tuples(packed.four_tuples, self._fault)
        epochs = list(packed.epochs)
        if 0 in epochs:
            raise self._fault(f"malformed list of connections: epoch 0 of {four_tuples[epochs.index(0)]}")
        return tuple(map(Connection, ids, epochs, four_tuples))

    def _add(
        self, kind: str, batch: bytes, piece: pb.Piece, connections: tuple[Connection, ...] = ()
    ) -> _Strings | None:
        """Add a piece to its list; the list, if it is complete now."""
        strings = self._unfinished.get((kind, batch))
        if strings is None:
            strings = self._unfinished[kind, batch] = _Strings(list(piece.lengths), connections)
            if sum(other.cost for other in self._unfinished.values()) > MAX_PENDING_BYTES:
                raise self._fault(f"{kind} too large: unfinished lists of more than {MAX_PENDING_BYTES} bytes")
        elif piece.lengths or connections:
            raise self._fault(f"malformed {kind}: a first piece where another was expected")
        strings.add(piece.data)
        if strings.missing < 0 or (piece.last and strings.missing) or not (piece.last or piece.data):
            raise self._fault(f"malformed {kind}: its pieces do not make {strings.total} bytes")
        return self._unfinished.pop((kind, batch)) if piece.last else None


class _Strings:
    """A list of byte strings of which not every piece has come."""

    def __init__(self, lengths: list[int], connections: tuple[Connection, ...]) -> None:
        self.connections = connections
        self.total = self.missing = sum(lengths)
        self.cost = self.total + (len(lengths) + 1) * STRING_COST
        self._lengths = lengths
        self._data: list[bytes] = []

    def add(self, data: bytes) -> None:
        self._data.append(data)
        self.missing -= len(data)

    def split(self) -> tuple[bytes, ...]:
        data = self._data[0] if len(self._data) == 1 else b"".join(self._data)
        ends = list(itertools.accumulate(self._lengths))
        return tuple(data[end - length : end] for end, length in zip(ends, self._lengths, strict=True))


def _list_of(connections: Sequence[Connection]) -> pb.ConnectionList:
    if len(connections) > MAX_CONNECTIONS:
        raise errors.UsageError(f"a batch of {len(connections)} connections, more than {MAX_CONNECTIONS}")
    return pb.ConnectionList(
        ids=b"".join([connection.id for connection in connections]),
        epochs=[connection.epoch for connection in connections],
        four_tuples=pack_tuples([connection.four_tuple for connection in connections]),
    )


def _pieces(strings: Sequence[bytes]) -> Iterator[pb.Piece]:
    lengths = [len(string) for string in strings]
    if sum(lengths) + (len(lengths) + 1) * STRING_COST > MAX_PENDING_BYTES:
        raise errors.UsageError(f"a batch of {sum(lengths)} bytes, more than {MAX_PENDING_BYTES}")
    parts: list[memoryview] = []
    room = CHUNK_BYTES
    for string in strings:
        view = memoryview(string)
        while len(view) > room:
            yield pb.Piece(lengths=lengths, data=b"".join([*parts, view[:room]]))
            lengths, parts, view, room = [], [], view[room:], CHUNK_BYTES
        parts.append(view)
        room -= len(view)
    yield pb.Piece(lengths=lengths, data=b"".join(parts), last=True)


def _refusals(refused: Mapping[bytes, str]) -> list[pb.Refusal]:
    by_reason: dict[str, list[bytes]] = {}
    for id_, reason in refused.items():
        by_reason.setdefault(reason, []).append(id_)
    return [pb.Refusal(ids=b"".join(ids), reason=reason) for reason, ids in by_reason.items()]
