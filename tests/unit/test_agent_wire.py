"""Handoff messages on the wire: what goes in comes out, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import errors
from migrate.agent import options, wire
from migrate.agent.v1 import handoff_pb2 as pb
from migrate.agent.v1 import types_pb2
from migrate.agent.wire import Assembler, negotiate, requests_of, response_of
from migrate.fourtuple import FourTuple
from migrate.handoff import messages
from migrate.handoff.ids import Connection

BATCH = bytes(range(16))


def four_tuples() -> st.SearchStrategy[FourTuple]:
    port = st.integers(0, 65535)
    ends = st.sampled_from([4, 16]).flatmap(lambda n: st.tuples(*[st.binary(min_size=n, max_size=n)] * 2))
    # ::ffff:a.b.c.d is IPv4: no four-tuple has it.
    plain = ends.filter(lambda pair: not any(len(a) == 16 and a.startswith(b"\0" * 10) for a in pair))
    return st.builds(lambda pair, lp, rp: FourTuple(pair[0], lp, pair[1], rp), plain, port, port)


ids = st.binary(min_size=16, max_size=16)
connections = st.lists(
    st.builds(Connection, ids, st.integers(1, 2**64 - 1), four_tuples()),
    min_size=1,
    max_size=6,
    unique_by=lambda connection: connection.id,
).map(tuple)
refused = st.dictionaries(ids, st.sampled_from(["no adopter", "address missing"]), max_size=6)
strings = st.lists(st.binary(max_size=300), max_size=6).map(tuple)
seconds = st.floats(0.001, 1e6)


@st.composite
def offers(draw: st.DrawFn) -> messages.Offer:
    batch = draw(connections)
    records = {connection.id: draw(st.binary(max_size=300)) for connection in batch}
    return messages.Offer(batch=draw(ids), connections=batch, records=records)


SOURCE = {
    messages.Prepare: st.builds(
        messages.Prepare,
        batch=ids,
        connections=connections,
        steer=st.text(),
        registry=st.text(),
        patience=seconds,
    ),
    messages.Offer: offers(),
    messages.Abort: st.builds(messages.Abort, batch=ids),
    messages.Query: st.builds(messages.Query, batch=ids, connections=connections),
    messages.Kept: st.builds(messages.Kept, batch=ids, kept=strings),
    messages.Released: st.builds(messages.Released, batch=ids, kept=strings),
}
DESTINATION = {
    messages.Prepared: st.builds(
        messages.Prepared, batch=ids, journal=st.text(), refused=refused, shared=st.booleans()
    ),
    messages.Committed: st.builds(messages.Committed, batch=ids, journal=st.text(), refused=refused),
    messages.Discarded: st.builds(messages.Discarded, batch=ids, journal=st.text(), refused=refused),
    messages.Activated: st.builds(messages.Activated, batch=ids, journal=st.text()),
}


def leaves(kind: type) -> set[type]:
    return set().union(*map(leaves, kind.__subclasses__())) if kind.__subclasses__() else {kind}


def on_the_wire(message: messages.Message) -> list[pb.TransferRequest]:
    return [pb.TransferRequest.FromString(request.SerializeToString()) for request in requests_of(message)]


def test_every_message_is_tried() -> None:
    assert leaves(messages.Message) == SOURCE.keys() | DESTINATION.keys()


@pytest.mark.parametrize("chunk", [options.CHUNK_BYTES, 7, 1])
def test_what_a_source_says_arrives_even_when_cut_and_shuffled(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of different batches stand between each other in any order."""
    monkeypatch.setattr(wire, "CHUNK_BYTES", chunk)

    @settings(deadline=None)
    @given(st.lists(st.one_of(*SOURCE.values()), max_size=4, unique_by=lambda m: m.batch), st.randoms())
    def check(said: list[messages.Message], order: random.Random) -> None:
        queues = [requests for message in said if (requests := on_the_wire(message))]
        assembler, heard = Assembler(errors.UsageError), []
        while queues:
            queue = order.choice(queues)
            request = queue.pop(0)
            assert request.ByteSize() <= chunk + 4096
            if message := assembler.request(request):
                heard.append(message)
            queues = [queue for queue in queues if queue]
        assert sorted(heard, key=lambda m: m.batch) == sorted(said, key=lambda m: m.batch)

    check()


@given(st.one_of(*DESTINATION.values()))
def test_what_a_destination_says_arrives(message: messages.Message) -> None:
    timing = types_pb2.PhaseTiming(phase=types_pb2.PHASE_COMMIT, start_ns=1, duration_ns=2)
    response = pb.TransferResponse.FromString(response_of(message, [timing]).SerializeToString())
    assert Assembler(errors.RemoteError).response(response) == message
    assert list(response.timings) == [timing]


def test_large_queues_are_cut_into_messages_that_are_taken() -> None:
    record = random.Random(1).randbytes(33_000_000)
    batch = tuple(Connection(bytes([n]) * 16, 1, FourTuple.parse(f"10.0.0.1:80,10.0.0.{n}:5000")) for n in range(1, 4))
    offer = messages.Offer(
        batch=BATCH, connections=batch, records={batch[0].id: b"", batch[1].id: record, batch[2].id: b"x"}
    )
    assembler, heard = Assembler(errors.UsageError), []
    for request in requests_of(offer):
        assert request.ByteSize() <= options.MAX_MESSAGE_BYTES
        heard.append(assembler.request(request))
    assert heard[:-1] == [None] * (len(heard) - 1)
    assert heard[-1] == offer


def test_many_connections_fit_into_a_message() -> None:
    number = wire.MAX_CONNECTIONS
    batch = [
        Connection(n.to_bytes(16, "big"), 2**64 - 1, FourTuple(bytes(15) + b"\1", 80, b"\xfd" * 16, 4096 + n))
        for n in range(number)
    ]
    [request] = requests_of(messages.Prepare(batch=BATCH, connections=tuple(batch)))
    assert request.ByteSize() < 1.2 * (1 << 20)
    with pytest.raises(errors.UsageError, match=f"a batch of {number + 1} connections, more than {number}"):
        list(
            requests_of(
                messages.Prepare(batch=BATCH, connections=(*batch, Connection(b"x" * 16, 1, batch[0].four_tuple)))
            )
        )


def test_refusals_for_one_reason_are_written_once() -> None:
    reasons = {bytes([n]) * 16: "no adopter" if n % 2 else "out of descriptors" for n in range(100)}
    response = response_of(messages.Committed(batch=BATCH, journal="j", refused=reasons))
    assert len(response.committed.refused) == 2


def test_a_side_does_not_say_what_is_the_other_s() -> None:
    with pytest.raises(TypeError, match="Committed is no message of a source"):
        list(requests_of(messages.Committed(batch=BATCH, journal="", refused={})))
    with pytest.raises(TypeError, match="Abort is no message of a destination"):
        response_of(messages.Abort(batch=BATCH))


# ---- what does not fit


def listed(**changes: Any) -> pb.ConnectionList:
    sound: dict[str, Any] = {
        "ids": b"i" * 16,
        "epochs": [1],
        "four_tuples": bytes(10) + b"\xff\xff" + bytes(6) + bytes(10) + b"\xff\xff" + bytes(6),
    }
    return pb.ConnectionList(**sound | changes)


def offered(
    lengths: list[int], data: bytes, last: bool = True, first: bool = True, **changes: Any
) -> pb.TransferRequest:
    piece = pb.Piece(lengths=lengths, data=data, last=last)
    return pb.TransferRequest(
        offer=pb.Offer(batch=BATCH, connections=listed(**changes) if first else None, records=piece)
    )


def prepared(**changes: Any) -> pb.TransferRequest:
    sound: dict[str, Any] = {"batch": BATCH, "connections": listed(), "patience_seconds": 1.0}
    return pb.TransferRequest(prepare=pb.Prepare(**sound | changes))


def test_the_sound_ones_are_sound() -> None:
    assert Assembler(errors.UsageError).request(prepared())
    assert Assembler(errors.UsageError).request(offered([1], b"x"))


@pytest.mark.parametrize(
    ("requests", "sentence"),
    [
        ([pb.TransferRequest()], "unexpected message of no known kind"),
        ([pb.TransferRequest(hello=pb.Hello())], "unexpected message hello"),
        ([prepared(batch=b"short")], "malformed batch id: 5 bytes, not 16"),
        ([pb.TransferRequest(abort=pb.AbortBatch())], "malformed batch id: 0 bytes, not 16"),
        ([prepared(patience_seconds=0.0)], "patience of 0.0 seconds"),
        ([prepared(patience_seconds=-1.0)], "patience of -1.0 seconds"),
        ([prepared(patience_seconds=float("nan"))], "patience of nan seconds"),
        ([prepared(patience_seconds=float("inf"))], "patience of inf seconds"),
        ([prepared(connections=pb.ConnectionList())], "malformed list of connections: 0 ids"),
        ([prepared(connections=listed(ids=b"i" * 15))], "malformed list of ids: 15 bytes, no multiple of 16"),
        ([prepared(connections=listed(ids=b"i" * 32))], "ids, epochs and four-tuples differ in number"),
        ([prepared(connections=listed(epochs=[]))], "ids, epochs and four-tuples differ in number"),
        ([prepared(connections=listed(four_tuples=b"i" * 35))], "ids, epochs and four-tuples differ in number"),
        ([prepared(connections=listed(epochs=[0]))], "malformed list of connections: epoch 0"),
        (
            [prepared(connections=listed(four_tuples=bytes(10) + b"\xff\xff" + bytes(24)))],
            "of different IP versions",
        ),
        (
            [prepared(connections=listed(ids=b"i" * 32, epochs=[1, 2], four_tuples=bytes(72)))],
            "2 ids, 1 of them different",
        ),
        ([offered([1, 1], b"xy")], "malformed Offer: 2 records of 1 connections"),
        ([offered([1], b"x", first=False)], "malformed Offer: 1 records of 0 connections"),
        ([offered([2], b"x")], "its pieces do not make 2 bytes"),
        ([offered([1], b"xy")], "its pieces do not make 1 bytes"),
        ([offered([2], b"", last=False)], "its pieces do not make 2 bytes"),
        ([offered([2], b"x", last=False), offered([2], b"x")], "a first piece where another was expected"),
        ([offered([2], b"x", last=False), offered([], b"x")], "a first piece where another was expected"),
        ([offered([2], b"x", last=False), offered([], b"xx", first=False)], "its pieces do not make 2 bytes"),
        ([offered([2**32 - 1], b"x", last=False)], "Offer too large: unfinished lists of more than 536870912 bytes"),
        ([offered([1] + [0] * (8 << 20), b"", last=True)], "Offer too large"),
    ],
)
def test_what_does_not_fit_is_refused(requests: list[pb.TransferRequest], sentence: str) -> None:
    *sound, last = requests
    for fault in (errors.UsageError, errors.RemoteError):
        assembler = Assembler(fault)
        for request in sound:
            assert assembler.request(request) is None
        with pytest.raises(fault) as caught:
            assembler.request(last)
        assert sentence in str(caught.value)


def test_unfinished_lists_are_bounded_together() -> None:
    assembler = Assembler(errors.UsageError)

    def open_one(number: int) -> None:
        piece = pb.Piece(lengths=[100 << 20], data=b"x")
        assembler.request(pb.TransferRequest(released=pb.Released(batch=bytes([number]) * 16, kept=piece)))

    for number in range(5):
        open_one(number)
    with pytest.raises(errors.UsageError, match="Released too large"):
        open_one(5)


def test_a_batch_that_would_not_be_taken_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PENDING_BYTES", 1000)
    kept = (bytes(400), bytes(400))
    list(requests_of(messages.Released(batch=BATCH, kept=kept)))
    with pytest.raises(errors.UsageError, match="a batch of 1001 bytes, more than 1000"):
        list(requests_of(messages.Released(batch=BATCH, kept=(*kept, bytes(201)))))


@given(st.binary(max_size=200))
def test_the_fuzzed_message_is_understood_or_refused(data: bytes) -> None:
    for kind, hear in ((pb.TransferRequest, "request"), (pb.TransferResponse, "response")):
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        understand: Callable[[Any], Any] = getattr(Assembler(errors.UsageError), hear)
        with contextlib.suppress(errors.UsageError):
            understand(message)


# ---- versions


@pytest.mark.parametrize(("oldest", "newest"), [(1, 1), (1, 9), (0, 1)])
def test_a_version_in_common(oldest: int, newest: int) -> None:
    assert negotiate(pb.Hello(oldest_version=oldest, newest_version=newest)) == 1


@pytest.mark.parametrize(("oldest", "newest"), [(2, 3), (0, 0), (3, 0)])
def test_no_version_in_common(oldest: int, newest: int) -> None:
    hello = pb.Hello(oldest_version=oldest, newest_version=newest, host="b", software="9.0")
    with pytest.raises(errors.RemoteError) as caught:
        negotiate(hello)
    assert str(caught.value) == (
        f"agent b (9.0) speaks handoff version {oldest} to {newest}, this one 1 (bring both to the same release)"
    )
