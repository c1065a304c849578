"""agent/carry.py: the addresses that this host answers from, also when somebody else changes them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.agent.carry import Carrier
from migrate.kernel.link import AddressWatch
from tests.fix_netns import Host, LanFactory, ip

ADDRESSES = ["10.0.0.100", "fd00::100"]


@pytest.fixture
def host(lan: LanFactory) -> Iterator[Host]:
    (host,) = lan("a").hosts.values()
    with host.entered():
        yield host


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def carried(host: Host) -> str:
    return host.run(["ip", "-o", "address", "show", "dev", "lo"]).stdout


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_somebody_else_removed_is_carried_again(host: Host, tmp_path: Path, address: str) -> None:
    carrier = Carrier(tmp_path / "carried")
    for _ in range(3):
        carrier.carry([packed(address)])
        assert f" {address}/" in carried(host)
        ip([f"address del {address} dev lo"], namespace=host.netns)
    carrier.close()


def test_what_a_device_has_lost_is_carried(host: Host, tmp_path: Path) -> None:
    (address, _) = ADDRESSES
    ip([f"address add {address}/32 dev {host.dev}"], namespace=host.netns)
    carrier = Carrier(tmp_path / "carried")
    carrier.carry([packed(address)])
    assert address not in carried(host)
    ip([f"address del {address}/32 dev {host.dev}"], namespace=host.netns)
    carrier.carry([packed(address)])
    assert f" {address}/" in carried(host)
    carrier.drop_unused()
    assert address not in carried(host)
    carrier.carry([packed(address)])
    assert f" {address}/" in carried(host)
    carrier.close()


def test_as_long_as_nothing_changes_nobody_looks(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = Carrier(tmp_path / "carried")
    carrier.carry([packed(host.ip4)])
    monkeypatch.delattr(Carrier, "_look")
    carrier.carry([packed(host.ip4)])
    carrier.close()


def test_more_changes_than_there_is_room_for(host: Host) -> None:
    with AddressWatch() as watch:
        assert not watch.read()
        watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        ip(["address add 10.9.9.9 dev lo", "address del 10.9.9.9 dev lo"] * 50, namespace=host.netns)
        assert watch.read()
        assert not watch.read()
