"""Tell the neighbours that an address is here now: gratuitous ARP (RFC 5227) and unsolicited advertisement (RFC 4861).

Neighbours that know the address take the new hardware address; those that do not need not learn it.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import time
from typing import Self

from migrate.errors import Error, HostError, NotFound, UsageError, from_oserror

__all__ = ["Announcer", "announce"]

SIOCGIFHWADDR = 0x8927  # include/uapi/linux/sockios.h
ARPHRD_ETHER = 1  # include/uapi/linux/if_arp.h
ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD  # include/uapi/linux/if_ether.h
ARPOP_REQUEST, ARPOP_REPLY = 1, 2  # RFC 826
NEIGHBOR_ADVERTISEMENT, OVERRIDE, TARGET_LINK_LAYER_ADDRESS = 136, 0x20000000, 2  # RFC 4861, 4.4 and 4.6.1

_IFREQ = struct.Struct("=16sH6s16x")  # struct ifreq with a struct sockaddr
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_PSEUDO = struct.Struct("!16s16sII")
_ADVERTISEMENT = struct.Struct("!BBHI16sBB6s")

_ATTEMPTS, _PAUSE = 20, 0.001  # seconds between two attempts

_BROADCAST = b"\xff" * 6
_ALL_NODES, _ALL_NODES_MAC = socket.inet_pton(socket.AF_INET6, "ff02::1"), b"\x33\x33\x00\x00\x00\x01"


class Announcer:
    """A socket on a device of this thread's network namespace, for announcing addresses there. A context manager.

    Closing it takes 10 ms and more, as the kernel waits until no processor uses it: do that when nobody waits. Raises
    NotFound for a device, HostError for one without Ethernet address, PrivilegeError, KernelError.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise _explained(device, error) from None
        try:
            self._socket.bind((device, 0))
            _hardware_address(self._socket, device)
        except OSError as error:
            self._socket.close()
            raise _explained(device, error) from None
        except HostError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; again does nothing."""
        self._socket.close()

    def announce(self, address: bytes) -> None:
        """Say that the packed ``address`` has the device's hardware address.

        An IPv4 address is announced as a request and as a reply, since some neighbours heed only one of them. Raises
        NotFound if the device is gone, KernelError, UsageError.
        """
        if len(address) not in (4, 16):
            raise UsageError("an address has 4 or 16 bytes")
        try:
            mac = _hardware_address(self._socket, self._device)
            for frame in _arp(mac, address) if len(address) == 4 else [_advertisement(mac, address)]:
                self._send(frame)
        except OSError as error:
            raise _explained(self._device, error) from None

    def _send(self, frame: bytes) -> None:
        for _ in range(_ATTEMPTS):
            try:
                self._socket.send(frame)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # the device's queue is full
                    raise
            time.sleep(_PAUSE)
        self._socket.send(frame)


def announce(device: str, address: bytes) -> None:
    """`Announcer.announce`, once."""
    with Announcer(device) as announcer:
        announcer.announce(address)


def _explained(device: str, error: OSError) -> Error:
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return NotFound(f"there is no device {device!r} here")
    hint = "needs CAP_NET_RAW; run as root" if error.errno == errno.EPERM else None
    return from_oserror(f"announcing an address on {device}", error, hint=hint)


def _hardware_address(sock: socket.socket, device: str) -> bytes:
    # By ioctl: /sys/class/net shows the namespace in which it was mounted, not this thread's.
    answer = fcntl.ioctl(sock, SIOCGIFHWADDR, _IFREQ.pack(device.encode(), 0, b""))
    _, kind, mac = _IFREQ.unpack(answer)
    if kind != ARPHRD_ETHER:
        raise HostError(f"device {device!r} has no Ethernet address", hint="announce on the device that faces the LAN")
    return bytes(mac)


def _arp(mac: bytes, address: bytes) -> list[bytes]:
    # Of replies Linux takes those for gratuitous in which sender and target have the same hardware address.
    head = 1, ETH_P_IP, 6, 4
    ethernet = _ETHERNET.pack(_BROADCAST, mac, ETH_P_ARP)
    return [
        ethernet + _ARP.pack(*head, ARPOP_REQUEST, mac, address, bytes(6), address),
        ethernet + _ARP.pack(*head, ARPOP_REPLY, mac, address, mac, address),
    ]


def _advertisement(mac: bytes, address: bytes) -> bytes:
    def message(checksum: int) -> bytes:
        kind = NEIGHBOR_ADVERTISEMENT, 0, checksum, OVERRIDE
        return _ADVERTISEMENT.pack(*kind, address, TARGET_LINK_LAYER_ADDRESS, 1, mac)

    size, protocol = _ADVERTISEMENT.size, socket.IPPROTO_ICMPV6
    covered = _PSEUDO.pack(address, _ALL_NODES, size, protocol) + message(0)
    checksum = -int.from_bytes(covered) % 0xFFFF  # RFC 1071: 2**16 is 1 modulo 65,535
    ethernet = _ETHERNET.pack(_ALL_NODES_MAC, mac, ETH_P_IPV6)
    # The hop limit shows that no router passed it on: any other is ignored.
    return ethernet + _IPV6.pack(6 << 28, size, protocol, 255, address, _ALL_NODES) + message(checksum)
