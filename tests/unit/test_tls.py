"""Certificates: made, loaded, replaced while serving; and who does not get in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from migrate import errors
from migrate.agent import listen, tls
from migrate.agent.auth import Role
from migrate.agent.errors import from_rpc_error
from migrate.agent.options import server_options
from tests.stub_agent import abort, calling, serving

FILES = ["agent.crt", "agent.key", "ca.crt", "ca.key", "client.crt", "client.key"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What init_tls makes; read only."""
    directory = tmp_path_factory.mktemp("tls") / "made"
    tls.init_tls(directory, ["127.0.0.1", "localhost", "::1", "node-a.example"])
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "tls"))


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """The same names, of another authority."""
    tls.init_tls(tmp_path / "strangers", ["127.0.0.1"])
    return tmp_path / "strangers"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def raw(directory: Path, identity: str) -> grpc.ChannelCredentials:
    """Credentials without the checks of load_channel_credentials."""
    files = [directory / name for name in ("ca.crt", f"{identity}.key", f"{identity}.crt")]
    return grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))


def refusal(target_tls: Path, credentials: grpc.ChannelCredentials | None) -> errors.Error:
    """How a call with these credentials fails at an agent with these certificates, whom others can still call."""

    async def scenario() -> errors.Error:
        async with serving(target_tls) as target:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with calling(target, credentials=credentials) as channel:
                    await abort(channel)
            async with calling(target, target_tls) as channel:
                assert (await abort(channel)).stayed == 7
            return from_rpc_error(caught.value, target)

    return asyncio.run(scenario())


# ---- made


def test_what_is_made(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == FILES
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}
    for name in ("agent", "client"):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", f"{made}/ca.crt", f"{made}/{name}.crt"]
        assert subprocess.run(command, capture_output=True, text=True, check=False).stdout.endswith(": OK\n")


@pytest.mark.parametrize(
    ("identity", "uri", "server"),
    [("agent", "tcpmig://agent/127.0.0.1", True), ("client", "tcpmig://operator/operator", False)],
)
def test_what_a_certificate_says(made: Path, identity: str, uri: str, server: bool) -> None:
    extensions = certificate(made / f"{identity}.crt").extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]
    hosts = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    assert hosts == ({"127.0.0.1", "localhost", "::1", "node-a.example"} if server else set())
    usages = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) is server
    assert ExtendedKeyUsageOID.CLIENT_AUTH in usages


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(errors.UsageError, match=f"{name} exists already"):
        tls.init_tls(tmp_path, ["localhost"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_an_agent_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="at least one name"):
        tls.init_tls(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a b", "-", "a/b", "ü.example", "10.0.0.0/8"])
def test_a_name_that_is_none_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match="no host name"):
        tls.init_tls(tmp_path / "new", ["localhost", name])
    assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.KernelError, match=r"mkdir .*/file/tls: Not a directory"):
        tls.init_tls(tmp_path / "file" / "tls", ["localhost"])


# ---- loaded


def missing(path: Path) -> None:
    path.unlink()


def garbled(path: Path) -> None:
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def open_to_all(path: Path) -> None:
    path.chmod(0o604)


def of_another(path: Path) -> None:
    tls.issue(path.parent, "client", Role.OPERATOR, "x")
    shutil.copy(path.parent / "client.key", path)


@pytest.mark.parametrize(
    ("spoil", "name", "kind", "sentence"),
    [
        (missing, "agent.crt", errors.NotFound, "agent.crt does not exist (`tcpmig agent init-tls"),
        (missing, "agent.key", errors.NotFound, "agent.key does not exist"),
        (missing, "ca.crt", errors.NotFound, "ca.crt does not exist"),
        (garbled, "agent.crt", errors.UsageError, "no usable PEM in agent.crt"),
        (garbled, "ca.crt", errors.UsageError, "no usable PEM in"),
        (garbled, "agent.key", errors.UsageError, "no usable PEM in"),
        (open_to_all, "agent.key", errors.UsageError, "agent.key is open to everybody on this host (chmod 600"),
        (of_another, "agent.key", errors.UsageError, "agent.key is not the key of agent.crt"),
    ],
)
def test_files_that_will_not_do(
    directory: Path, spoil: Callable[[Path], None], name: str, kind: type[errors.Error], sentence: str
) -> None:
    spoil(directory / name)
    for load in (tls.load_server_credentials, lambda where: tls.load_channel_credentials(where, "agent")):
        with pytest.raises(kind) as caught:
            load(directory)
        assert sentence in str(caught.value)


def test_an_expired_certificate_is_not_loaded(directory: Path) -> None:
    tls.issue(directory, "agent", Role.AGENT, "a", days=-0.01)
    with pytest.raises(errors.HostError, match=r"agent.crt expired on 20\d\d-\d\d-\d\d \(renew it\)"):
        tls.load_server_credentials(directory)


def test_when_it_expires(made: Path) -> None:
    assert tls.expiry(made) == certificate(made / "agent.crt").not_valid_after_utc.timestamp()


# ---- who does not get in


def test_both_kinds_of_certificate_get_in(made: Path) -> None:
    async def scenario() -> None:
        async with serving(made) as target, calling(target, made, "client") as channel:
            assert (await abort(channel)).stayed == 7
            async with calling(target.replace("127.0.0.1", "localhost"), made, "client") as by_name:
                assert (await abort(by_name)).stayed == 7

    asyncio.run(scenario())


def test_a_caller_without_a_certificate(made: Path) -> None:
    error = refusal(made, grpc.ssl_channel_credentials((made / "ca.crt").read_bytes()))
    assert "certificates valid and of one authority" in str(error)


def test_a_caller_without_tls(made: Path) -> None:
    assert "certificates valid and of one authority" in str(refusal(made, None))


def test_a_stranger_s_certificate(made: Path, strangers: Path) -> None:
    files = [made / "ca.crt", strangers / "client.key", strangers / "client.crt"]
    error = refusal(made, grpc.ssl_channel_credentials(*(file.read_bytes() for file in files)))
    assert "certificates valid and of one authority" in str(error)


def test_a_stranger_s_agent_is_not_believed(made: Path, strangers: Path) -> None:
    error = refusal(made, raw(strangers, "client"))
    assert "cannot be reached" in str(error)
    assert "certificates valid and of one authority" in str(error)


def test_an_expired_caller(directory: Path) -> None:
    tls.issue(directory, "client", Role.OPERATOR, "late", days=-0.01)
    credentials = raw(directory, "client")
    tls.issue(directory, "client", Role.OPERATOR, "prompt")
    assert "certificates valid and of one authority" in str(refusal(directory, credentials))


def test_an_agent_whose_certificate_names_another_host(directory: Path) -> None:
    tls.issue(directory, "agent", Role.AGENT, "b", hosts=["b.example"])

    async def scenario() -> None:
        async with serving(directory) as target, calling(target, directory) as channel:
            await abort(channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(scenario())
    assert "does the agent's bear the name it was called by?" in str(from_rpc_error(caught.value, "b"))


def test_an_operator_s_certificate_cannot_pose_as_an_agent(directory: Path) -> None:
    """Its names would do; what it may be used for does not."""
    tls.issue(directory, "client", Role.OPERATOR, "mallory", hosts=["127.0.0.1"])
    files = [directory / name for name in ("client.key", "client.crt")]
    key, chain = (file.read_bytes() for file in files)

    async def scenario() -> grpc.StatusCode:
        server = grpc.aio.server(options=server_options())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        await server.start()
        try:
            async with calling(f"127.0.0.1:{port}", directory) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await abort(channel)
        finally:
            await server.stop(0)
        return caught.value.code()

    # A server that got as far as looking for the call would say UNIMPLEMENTED.
    assert asyncio.run(scenario()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", os.urandom(70_000)])
def test_garbage_on_the_port_harms_nobody(made: Path, garbage: bytes) -> None:
    async def scenario() -> None:
        async with serving(made) as target:
            host, port = target.split(":")
            strangers = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
            for stranger in strangers:
                with contextlib.suppress(ConnectionError):
                    stranger.sendall(garbage)
            async with calling(target, made) as channel:  # while they are connected
                assert (await abort(channel)).stayed == 7
            for stranger in strangers:
                stranger.close()
            async with calling(target, made) as channel:
                assert (await abort(channel)).stayed == 7

    asyncio.run(scenario())


# ---- replaced while serving


def served_serial(target: str, directory: Path) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "client.crt", directory / "client.key")
    host, port = target.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
        assert shown
        return x509.load_der_x509_certificate(shown).serial_number


def test_a_new_certificate_is_used_without_a_restart(directory: Path) -> None:
    async def scenario() -> None:
        async with serving(directory) as target, calling(target, directory) as standing:
            await abort(standing)
            before = await asyncio.to_thread(served_serial, target, directory)
            tls.issue(directory, "agent", Role.AGENT, "a", hosts=["127.0.0.1"])
            after = await asyncio.to_thread(served_serial, target, directory)
            assert before != after == certificate(directory / "agent.crt").serial_number
            assert (await abort(standing)).stayed == 7

    asyncio.run(scenario())


def test_one_authority_replaces_another(directory: Path, strangers: Path) -> None:
    async def scenario() -> None:
        async with serving(directory) as target:
            newcomer = grpc.ssl_channel_credentials(
                (directory / "ca.crt").read_bytes(),
                (strangers / "client.key").read_bytes(),
                (strangers / "client.crt").read_bytes(),
            )
            async with calling(target, credentials=newcomer) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await abort(channel)
            with open(directory / "ca.crt", "ab") as file:
                file.write((strangers / "ca.crt").read_bytes())
            async with calling(target, credentials=newcomer) as channel:
                assert (await abort(channel)).stayed == 7
            async with calling(target, directory) as channel:
                assert (await abort(channel)).stayed == 7

    asyncio.run(scenario())


def test_new_files_that_will_not_do_are_logged_and_the_old_stay(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(directory) as target:
            garbled(directory / "agent.crt")
            for _ in range(3):
                async with calling(target, credentials=credentials) as channel:
                    assert (await abort(channel)).stayed == 7

    credentials = raw(directory, "client")
    asyncio.run(scenario())
    [record] = caplog.records
    assert record.getMessage() == "new certificates are unusable, the old ones stay"
    assert "no usable PEM in agent.crt" in vars(record)["fields"]["why"]


# ---- where it listens


def test_a_port_is_not_shared(made: Path) -> None:
    async def scenario() -> None:
        async with serving(made) as target, serving(made):
            server = grpc.aio.server(options=server_options())
            with pytest.raises(errors.HostError, match=r"Address already in use.*is another agent running"):
                listen.listen_tcp(server, target, tls=made)
            await server.stop(0)

    asyncio.run(scenario())


def test_a_unix_socket_is_not_taken_from_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(unix=tmp_path / "agent.sock") as target:
            server = grpc.aio.server(options=server_options())
            with pytest.raises(errors.HostError, match=r"somebody listens on .* already"):
                listen.listen_unix(server, tmp_path / "agent.sock")
            await server.stop(0)
            async with calling(target) as channel:
                assert (await abort(channel)).stayed == 7

    asyncio.run(scenario())


def test_a_unix_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "agent.sock"))

    async def scenario() -> None:
        async with serving(unix=tmp_path / "agent.sock") as target, calling(target) as channel:
            assert (await abort(channel)).stayed == 7

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("0.0.0.0:0", errors.UsageError, "without TLS anybody who reaches 0.0.0.0:0 could take connections away"),
        ("[::]:0", errors.UsageError, "without TLS"),
        ("localhost.example:0", errors.UsageError, "without TLS"),
        ("localhost", errors.UsageError, "'localhost' is no address to listen on"),
        ("127.0.0.1:http", errors.UsageError, "is no address to listen on"),
        ("127.0.0.1:65536", errors.UsageError, "is no address to listen on"),
    ],
)
def test_where_not_to_listen(address: str, kind: type[errors.Error], sentence: str) -> None:
    async def scenario() -> None:
        server = grpc.aio.server(options=server_options())
        try:
            listen.listen_tcp(server, address, tls=None)
        finally:
            await server.stop(0)

    with pytest.raises(kind) as caught:
        asyncio.run(scenario())
    assert sentence in str(caught.value)


def test_without_tls_only_if_forced() -> None:
    async def scenario() -> int:
        server = grpc.aio.server(options=server_options())
        port = listen.listen_tcp(server, "0.0.0.0:0", tls=None, force=True)
        await server.stop(0)
        return port

    assert asyncio.run(scenario()) > 0
