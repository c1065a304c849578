"""The call Restore: records become connections of this host, which its adopters take."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from migrate import ici
from migrate.agent.admission import EXISTS
from migrate.agent.arrival import Arrivals
from migrate.agent.options import CHUNK_BYTES
from migrate.agent.passage import BATCH
from migrate.agent.recovery import MEMORY
from migrate.agent.reports import results_of
from migrate.agent.v1 import migration_pb2 as pb
from migrate.agent.v1 import types_pb2
from migrate.checkpoint import MOVABLE
from migrate.errors import Conflict, Error, RecordTruncated, Refused, UsageError
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.messages import Offer
from migrate.ici import Ici
from migrate.tcpstate import TcpState

__all__ = ["restore"]

_HEADER = 16  # bytes of a record before its body: docs/ici-format.md
_ONCE = "a record is good for one life of its connection"

Responses = AsyncGenerator[pb.RestoreResponse, None]


async def restore(arrivals: Arrivals, requests: AsyncIterator[pb.RestoreRequest]) -> Responses:
    """The answer to ``requests``, a chunk at a time. A batch that was begun is ended, even if this is closed.

    Raises UsageError, RecordError, Conflict; nothing of the chunk in question was restored then.
    """
    stream = _Stream()
    number = 0
    async for request in requests:
        number += 1
        chunk = request.records
        if chunk.chunk != number:
            raise UsageError(f"chunk {chunk.chunk} where chunk {number} was expected")
        if len(chunk.records) > CHUNK_BYTES:
            raise UsageError(f"a chunk of {len(chunk.records)} bytes, more than {CHUNK_BYTES}")
        records = await asyncio.to_thread(stream.add, chunk.records)
        outcomes: dict[FourTuple, tuple[int, Error | None]] = {}
        for start in range(0, len(records), BATCH):
            some = records[start : start + BATCH]
            for record, why in zip(some, await _restored(arrivals, some), strict=True):
                outcome = types_pb2.OUTCOME_DONE if why is None else types_pb2.OUTCOME_STAYED
                outcomes[record.four_tuple] = outcome, why
        yield pb.RestoreResponse(chunk=number, results=results_of(outcomes, 0))
    stream.end()


class _Stream:
    """A stream of records, however it is cut."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._begin = 0  # of the data in the stream

    def add(self, data: bytes) -> list[Ici]:
        """The records that end in these bytes. Raises RecordError, Conflict if two are of one connection."""
        self._data += data
        end = self._whole()
        records = list(ici.read_records(io.BytesIO(self._data[:end]), self._begin)) if end else []
        del self._data[:end]
        self._begin += end
        for names in ({record.four_tuple for record in records}, {record.id or new_id() for record in records}):
            if len(names) < len(records):
                raise Conflict("two records in one chunk are of the same connection", hint="restore the newer one")
        return records

    def _whole(self) -> int:
        """How many bytes at the beginning are whole records."""
        end = 0
        while len(self._data) >= end + _HEADER:
            length, _ = ici.announced(self._data[end : end + _HEADER], self._begin + end)
            if len(self._data) < end + _HEADER + length:
                break
            end += _HEADER + length
        return end

    def end(self) -> None:
        """No more will come. Raises RecordTruncated."""
        if self._data:
            raise RecordTruncated("the stream ends within a record", offset=self._begin + len(self._data))


async def _restored(arrivals: Arrivals, records: Sequence[Ici]) -> list[Error | None]:
    """Of each record why it is not restored, or None."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Mapping[bytes, Error]] = loop.create_future()
    connections: list[Connection] = []
    for record in records:
        record.id = record.id or new_id()
        record.epoch += 1
        connections.append(Connection(record.id, record.epoch, record.four_tuple))

    def tell(refused: Mapping[bytes, Error]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(refused))

    def begin() -> None:
        # In the engine's thread.
        pairs = list(zip(connections, records, strict=True))
        refused: dict[bytes, Error] = {each.id: why for each, record in pairs if (why := _obstacle(record)) is not None}
        try:
            conflicts = arrivals.host.journal.conflicts(connections)
        except Error as error:
            conflicts, refused = {}, dict.fromkeys((each.id for each in connections), error)
        refused |= {id: Conflict(why, hint=_ONCE) for id, why in conflicts.items()}
        good = [(each, record) for each, record in pairs if each.id not in refused]
        if good:
            named = tuple(each for each, _ in good)
            offer = Offer(batch=new_id(), connections=named, records={each.id: rec.encode() for each, rec in good})
            arrivals.restore(offer, lambda others: tell(refused | {id: _error(why) for id, why in others.items()}))
        else:
            tell(refused)

    arrivals.host.engine.call(begin)
    refused = await ended
    return [refused.get(each.id) for each in connections]


def _obstacle(record: Ici) -> Error | None:
    if record.state not in MOVABLE:
        return Refused(f"an agent does not restore {TcpState(record.state).name}", hint="`tcpmig restore` does")
    if record.origin_time < (time.time() - MEMORY) * 1e9:
        return Refused(
            f"its record is older than {MEMORY / 86400:.0f} days: whether it lived here is forgotten",
            hint="`tcpmig restore` asks no agent",
        )
    return None


def _error(why: str) -> Error:
    return Conflict(why) if why == EXISTS else Refused(why)
