"""`tcpmig list` says of every connection whether it can move, and why not."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from migrate import unconnected
from migrate.fourtuple import FourTuple
from migrate.kernel import diag
from migrate.kernel.nft import MARK
from migrate.kernel.segment import SYN, Injector, Segment
from migrate.tcpstate import TcpState
from tests.fix_netns import Host, Lan
from tests.waiting import until

MPTCP = 262  # IPPROTO_MPTCP


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        net = Lan(("a",))
        stack.callback(net.close)
        yield net.host("a")


def listed(host: Host, *selector: str) -> dict[str, Any]:
    """The one line that it prints."""
    said = host.run([sys.executable, "-m", "migrate.cli", "list", "--json", *selector]).stdout
    (line,) = said.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def server(host: Host, protocol: int = 0) -> tuple[socket.socket, str]:
    with host.entered():
        listener = socket.socket(proto=protocol)
    listener.bind((host.ip4, 0))
    listener.listen()
    return listener, "{}:{}".format(*listener.getsockname())


def connected(host: Host, listener: socket.socket, protocol: int = 0) -> socket.socket:
    with host.entered():
        client = socket.socket(proto=protocol)
    client.connect(listener.getsockname())
    return client


def state_is(host: Host, local: str, state: TcpState) -> None:
    address, port = local.split(":")
    end = diag.Endpoint(socket.inet_aton(address), int(port))
    with host.entered():
        until(lambda: [each.state for each in diag.list_connections(local=end)] == [state], what=state.name)


def test_a_listener_and_what_waits_in_it(host: Host) -> None:
    listener, local = server(host)
    with listener, connected(host, listener) as client:
        until(lambda: unconnected.waiting(listener) == 1)
        found = listed(host, "--local", local, "--state", "LISTEN")
        assert (found["migratable"], found["reason"], found["recv_queue"]) == (True, None, 1)
        found = listed(host, "--local", local)
        assert (found["state"], found["migratable"]) == ("ESTABLISHED", False)
        assert "nobody has accepted it" in found["reason"] and "its listener" in found["reason"]
        with listener.accept()[0]:
            assert listed(host, "--local", local)["migratable"]
        assert listed(host, "--remote", local)["migratable"] and client


def test_time_wait(host: Host) -> None:
    listener, local = server(host)
    with listener, connected(host, listener) as client:
        listener.accept()[0].close()
        state_is(host, local, TcpState.FIN_WAIT_2)
        found = listed(host, "--local", local)
        assert not found["migratable"] and "its owner has closed it" in found["reason"]
        client.close()
        state_is(host, local, TcpState.TIME_WAIT)
        found = listed(host, "--local", local)
        assert not found["migratable"] and "`tcpmig dump` takes it along" in found["reason"]


def test_a_handshake(host: Host) -> None:
    """Its peer does not exist."""
    listener, local = server(host)
    with listener, host.entered(), Injector(MARK) as injector:
        peer = socket.inet_aton(host.ip4.rpartition(".")[0] + ".250")
        flow = FourTuple(socket.inet_aton(host.ip4), listener.getsockname()[1], peer, 7)
        injector.inject(Segment(flow, 1, flags=SYN, window=1000).build())
        state_is(host, local, TcpState.SYN_RECEIVED)
        found = listed(host, "--local", local)
        assert not found["migratable"] and "under way" in found["reason"] and "--wait-handshakes" in found["reason"]


def test_multipath_tcp(host: Host) -> None:
    listener, local = server(host, MPTCP)
    with listener, connected(host, listener, MPTCP), listener.accept()[0]:
        for chosen in (["--local", local, "--state", "LISTEN"], ["--local", local], ["--remote", local]):
            found = listed(host, *chosen)
            assert not found["migratable"] and "Multipath TCP" in found["reason"] and found["owners"]


def test_what_is_closed_is_no_connection(host: Host) -> None:
    with host.entered():
        sock = socket.socket()
    with sock:
        sock.bind((host.ip4, 0))
        port = sock.getsockname()[1]
        done = host.run([sys.executable, "-m", "migrate.cli", "list", "--json", "--local", f"{host.ip4}:{port}"])
        assert done.stdout == ""
