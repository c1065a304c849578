"""kernel/link.py: addresses and host routes, as iproute2 sees them."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from migrate.errors import KernelError, NotFound, PrivilegeError
from migrate.kernel import tcpinfo
from migrate.kernel.link import Address, AddressWatch, Links
from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def shown(host: Host, address: str) -> list[dict[str, object]]:
    """What `ip` says about an address of the host."""
    (link,) = json.loads(host.run(["ip", "-j", "address", "show", "dev", host.dev]).stdout)
    return [entry for entry in link["addr_info"] if entry["local"] == address]


@pytest.fixture
def net(lan: LanFactory) -> Lan:
    return lan("a", "b")


@pytest.mark.parametrize(("address", "whole"), [("10.0.0.100", 32), ("fd00::100", 128)])
@pytest.mark.parametrize("prefix_length", [None, 24])
def test_an_address_comes_and_goes(net: Lan, address: str, whole: int, prefix_length: int | None) -> None:
    a = net.host("a")
    # With detection on, an address that did not ask to be spared would be tentative.
    a.sysctl(f"net.ipv6.conf.{a.dev}.accept_dad", 1)
    with Links(a.netns) as links:
        assert links.add_address(a.dev, packed(address), prefix_length)
        (entry,) = shown(a, address)
        assert entry["prefixlen"] == (prefix_length or whole)
        assert not entry.get("tentative")
        with a.entered():  # usable at once
            socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
        assert not links.add_address(a.dev, packed(address), prefix_length)
        assert len(shown(a, address)) == 1
        assert not links.remove_address(a.dev, packed(address), 27)
        assert len(shown(a, address)) == 1
        assert links.remove_address(a.dev, packed(address), prefix_length)
        assert shown(a, address) == []
        assert not links.remove_address(a.dev, packed(address), prefix_length)


def test_address_watch(net: Lan) -> None:
    a = net.host("a")

    def told() -> bool:
        return bool(select.select([watch], [], [], 0)[0])

    with a.entered(), AddressWatch() as watch:
        assert not told()
        for change in (net.assign, net.withdraw):
            for address in ("10.0.0.100", "fd00::100"):
                change(a, address)
                until(told)
                assert packed(address) in watch.read()
                assert not told()


def test_addresses(net: Lan) -> None:
    a = net.host("a")
    with Links(a.netns) as links:
        found = links.addresses()
    assert Address("lo", packed("127.0.0.1"), 8, False) in found
    assert Address("lo", packed("::1"), 128, False) in found
    assert Address(a.dev, packed(a.ip4), 24, False) in found
    assert Address(a.dev, packed(a.ip6), 64, False) in found
    assert len([each for each in found if each.device == a.dev]) == 3  # and the link-local one


def test_index(net: Lan) -> None:
    a = net.host("a")
    with Links(a.netns) as links, a.entered():
        assert links.index(a.dev) == socket.if_nametoindex(a.dev)


@pytest.mark.parametrize("family", [4, 6])
def test_a_host_route_opens_the_window(net: Lan, family: int) -> None:
    a, b = net.host("a"), net.host("b")
    remote = b.ip4 if family == 4 else b.ip6
    with b.entered():
        listener = socket.create_server((remote, 0), family=socket.AF_INET if family == 4 else socket.AF_INET6)

    def window() -> int:
        with a.entered(), socket.create_connection(listener.getsockname()[:2]) as client, listener.accept()[0]:
            return tcpinfo.parse(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcpinfo.SIZE)).snd_cwnd

    with listener, Links(a.netns) as links:
        assert window() == 10
        assert links.add_host_route(packed(remote), 77)
        assert window() == 77
        assert not links.add_host_route(packed(remote), 99)
        assert links.remove_host_route(packed(remote))
        assert window() == 10
        assert not links.remove_host_route(packed(remote))


def test_the_routes_of_others_stay(net: Lan) -> None:
    a, b = net.host("a"), net.host("b")
    a.run(["ip", "route", "add", f"{b.ip4}/32", "dev", a.dev, "scope", "global", "proto", "static"])
    with Links(a.netns) as links:
        assert not links.add_host_route(packed(b.ip4), 50)
        assert not links.remove_host_route(packed(b.ip4))
    assert b.ip4 in a.run(["ip", "route"]).stdout


def test_a_host_route_takes_the_gateway(net: Lan) -> None:
    a, b = net.host("a"), net.host("b")
    a.run(["ip", "route", "add", "default", "via", b.ip4])
    with Links(a.netns) as links:
        assert links.add_host_route(packed("192.0.2.7"), 50)
    line = a.run(["ip", "route", "show", "192.0.2.7"]).stdout
    assert f"192.0.2.7 via {b.ip4} dev {a.dev}" in line
    assert "initcwnd 50" in line


def test_from_any_thread_also_under_an_event_loop(net: Lan) -> None:
    a = net.host("a")

    async def inside() -> int:
        with Links(a.netns) as links:
            return links.index(a.dev)

    assert asyncio.run(inside()) > 1
    with a.entered():
        links = Links()  # of this thread's namespace, for good
    with links:
        results: list[bool] = []
        for call in (links.add_address, links.remove_address):
            thread = threading.Thread(target=lambda call=call: results.append(call(a.dev, packed("10.0.0.100"))))
            thread.start()
            thread.join()
        assert results == [True, True]


def test_nothing_is_left_open(net: Lan) -> None:
    a = net.host("a")
    with Links(a.netns) as links:  # what pyroute2 opens once
        pass
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with Links(a.netns) as links:
        links.addresses()
    links.close()
    with pytest.raises(NotFound):
        Links("tcpmig-no-such")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_errors(net: Lan) -> None:
    a = net.host("a")
    with Links(a.netns) as links:
        attempts: list[Callable[[], object]] = [
            lambda: links.index("nope"),
            lambda: links.add_address("nope", packed("10.0.0.9")),
            lambda: links.remove_address("nope", packed("10.0.0.9")),
        ]
        for attempt in attempts:
            with pytest.raises(NotFound, match=r"there is no device 'nope' \(`ip link` shows them\)"):
                attempt()
        with pytest.raises(KernelError, match=rf"adding an address to {a.dev}: Invalid argument \[EINVAL\]"):
            links.add_address(a.dev, packed("10.0.0.9"), 33)
        with pytest.raises(KernelError, match=r"adding a host route: Network is unreachable \[ENETUNREACH\]"):
            links.add_host_route(packed("192.0.2.7"), 50)


def test_without_the_privilege(net: Lan) -> None:
    a = net.host("a")
    program = (
        "from migrate.kernel.link import Links; import pyroute2, sys, os\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "os.setresuid(12345, 12345, 12345)\n"
        f"Links().add_address({a.dev!r}, bytes([10, 0, 0, 9]))"
    )
    with a.entered():
        done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert f"{PrivilegeError.__name__}: adding an address to {a.dev}: not permitted" in done.stderr
