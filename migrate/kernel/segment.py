"""TCP segments as bytes: read them, build them, and give them to a socket of this host as if the peer had sent them.

Formats: RFC 791, RFC 8200 and RFC 9293 (section 3.1); checksums: RFC 1071. Everything in network order.

How an injected segment travels: a raw socket with the header included sends it to an address of this host, so it goes
through lo and keeps the route that it left with. Hence (tried on Linux 6.18) neither strict rp_filter nor accept_local
matter, nor where its source is; to sockets it came in through the device that has the address, which counts for
SO_BINDTODEVICE; output and prerouting rules see it, with the injector's mark; while lo is down it is lost silently.
A link-local address has no zone here, so that it cannot be reached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from migrate.errors import Error, HostError, from_oserror
from migrate.fourtuple import FourTuple
from migrate.kernel.route import Routes

__all__ = [
    "ACK",
    "ARRIVES",
    "CWR",
    "ECE",
    "FIN",
    "PSH",
    "RST",
    "SYN",
    "TIMESTAMP",
    "URG",
    "Injector",
    "Segment",
    "fix_checksums",
    "four_tuple",
    "readdressed",
]

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128

ARRIVES = 0.5  # seconds within which an injected segment has arrived
END, NOP, TIMESTAMP = 0, 1, 8  # kinds of options; the first two have no length

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_TCP = struct.Struct("!HHIIHHHH")
_PSEUDO4 = struct.Struct("!4s4sHH")
_PSEUDO6 = struct.Struct("!16s16sII")  # protocol and length: their order does not matter
_LITTLE = struct.Struct("<H")

_DF, _FRAGMENT = 0x4000, 0x3FFF  # in the IPv4 header: don't fragment; more fragments or an offset
_EXTENSIONS = socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING, socket.IPPROTO_DSTOPTS
_CHECKSUM = 16  # its offset in the TCP header
_AT_ONCE = 4096  # bytes summed as one number: larger ones cost more per byte

_TRUSTED = 0.05  # seconds for which an address that was found to be of this host is taken to stay
_READY = 0.2  # seconds until a new IPv6 address is ready to be used

SIOCGIFFLAGS, SIOCGIFMTU, IFF_UP = 0x8913, 0x8921, 1  # include/uapi/linux/sockios.h and if.h

_IFFLAGS, _IFMTU = struct.Struct("=16sh22x"), struct.Struct("=16si20x")  # struct ifreq with ifr_flags, with ifr_mtu

_NEEDS = "needs CAP_NET_RAW and CAP_NET_ADMIN; run as root, or inside `unshare -Urn`"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that arrives at ``four_tuple.local``. Sequence numbers are 0..2**32-1, ``window`` is not scaled.

    ``options`` are (kind, content) pairs without END and NOP; ``flags`` has 12 bits, the reserved ones as they came.
    """

    four_tuple: FourTuple
    seq: int
    ack: int = 0
    flags: int = ACK
    window: int = 0
    options: tuple[tuple[int, bytes], ...] = ()
    payload: bytes = b""
    urgent: int = 0
    traffic_class: int = 0  # DSCP and ECN
    hop_limit: int = 64

    @classmethod
    def parse(cls, packet: bytes) -> Self:
        """From an IPv4 or IPv6 packet. Raises Error for whatever is no whole TCP segment."""
        place = _placed(packet)
        if place.end > len(packet):
            raise _bad(f"the IP header tells of {place.end} bytes, {len(packet)} are there")
        return cls._read(packet, place)

    @classmethod
    def _read(cls, packet: bytes, place: _Place) -> Self:
        tcp = _TCP.unpack_from(packet, place.tcp)
        if place.version == 4:
            traffic_class, hop_limit = packet[1], packet[8]
        else:
            traffic_class, hop_limit = (packet[0] << 8 | packet[1]) >> 4 & 0xFF, packet[7]
        return cls(
            FourTuple(place.destination, tcp[1], place.source, tcp[0]),
            seq=tcp[2],
            ack=tcp[3],
            flags=tcp[4] & 0xFFF,
            window=tcp[5],
            options=tuple(_options(packet[place.tcp + _TCP.size : place.payload])),
            payload=packet[place.payload : place.end],
            urgent=tcp[7],
            traffic_class=traffic_class,
            hop_limit=hop_limit,
        )

    def build(self) -> bytes:
        """The packet, checksums and all. Raises Error if it does not fit into one."""
        local, local_port, remote, remote_port = self.four_tuple
        options = b"".join(bytes((kind, 2 + len(content))) + content for kind, content in self.options)
        options += bytes((NOP,)) * (-len(options) % 4)
        header = _TCP.size + len(options)
        length = header + len(self.payload)
        if header > 60 or length > (0xFFFF - _IPV4.size if len(local) == 4 else 0xFFFF):
            raise _bad(f"{len(options)} bytes of options and {len(self.payload)} bytes of payload are too many")
        tcp = _TCP.pack(
            remote_port, local_port, self.seq, self.ack, header << 10 | self.flags, self.window, 0, self.urgent
        )
        if len(local) == 4:
            ip = _IPV4.pack(
                0x45, self.traffic_class, 20 + length, 0, _DF, self.hop_limit, socket.IPPROTO_TCP, 0, remote, local
            )
            ip = _finished(ip, 10, _sum(ip))
        else:
            ip = _IPV6.pack(
                6 << 28 | self.traffic_class << 20, length, socket.IPPROTO_TCP, self.hop_limit, remote, local
            )
        tcp = _finished(tcp, _CHECKSUM, _pseudo(remote, local, length) + _sum(tcp) + _sum(options) + _sum(self.payload))
        return b"".join((ip, tcp, options, self.payload))

    def split(self, size: int) -> Iterator[Segment]:
        """The same bytes in segments whose payload is at most ``size`` bytes; FIN and PSH stay with the last."""
        for start in range(0, max(1, len(self.payload)), size):
            urgent = self.urgent - start
            flags = self.flags if start + size >= len(self.payload) else self.flags & ~(FIN | PSH)
            if start:
                flags &= ~CWR if urgent > 0 else ~(CWR | URG)
            yield replace(
                self,
                seq=(self.seq + start) % 2**32,
                flags=flags,
                payload=self.payload[start : start + size],
                urgent=max(0, urgent),
            )


def four_tuple(packet: bytes) -> FourTuple:
    """The connection that a packet belongs to, as its receiver names it. Raises Error if it is no TCP segment."""
    place = _placed(packet)
    source_port, destination_port = struct.unpack_from("!HH", packet, place.tcp)
    return FourTuple(place.destination, destination_port, place.source, source_port)


def fix_checksums(packet: bytes) -> bytes:
    """The packet with right checksums, if they were right or only left to the network card (CHECKSUM_PARTIAL).

    Segments from this machine, and those that GRO put together, arrive with the sum of the pseudo header alone. What
    the network damaged still raises Error, as does what is no TCP segment. A packet that NFLOG cut (it hands over at
    most 65,531 bytes) comes back shorter, without its last bytes, FIN and PSH.
    """
    place = _placed(packet)
    pseudo = _pseudo(place.source, place.destination, place.end - place.tcp)
    stated = _LITTLE.unpack_from(packet, place.tcp + _CHECKSUM)[0]
    unfinished = pseudo % 0xFFFF == stated % 0xFFFF
    if place.end > len(packet):
        if not unfinished:
            raise _bad("it was cut, and its checksum cannot be verified")
        whole = Segment._read(packet, place)
        return replace(whole, flags=whole.flags & ~(FIN | PSH)).build()
    packet = packet[: place.end]
    total = pseudo + _sum(packet[place.tcp :])
    if total % 0xFFFF == 0:
        return packet
    if not unfinished:
        raise _bad("its checksum is wrong")
    fixed = bytearray(packet)
    _LITTLE.pack_into(fixed, place.tcp + _CHECKSUM, -(total - stated) % 0xFFFF)
    return bytes(fixed)


def readdressed(packet: bytes, four_tuple: FourTuple) -> bytes:
    """The segment as if it had been sent to ``four_tuple``. Raises Error for what is damaged or no TCP segment.

    IP options and extension headers are left out.
    """
    return replace(Segment.parse(fix_checksums(packet)), four_tuple=four_tuple).build()


class Injector:
    """Sockets of the network namespace that it was made in, which give segments to connections there."""

    def __init__(self, mark: int) -> None:
        """What is injected carries this mark (SO_MARK), by which rules can let it pass. Raises PrivilegeError."""
        self._mark = mark
        self._sockets: dict[int, socket.socket] = {}
        self._found_local: dict[bytes, float] = {}  # address: when
        self._routes = Routes()
        try:
            self._sockets[4] = _raw_socket(socket.AF_INET, mark)
            with contextlib.suppress(HostError):  # no IPv6: then there is nothing to inject
                self._sockets[6] = _raw_socket(socket.AF_INET6, mark)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets; again does nothing."""
        self._routes.close()
        for sock in self._sockets.values():
            sock.close()

    def inject(self, packet: bytes) -> None:
        """Give a packet with right checksums (`Segment.build`, `fix_checksums`) to the connection it belongs to.

        If there is no such connection the kernel answers with RST. Raises HostError if its destination is no address
        of this host (nothing is sent then), if lo is down or a firewall in the way; KernelError; Error if it is no
        TCP segment.
        """
        place = _placed(packet)
        self._require_local(place.destination)
        try:
            try:
                self._send(place, packet)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                segment = Segment.parse(packet)
                for part in segment.split(max(1, self._loopback(SIOCGIFMTU, _IFMTU) - place.payload)):
                    self._send(place, part.build())
        except OSError as error:
            raise self._explained(error) from None

    def _send(self, place: _Place, packet: bytes) -> None:
        family = socket.AF_INET if place.version == 4 else socket.AF_INET6
        self._sockets[place.version].sendto(packet, (socket.inet_ntop(family, place.destination), 0))

    def _require_local(self, address: bytes) -> None:
        # To an address that is not here a raw socket would send into the network, in the peer's name.
        now = time.monotonic()
        if now - self._found_local.get(address, -_TRUSTED) < _TRUSTED:
            return
        if not self._loopback(SIOCGIFFLAGS, _IFFLAGS) & IFF_UP:
            raise HostError("a segment cannot be injected while lo is down", hint="ip link set lo up")
        while not self._here(address):
            # The kernel finishes a new IPv6 address a moment after it was added, also without duplicate detection.
            if len(address) == 4 or time.monotonic() - now > _READY:
                shown = socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
                raise HostError(f"{shown} is no address of this host", hint="a segment can be injected once it is")
            time.sleep(0.001)
        self._found_local[address] = now

    def _here(self, address: bytes) -> bool:
        try:
            return self._routes.find(address, self._mark).local
        except HostError:
            return False

    def _loopback(self, request: int, layout: struct.Struct) -> int:
        value: int = layout.unpack(fcntl.ioctl(self._sockets[4], request, layout.pack(b"lo", 0)))[1]
        return value

    def _explained(self, error: OSError) -> Error:
        if error.errno == errno.EPERM:
            return HostError(
                "this host's firewall drops injected segments",
                hint=f"let packets with mark {self._mark:#x} pass at output",
            )
        return from_oserror("injecting a segment", error)


def _raw_socket(family: socket.AddressFamily, mark: int) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise HostError("this host has no IPv6") from None
        raise from_oserror("opening a raw socket", error, hint=_NEEDS) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except OSError as error:
        sock.close()
        raise from_oserror("marking a raw socket", error) from None
    return sock


class _Place(NamedTuple):
    """Where things are in a packet: offsets, and the packed addresses."""

    version: int
    source: bytes
    destination: bytes
    tcp: int
    payload: int
    end: int  # as the IP header says: more than there is if the packet was cut


def _placed(packet: bytes) -> _Place:
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= _IPV4.size:
        _, _, end, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
        tcp = (packet[0] & 15) * 4
        if tcp < _IPV4.size:
            raise _bad("its IPv4 header is too short")
        if fragment & _FRAGMENT:
            raise _bad("it is a fragment")
    elif version == 6 and len(packet) >= _IPV6.size:
        _, length, protocol, _, source, destination = _IPV6.unpack_from(packet)
        tcp, end = _IPV6.size, _IPV6.size + length
        while protocol in _EXTENSIONS and tcp + 8 <= min(end, len(packet)):  # each is 8 bytes at least
            protocol, tcp = packet[tcp], tcp + 8 * (1 + packet[tcp + 1])
    else:
        raise _bad("it begins with no IP header")
    if protocol != socket.IPPROTO_TCP:
        raise _bad(f"after the IP header comes protocol {protocol}")
    if tcp + _TCP.size > min(end, len(packet)):
        raise _bad("it ends before its TCP header does")
    payload = tcp + (packet[tcp + 12] >> 4) * 4
    if payload < tcp + _TCP.size or payload > min(end, len(packet)):
        raise _bad("its TCP header claims a length that cannot be")
    return _Place(version, source, destination, tcp, payload, end)


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data) and data[at] != END:
        if data[at] == NOP:
            at += 1
            continue
        if at + 2 > len(data) or data[at + 1] < 2 or at + data[at + 1] > len(data):
            raise _bad("one of its TCP options claims a length that cannot be")
        yield data[at], data[at + 2 : at + data[at + 1]]
        at += data[at + 1]


def _bad(why: str) -> Error:
    return Error(f"a packet is no TCP segment to work with: {why}")


def _pseudo(source: bytes, destination: bytes, length: int) -> int:
    layout = _PSEUDO4 if len(source) == 4 else _PSEUDO6
    return _sum(layout.pack(source, destination, socket.IPPROTO_TCP, length))


def _sum(data: bytes) -> int:
    """The sum of the 16-bit words, modulo 65,535, little endian throughout: one's complement does not mind the order.

    One large number is summed faster than many small ones: 130 µs for 64 KiB.
    """
    pieces = (data[at : at + _AT_ONCE] for at in range(0, len(data), _AT_ONCE))
    return sum(int.from_bytes(piece, "little") for piece in pieces) % 0xFFFF


def _finished(header: bytes, offset: int, total: int) -> bytes:
    # ``total`` sums up all that the checksum at ``offset`` covers, itself being 0.
    return header[:offset] + _LITTLE.pack(-total % 0xFFFF) + header[offset + 2 :]
