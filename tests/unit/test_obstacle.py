"""What cannot be moved says why, whether or not this kernel has it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from migrate import checkpoint
from migrate.errors import Refused
from migrate.kernel import sockopt
from migrate.obstacle import obstacle
from migrate.tcpstate import TcpState


@pytest.fixture
def connected() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        yield sock


def test_nothing_in_the_way(connected: socket.socket) -> None:
    assert obstacle(TcpState.ESTABLISHED) is None
    checkpoint.check(connected)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"multipath": True}, "Multipath TCP"),
        ({"upper_layer": "mptcp"}, "Multipath TCP"),
        ({"upper_layer": "tls"}, "kTLS"),
        ({"upper_layer": "espintcp"}, "'espintcp'"),
        ({"authenticated": True}, "TCP-AO"),
        ({"signed": True}, "TCP-MD5"),
    ],
)
def test_what_it_has_is_named(what: dict[str, object], said: str) -> None:
    refused = obstacle(TcpState.ESTABLISHED, **what)  # type: ignore[arg-type]
    assert refused is not None and said in refused.what


@pytest.mark.parametrize("state", [TcpState.SYN_RECEIVED, TcpState.TIME_WAIT], ids=lambda state: state.name)
def test_what_has_no_descriptor(state: TcpState) -> None:
    refused = obstacle(state)
    assert refused is not None and state.name in refused.what


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [("upper_layer", "tls", "kTLS"), ("authenticated", True, "TCP-AO"), ("state", TcpState.SYN_RECEIVED, "under way")],
)
def test_a_socket_is_asked(
    connected: socket.socket, monkeypatch: pytest.MonkeyPatch, name: str, answer: object, said: str
) -> None:
    monkeypatch.setattr(sockopt, name, lambda _: answer)
    with pytest.raises(Refused, match=said):
        checkpoint.check(connected)
    monkeypatch.undo()
    assert not sockopt.in_repair(connected)


@pytest.mark.parametrize("error", [None, errno.ENOENT, errno.ENOPROTOOPT])
def test_keys_of_tcp_ao(error: int | None) -> None:
    class Asked:
        def getsockopt(self, *_: int) -> bytes:
            if error:
                raise OSError(error, "no keys")
            return bytes(104)

    assert sockopt.authenticated(Asked()) is (error is None)  # type: ignore[arg-type]
