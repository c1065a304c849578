"""An error raised on one host is raised on the other, whatever lies between them."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import resource
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from migrate import errors
from migrate.agent import options
from migrate.agent.errors import DOMAIN, code_of, from_problem, from_rpc_error, to_problem
from migrate.agent.intercept import wrapped
from migrate.agent.v1 import handoff_pb2, migration_pb2, migration_pb2_grpc, types_pb2
from tests.stub_agent import Context, HandoffServicer, MigrationServicer, StubMigration, abort, calling, serving
from tests.waiting import until


def kinds(root: type[errors.Error] = errors.Error) -> list[type[errors.Error]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


ERRORS = [
    errors.Error("it went wrong"),
    errors.UsageError("no such selector", hint="see --help"),
    errors.RecordError("length too large", offset=12, field="sent"),
    errors.RecordError("bad magic", offset=0),
    errors.RecordTruncated("the record ends", offset=40, field="options.SO_MARK"),
    errors.RecordVersionError("major version 9", offset=4, hint="upgrade tcpmig"),
    errors.NotFound("no connection 10.0.0.1:80,10.0.0.9:53972"),
    errors.Refused("an MPTCP connection", hint="turn MPTCP off"),
    errors.Gone("it closed meanwhile"),
    errors.Conflict("epoch 3 was seen before"),
    errors.HostError("this kernel has no NFLOG", hint="load nfnetlink_log"),
    errors.PrivilegeError("setsockopt: not permitted", hint="needs CAP_NET_ADMIN"),
    errors.KernelError("setsockopt(TCP_REPAIR)", errno.ENOPROTOOPT, hint="is it MPTCP?"),
    errors.RemoteError("agent b did not answer"),
    errors.NotFound("no fd “ü” \n\x00 in\tit", hint="quote % it"),
]


def facts(error: errors.Error) -> dict[str, Any]:
    return {"type": type(error), "text": str(error), "exit": error.exit_code, **vars(error)}


def raised_far_away(answer: Any) -> grpc.aio.AioRpcError:
    """What a caller gets when the handler does this."""

    async def scenario() -> None:
        async with (
            serving(migration=StubMigration(answer), insecure=True) as target,
            calling(target) as channel,
        ):
            await abort(channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    return caught.value


def test_every_type_is_tried() -> None:
    assert {type(error) for error in ERRORS} == {kind for kind in kinds() if kind.__module__ == errors.__name__}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{str(error)[:12]}")
def test_an_error_arrives_as_it_left(error: errors.Error) -> None:
    def answer(_: str, __: Context) -> None:
        raise error

    assert facts(from_rpc_error(raised_far_away(answer), "b")) == facts(error)
    assert facts(from_problem(types_pb2.Problem.FromString(to_problem(error).SerializeToString()))) == facts(error)


def test_a_type_of_a_lower_layer_arrives_as_the_nearest_that_is_known() -> None:
    class QueueRefused(errors.Refused):
        """A subclass that the other side has never heard of."""

    arrived = from_problem(to_problem(QueueRefused("too long", hint="wait")))
    assert type(arrived) is errors.Refused
    assert str(arrived) == "too long (wait)"


def test_a_fault_of_the_program_is_logged_here_and_not_told_there(caplog: pytest.LogCaptureFixture) -> None:
    def answer(_: str, __: Context) -> None:
        raise ZeroDivisionError("secret payload")

    with caplog.at_level(logging.ERROR, "migrate.agent.intercept"):
        error = raised_far_away(answer)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert facts(from_rpc_error(error, "b"))["text"] == "the agent failed (its log says more)"
    assert "secret" not in str(error)
    assert "ZeroDivisionError" in caplog.text


def test_a_long_text_is_cut_and_arrives() -> None:
    def answer(_: str, __: Context) -> None:
        raise errors.Refused("x" * 100_000, hint="y" * 100_000)

    arrived = from_rpc_error(raised_far_away(answer), "b")
    assert type(arrived) is errors.Refused
    assert arrived.what == "x" * 1024
    assert arrived.hint == "y" * 1024


# ---- what others may send


@given(
    reason=st.sampled_from(["KERNEL", "RECORD", "RECORD_TRUNCATED", "REFUSED", "NEW_KIND", ""]) | st.text(),
    what=st.text(),
    hint=st.text(),
    metadata=st.dictionaries(st.sampled_from(["errno", "offset", "field", "operation"]) | st.text(), st.text()),
)
def test_no_problem_is_too_strange(reason: str, what: str, hint: str, metadata: dict[str, str]) -> None:
    error = from_problem(types_pb2.Problem(reason=reason, what=what, hint=hint, metadata=metadata))
    assert error.what == what
    for name in vars(error).keys() & {"errno", "offset"}:
        assert isinstance(getattr(error, name), int)


@pytest.mark.parametrize("reason", ["KERNEL", "RECORD", "NEW_KIND"])
def test_a_problem_without_its_attributes_is_the_other_agent_s_failure(reason: str) -> None:
    error = from_problem(types_pb2.Problem(reason=reason, what="bad", metadata={"errno": "many"}))
    assert type(error) is errors.RemoteError
    assert str(error) == "bad"


def with_details(*details: Any) -> Any:
    status = status_pb2.Status(code=5, message="what it says")
    for detail in details:
        status.details.add().Pack(detail)
    return status.SerializeToString()


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        (b"\xff\xff\xff", "agent b failed: plain [NOT_FOUND]"),
        (with_details(), "agent b failed: plain [NOT_FOUND]"),
        (with_details(types_pb2.Problem(what="x")), "agent b failed: plain [NOT_FOUND]"),
        (with_details(error_details_pb2.ErrorInfo(reason="REFUSED", domain="other")), "agent b failed: plain"),
        (with_details(error_details_pb2.ErrorInfo(reason="TOMORROW", domain=DOMAIN)), "what it says"),
    ],
)
def test_details_that_are_not_ours(details: bytes, sentence: str) -> None:
    async def answer(_: str, context: Context) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "plain", (("grpc-status-details-bin", details),))

    error = from_rpc_error(raised_far_away(answer), "b")
    assert type(error) is errors.RemoteError
    assert str(error).startswith(sentence)


# ---- no answer at all


def test_an_agent_that_is_not_there(tmp_path: Any) -> None:
    async def scenario() -> None:
        async with calling(f"unix:{tmp_path}/none.sock") as channel:
            await abort(channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    error = from_rpc_error(caught.value, "unix:/run/none.sock")
    assert str(error).startswith("agent unix:/run/none.sock cannot be reached: ")
    assert str(error).endswith("(is it running, and does it listen there?)")


def test_a_deadline_is_honoured_on_both_sides() -> None:
    ended: list[str] = []

    async def answer(_: str, context: Context) -> None:
        remaining = context.time_remaining()
        assert remaining is not None
        assert 0 < remaining < 0.25  # the 0.2 seconds of the caller, rounded up
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def scenario() -> errors.Error:
        async with (
            serving(migration=StubMigration(answer), insecure=True) as target,
            calling(target) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await abort(channel, seconds=0.2)
            await asyncio.to_thread(until, lambda: ended, what="the handler is cancelled")
            return from_rpc_error(caught.value, "b")

    assert str(asyncio.run(scenario())) == "agent b did not answer in time"


def test_a_call_that_an_older_agent_lacks() -> None:
    async def scenario() -> None:
        async with serving(insecure=True) as target, calling(target) as channel:
            call: Any = channel.unary_unary("/tcpmig.v1.Migration/Tomorrow")
            await call(b"", timeout=10)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    assert str(from_rpc_error(caught.value, "b")).startswith("agent b does not know this call: ")


def resident_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


SEND_A_GIBIBYTE = """
import asyncio, sys, grpc, grpc.aio

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1], options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            await channel.unary_unary("/tcpmig.v1.Migration/Abort")(b"\\x0a" + bytes(1 << 30), timeout=100)
        except grpc.aio.AioRpcError as error:
            print(error.code().name, error.details())

asyncio.run(main())
"""


def test_a_message_that_is_too_large_is_not_taken_in() -> None:
    """A program with no limit of its own sends a real gibibyte; meanwhile others are served, in little memory."""
    migration = StubMigration()
    most = []

    async def scenario() -> str:
        async with serving(migration=migration, insecure=True) as target:
            before = resident_kib()
            sender = await asyncio.create_subprocess_exec(
                sys.executable, "-c", SEND_A_GIBIBYTE, target, stdout=asyncio.subprocess.PIPE
            )
            said = asyncio.create_task(sender.communicate())
            while not said.done():
                async with calling(target) as channel:
                    assert (await abort(channel)).stayed == 7
                most.append(resident_kib() - before)
                await asyncio.wait([said], timeout=0.02)
            return said.result()[0].decode()

    said = asyncio.run(scenario())
    largest = options.MAX_MESSAGE_BYTES
    assert said == f"RESOURCE_EXHAUSTED SERVER: Received message larger than max ({(1 << 30) + 1} vs. {largest})\n"
    assert len(migration.contexts) == len(most)
    assert max(most) < 64 << 10


def test_our_own_message_that_is_too_large_is_not_sent() -> None:
    async def scenario() -> None:
        async with serving(insecure=True) as target, calling(target) as channel:
            await abort(channel, "x" * options.MAX_MESSAGE_BYTES)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    assert str(from_rpc_error(caught.value, "b")).startswith("agent b refused for want of room: ")


# ---- every kind of handler


class Streams(MigrationServicer, HandoffServicer):  # type: ignore[misc]
    """Two messages, then Refused; Watch writes to its context, the others yield."""

    async def ListConnections(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for _ in range(2):
            yield migration_pb2.ListConnectionsResponse()
        raise errors.Refused("enough")

    async def Watch(self, request: Any, context: Context) -> None:
        for _ in range(2):
            await context.write(migration_pb2.WatchResponse())
        raise errors.Refused("enough")

    async def Transfer(self, request_iterator: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for _ in request_iterator:
            yield handoff_pb2.TransferResponse()
        raise errors.Refused("enough")


@pytest.mark.parametrize("call", ["Migration/ListConnections", "Migration/Watch", "Handoff/Transfer"])
def test_a_stream_gives_what_it_has_and_then_its_error(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stub_agent.StubHandoff", Streams)

    async def scenario() -> list[str]:
        seen = []
        async with serving(migration=Streams(), insecure=True) as target, calling(target) as channel:
            method: Any = channel.stream_stream(f"/tcpmig.v1.{call}")
            responses = method(iter([b""] * (2 if call == "Handoff/Transfer" else 1)), timeout=10)
            try:
                async for response in responses:
                    seen.append(repr(response))
            except grpc.aio.AioRpcError as error:
                seen.append(repr(from_rpc_error(error, "b")))
        return seen

    assert asyncio.run(scenario()) == ["b''", "b''", "Refused('enough')"]


def test_a_stream_that_is_cancelled_is_closed_at_once() -> None:
    ended: list[str] = []

    class Endless(Streams):
        async def ListConnections(self, request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                while True:
                    yield migration_pb2.ListConnectionsResponse()
                    await asyncio.sleep(0)
            finally:
                ended.append("closed")

    async def scenario() -> None:
        async with serving(migration=Endless(), insecure=True) as target, calling(target) as channel:
            stub = migration_pb2_grpc.MigrationStub(channel)
            responses = stub.ListConnections(migration_pb2.ListConnectionsRequest(), timeout=10)
            async for _ in responses:
                responses.cancel()
                break
            await asyncio.to_thread(until, lambda: ended, what="the generator is closed")

    asyncio.run(scenario())


def test_an_unknown_method_has_no_handler_to_wrap() -> None:
    assert wrapped(None, lambda _: pytest.fail("never called")) is None


def test_the_reference_says_the_same() -> None:
    """The table in docs/grpc-api.md against what an error of each type really becomes."""
    text = (Path(__file__).parents[2] / "docs/grpc-api.md").read_text()
    said: dict[str, tuple[str, int, set[str]]] = {}
    for line in re.findall(r"^\| `[A-Z_`, ]+ \| `[A-Z_]+` \| \d \|.*$", text, re.MULTILINE):
        reasons, [code], digit, names = (re.findall(r"`(\w+)`", cell) or cell.split() for cell in line.split("|")[1:5])
        said |= {reason: (code, int(digit[0]), set(names)) for reason in reasons}
    assert said.pop("PERMISSION") == ("PERMISSION_DENIED", errors.RemoteError.exit_code, set())
    problems = {to_problem(error).reason: (error, set(to_problem(error).metadata)) for error in ERRORS}
    expected = {
        reason: (code_of(error).name, error.exit_code, names | ({"field"} if "offset" in names else set()))
        for reason, (error, names) in problems.items()
    }
    assert said == expected
