"""kernel/nft.py, GuardTable and RefusalTable: what a host does not answer by RST."""

from __future__ import annotations

import socket

import pytest

from migrate.errors import UsageError
from migrate.kernel.nft import GuardTable, RefusalTable
from tests.fix_netns import Host, LanFactory
from tests.kernel.pairs import echo, pair


def listed(host: Host) -> str:
    return host.run(["nft", "list", "ruleset"]).stdout


def refused(client: Host, address: str, port: int) -> bool:
    """Whether a RST comes back. Raises AssertionError if somebody listens."""
    with client.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    with sock:
        sock.settimeout(0.25)
        try:
            sock.connect((address, port))
        except TimeoutError:
            return False
        except ConnectionRefusedError:
            return True
    raise AssertionError("somebody listens")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [None, 81], ids=["all", "port"])
def test_no_rst_leaves_from_a_guarded_address(lan: LanFactory, family: int, port: int | None) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    vip, own = (net.vip4, a.ip4) if family == 4 else (net.vip6, a.ip6)
    net.assign(a, vip)
    number = socket.AF_INET if family == 4 else socket.AF_INET6

    assert refused(client, vip, 81)
    for _ in range(2):  # a guard that is there already stays
        with a.entered(), GuardTable(socket.inet_pton(number, vip), port):
            pass
        assert not refused(client, vip, 81)
    assert listed(a).count(" drop") == 1
    assert refused(client, vip, 82) is (port is not None)
    assert refused(client, own, 81)
    with a.entered(), pair(client, a, "IPv4" if family == 4 else "IPv6") as ends:
        echo(ends)
    with a.entered():
        GuardTable(socket.inet_pton(number, vip), port).delete()
    assert refused(client, vip, 81)
    assert listed(a) == ""


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("any_address", [False, True], ids=["address", "any"])
def test_a_listener_that_is_on_its_way_is_not_denied(lan: LanFactory, family: int, any_address: bool) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    own = a.ip4 if family == 4 else a.ip6
    with pair(client, a, f"IPv{family}") as ends:
        address, port, *_ = ends.flow
        with a.entered(), RefusalTable([(bytes(len(address)) if any_address else address, port)]):
            assert not refused(client, own, port)
            assert refused(client, own, port + 1)
            ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            ends.server.close()  # an abort, which is no answer to a SYN
            with pytest.raises(ConnectionResetError):
                ends.client.recv(1)
        assert refused(client, own, port)
    assert listed(a) == ""


@pytest.mark.parametrize(("address", "port"), [(b"10.0.0.1", None), (bytes(4), 0), (bytes(4), 65536), (b"", 80)])
def test_a_guard_of_nonsense_is_refused(address: bytes, port: int | None) -> None:
    with pytest.raises(UsageError, match="a guard is for"):
        GuardTable(address, port)
