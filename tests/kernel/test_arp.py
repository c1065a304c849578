"""kernel/arp.py: neighbours believe the announcement, and that is what counts; the frames are those of the RFCs."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from migrate.errors import HostError, KernelError, NotFound, UsageError
from migrate.kernel.arp import Announcer, announce
from tests.fix_netns import Host, LanFactory
from tests.kernel.pairs import unprivileged
from tests.waiting import until

ETH_P_ALL = 3


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def known(host: Host, address: str) -> str:
    """The hardware address that a host has for its neighbour, or nothing."""
    words = host.run(["ip", "neigh", "show", address, "dev", host.dev]).stdout.split()
    return words[words.index("lladdr") + 1] if "lladdr" in words else ""


def say(host: Host, address: str) -> None:
    with host.entered():
        announce(host.dev, packed(address))


@pytest.mark.parametrize("family", [4, 6])
def test_neighbours_that_know_the_address_take_the_new_hardware_address(lan: LanFactory, family: int) -> None:
    net = lan("client", "a", "b")
    client, a, b = (net.host(name) for name in ("client", "a", "b"))
    address = net.vip4 if family == 4 else net.vip6
    net.assign(a, address)
    client.run(["ping", "-c", "1", "-W", "5", address])
    assert known(client, address) == a.mac
    net.withdraw(a, address)
    net.assign(b, address)
    assert known(client, address) == a.mac  # nothing but the announcement tells it
    say(b, address)
    until(lambda: known(client, address) == b.mac)
    client.run(["ping", "-c", "1", "-W", "5", address])
    say(a, address)  # and again, at once: no time in which a neighbour ignores it
    until(lambda: known(client, address) == a.mac)


@pytest.mark.parametrize("family", [4, 6])
def test_others_need_not_learn_it(lan: LanFactory, family: int) -> None:
    net = lan("client", "a")
    client, a = net.host("client"), net.host("a")
    address = net.vip4 if family == 4 else net.vip6
    net.assign(a, address)
    say(a, address)
    assert known(client, address) == ""


def sniffed(host: Host, sender: Host, address: str, count: int) -> list[bytes]:
    """The next frames that a host receives from the sender."""
    with host.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with sock:
        sock.bind((host.dev, ETH_P_ALL))
        sock.settimeout(5)
        say(sender, address)
        mac = bytes.fromhex(sender.mac.replace(":", ""))
        frames: list[bytes] = []
        while len(frames) < count:
            frame = sock.recv(2000)
            # Neighbour discovery of the kernel's own goes to other groups.
            if frame[6:12] == mac and frame[:6] in (b"\xff" * 6, bytes.fromhex("333300000001")):
                frames.append(frame)
        return frames


def test_arp_comes_as_request_and_as_reply(lan: LanFactory) -> None:
    net = lan("client", "a")
    a = net.host("a")
    mac, ip = bytes.fromhex(a.mac.replace(":", "")), packed(net.vip4)
    request, reply = sniffed(net.host("client"), a, net.vip4, 2)
    head = b"\xff" * 6 + mac + b"\x08\x06" + struct.pack("!HHBB", 1, 0x0800, 6, 4)
    assert request == head + b"\0\1" + mac + ip + bytes(6) + ip
    assert reply == head + b"\0\2" + mac + ip + mac + ip
    assert len(reply) == 42


def test_the_advertisement_overrides_and_was_not_asked_for(lan: LanFactory) -> None:
    net = lan("client", "a")
    a = net.host("a")
    mac = bytes.fromhex(a.mac.replace(":", ""))
    (frame,) = sniffed(net.host("client"), a, net.vip6, 1)
    assert frame[:14] == bytes.fromhex("333300000001") + mac + b"\x86\xdd"
    assert frame[20:22] == bytes((socket.IPPROTO_ICMPV6, 255))
    assert frame[22:54] == packed(net.vip6) + packed("ff02::1")
    assert frame[54:56] + frame[58:] == b"\x88\0" + b"\x20\0\0\0" + packed(net.vip6) + b"\2\1" + mac


def test_bad_input_and_devices(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    with a.entered():
        with pytest.raises(NotFound, match="no device 'eth9'"):
            announce("eth9", bytes(4))
        with pytest.raises(NotFound, match="no device"):
            announce("a-name-longer-than-any-device-has", bytes(4))
        with pytest.raises(HostError, match="'lo' has no Ethernet address"):
            announce("lo", bytes(4))
        with pytest.raises(UsageError, match="4 or 16 bytes"):
            announce(a.dev, b"10.0.0.1")
        with Announcer(a.dev) as announcer:
            a.run(["ip", "link", "del", "dev", a.dev])
            with pytest.raises(NotFound, match="no device"):
                announcer.announce(bytes(4))


def test_privilege_is_asked_for() -> None:
    said = unprivileged(lambda: announce("lo", bytes(4)))
    assert said == "PrivilegeError: announcing an address on lo: not permitted (needs CAP_NET_RAW; run as root)"


@pytest.mark.parametrize(("full", "sent"), [(0, 2), (3, 2), (1000, 0)])
def test_a_full_queue_is_waited_for(lan: LanFactory, monkeypatch: pytest.MonkeyPatch, full: int, sent: int) -> None:
    host = lan("a").host("a")
    with host.entered(), Announcer(host.dev) as announcer:
        real, frames, refusals = announcer._socket, [], iter(range(full))

        class Queue:
            """Of the device: has no room ``full`` times."""

            fileno, close = real.fileno, real.close

            def send(self, frame: bytes) -> None:
                if next(refusals, None) is not None:
                    raise OSError(errno.ENOBUFS, "no room")
                frames.append(frame)

        monkeypatch.setattr(announcer, "_socket", Queue())
        if sent:
            announcer.announce(socket.inet_aton(host.ip4))
        else:
            with pytest.raises(KernelError, match="ENOBUFS"):
                announcer.announce(socket.inet_aton(host.ip4))
        assert len(frames) == sent
