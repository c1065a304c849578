"""Who may call what, asked of a real server with real certificates."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from migrate import errors
from migrate.agent import auth, tls
from migrate.agent.auth import Role
from migrate.agent.errors import from_rpc_error
from migrate.agent.v1 import handoff_pb2, migration_pb2
from tests.stub_agent import Context, StubMigration, abort, calling, serving

CALLS = {
    f"/{service.full_name}/{call.name}"
    for module in (migration_pb2, handoff_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for call in service.methods
}
MIGRATION = {call for call in CALLS if call.startswith("/tcpmig.v1.Migration/")}
SEEING = {"/tcpmig.v1.Migration/ListConnections", "/tcpmig.v1.Migration/Watch"}
HANDOFF = {f"/tcpmig.v1.Handoff/{call}" for call in ("Transfer", "Forward", "Check")}
PUBLIC = {"/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    tls.init_tls(directory, ["127.0.0.1", "localhost"])
    return directory


@contextlib.asynccontextmanager
async def channel_as(authority: Path, target: str, role: Role, name: str) -> AsyncIterator[grpc.aio.Channel]:
    tls.issue(authority, "client", role, name)
    async with calling(target, authority) as channel:
        yield channel


async def code_of(channel: grpc.aio.Channel, method: str) -> grpc.StatusCode:
    """How a call with nothing in it ends; on the wire a call of any kind is a stream of messages."""
    anything: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
    call = anything(iter([b""]), timeout=10)
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


async def is_refused(channel: grpc.aio.Channel, method: str) -> bool:
    # Asked again: a client that is still sending when the refusal comes may end the call by a code of its own.
    for _ in range(3):
        if await code_of(channel, method) is grpc.StatusCode.PERMISSION_DENIED:
            return True
    return False


async def allowed(channel: grpc.aio.Channel) -> set[str]:
    return {call for call in CALLS | PUBLIC if not await is_refused(channel, call)}


@pytest.mark.parametrize(
    ("role", "expected"), [(Role.AGENT, HANDOFF), (Role.OPERATOR, MIGRATION), (Role.VIEWER, SEEING)]
)
def test_a_role_may_call_this_and_nothing_else(authority: Path, role: Role, expected: set[str]) -> None:
    async def scenario() -> set[str]:
        async with serving(authority) as target, channel_as(authority, target, role, "somebody") as channel:
            return await allowed(channel)

    assert asyncio.run(scenario()) == expected | PUBLIC


def test_the_refusal_names_who_called_and_who_might(authority: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusals: list[int] = []

    async def scenario() -> None:
        async with (
            serving(authority, refused=lambda: refusals.append(1)) as target,
            channel_as(authority, target, Role.VIEWER, "grafana-1") as channel,
        ):
            await abort(channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    error = from_rpc_error(caught.value, "b")
    assert type(error) is errors.RemoteError
    assert str(error) == (
        "tcpmig://viewer/grafana-1 may not call /tcpmig.v1.Migration/Abort "
        "(a certificate that names tcpmig://operator/NAME may)"
    )
    assert refusals == [1]
    [record] = caplog.records
    assert record.getMessage() == "call refused"
    assert vars(record)["fields"]["caller"] == "tcpmig://viewer/grafana-1"


def test_a_refused_call_never_reaches_the_handler(authority: Path) -> None:
    migration = StubMigration()

    async def scenario() -> None:
        async with (
            serving(authority, migration=migration) as target,
            channel_as(authority, target, Role.VIEWER, "x") as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await abort(channel)
            assert migration.contexts == []
        async with (
            serving(authority, migration=migration) as target,
            channel_as(authority, target, Role.OPERATOR, "x") as channel,
        ):
            await abort(channel)
            assert len(migration.contexts) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "uri",
    [
        "https://operator/x",
        "https://x/tcpmig://operator/x",
        "tcpmig://operator/x/y",
        "tcpmig://operator/",
        "tcpmig://Operator/x",
        "tcpmig://root/x",
    ],
)
def test_a_certificate_of_the_authority_that_names_no_role_may_only_ask_for_health(
    authority: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setattr(tls, "uri_of", lambda role, name: uri)
    refusal: list[grpc.aio.AioRpcError] = []

    async def scenario() -> set[str]:
        async with serving(authority) as target, channel_as(authority, target, Role.OPERATOR, "x") as channel:
            try:
                await abort(channel)
            except grpc.aio.AioRpcError as error:
                refusal.append(error)
            return await allowed(channel)

    assert asyncio.run(scenario()) == PUBLIC
    assert str(refusal[0].details()).startswith(f"{uri} may not call")


def test_the_unix_socket_is_for_this_host_s_operator(tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"

    async def scenario() -> set[str]:
        async with serving(unix=path) as target, calling(target) as channel:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            return await allowed(channel)

    assert asyncio.run(scenario()) == MIGRATION | PUBLIC


@pytest.mark.parametrize(("insecure", "expected"), [(False, PUBLIC), (True, CALLS | PUBLIC)])
def test_without_tls_a_caller_may_do_all_or_nothing(insecure: bool, expected: set[str]) -> None:
    async def scenario() -> set[str]:
        async with serving(insecure=insecure) as target, calling(target) as channel:
            return await allowed(channel)

    assert asyncio.run(scenario()) == expected


def test_only_a_local_caller_may_name_a_command(authority: Path, tmp_path: Path) -> None:
    async def answer(_: str, context: Context) -> None:
        await auth.require_local(context, "a command")

    async def scenario() -> None:
        migration = StubMigration(answer)
        async with serving(unix=tmp_path / "s", migration=migration) as target, calling(target) as channel:
            assert (await abort(channel)).stayed == 7
        async with (
            serving(authority, migration=migration) as target,
            channel_as(authority, target, Role.OPERATOR, "far") as channel,
        ):
            await abort(channel)

    with pytest.raises(grpc.aio.AioRpcError, match="tcpmig://operator/far may not name a command") as caught:
        asyncio.run(scenario())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n", "ü", "a" * 256])
def test_a_name_that_cannot_stand_in_a_uri_is_refused(name: str) -> None:
    with pytest.raises(errors.UsageError, match="is no name for a certificate"):
        auth.uri_of(Role.VIEWER, name)
