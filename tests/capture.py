"""What a host sends and receives on its wire, every TCP segment of it: packet(7) with a memory-mapped ring.

The kernel writes the head of each frame into the ring while it is sent or received, so nothing need be waited for, no
thread competes with what is tested, and nothing is missed: should the ring overflow, reading it fails.
Held and dropped segments that never reach the device are not seen when they leave, and are when they arrive.
"""

from __future__ import annotations

import mmap
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from migrate.kernel import netns

__all__ = ["Capture", "Segment", "retransmissions"]

# include/uapi/linux/if_packet.h
SOL_PACKET, PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION, TPACKET_V2 = 263, 5, 6, 10, 1
PACKET_OTHERHOST, PACKET_OUTGOING = 3, 4
TP_STATUS_KERNEL, TP_STATUS_USER = 0, 1
TPACKET2_HDR = struct.Struct("=IIIHHIIHH4x")  # status len snaplen mac net sec nsec vlan_tci vlan_tpid
SOCKADDR_LL = struct.Struct("=HHiHBB")  # family protocol ifindex hatype pkttype halen
ETH_P_ALL = 3

FRAME = 256  # bytes a slot: header, address, and the first 190 of the frame, enough for all TCP options
BLOCK = 1 << 16
FIN, SYN, RST, ACK = 1, 2, 4, 16


class Segment(NamedTuple):
    """One TCP segment; with segmentation offload it may be larger than the wire's."""

    time: int  # nanoseconds since the epoch
    outgoing: bool
    source_mac: bytes
    destination_mac: bytes
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    length: int  # bytes of payload
    ecn: int = 0  # of the IP header: 0 not capable, 1 and 2 capable, 3 congestion experienced

    @property
    def flow(self) -> tuple[bytes, int, bytes, int]:
        """Who sends to whom."""
        return self[4:8]

    @property
    def end(self) -> int:
        """The sequence number after this segment, SYN and FIN counted."""
        return (self.seq + self.length + bool(self.flags & SYN) + bool(self.flags & FIN)) % 2**32

    def __repr__(self) -> str:
        names = "".join(letter for bit, letter in enumerate("FSRPAUEC") if self.flags >> bit & 1)
        family = socket.AF_INET if len(self.source) == 4 else socket.AF_INET6
        ends = (socket.inet_ntop(family, self.source), socket.inet_ntop(family, self.destination))
        return (
            f"<{self.time % 10**12 / 1e9:.6f} {ends[0]} {self.source_port} > {ends[1]} {self.destination_port} "
            f"{names} seq {self.seq} ack {self.ack} win {self.window} len {self.length}>"
        )


class Capture:
    """Context manager: captures on device ``dev`` of network namespace ``namespace``; readable meanwhile and after."""

    def __init__(self, namespace: str, dev: str, *, frames: int = 1 << 17) -> None:
        self._segments: list[Segment] = []
        self._dropped = 0
        self._frames, self._next = frames, 0
        with netns.entered(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
        request = struct.pack("=IIII", BLOCK, frames * FRAME // BLOCK, FRAME, frames)
        self._socket.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        self._ring = mmap.mmap(self._socket.fileno(), frames * FRAME)
        self._socket.bind((dev, ETH_P_ALL))

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._drain()
        self._ring.close()
        self._socket.close()

    @property
    def segments(self) -> list[Segment]:
        """Every TCP segment so far, in the order of the wire. Frames for other hosts are left out."""
        if not self._ring.closed:
            self._drain()
        if self._dropped:
            raise AssertionError(f"the capture missed {self._dropped} frames: give it a larger ring")
        return self._segments

    @property
    def rsts(self) -> list[Segment]:
        """The segments with RST."""
        return [segment for segment in self.segments if segment.flags & RST]

    @property
    def retransmissions(self) -> list[Segment]:
        """The segments with sequence space that this wire has carried before: see :func:`retransmissions`."""
        return retransmissions(self.segments)

    def _drain(self) -> None:
        """Take what is in the ring and give the slots back."""
        view = memoryview(self._ring)
        with view:
            while True:
                at = self._next * FRAME
                status, _, _, mac, net, sec, nsec, *_ = TPACKET2_HDR.unpack_from(view, at)
                if not status & TP_STATUS_USER:
                    break
                protocol, pkttype = (SOCKADDR_LL.unpack_from(view, at + TPACKET2_HDR.size)[i] for i in (1, 4))
                if pkttype != PACKET_OTHERHOST:
                    frame = bytes(view[at + mac : at + FRAME])
                    segment = _parsed(
                        frame, net - mac, socket.ntohs(protocol), sec * 10**9 + nsec, pkttype == PACKET_OUTGOING
                    )
                    if segment:
                        self._segments.append(segment)
                struct.pack_into("=I", view, at, TP_STATUS_KERNEL)
                self._next = (self._next + 1) % self._frames
        self._dropped += struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]


def retransmissions(segments: Iterable[Segment]) -> list[Segment]:
    """The segments with sequence space that one of the same flow had before. One that merely comes late is none.

    TCP's tail loss probes count, and a receiver that delays its ACK draws one from a sender with a short round trip, on
    the best of networks: ``tcp_early_retrans`` 0 at the sender keeps to what is retransmitted as lost.
    """
    sent: dict[tuple[bytes, int, bytes, int], _Sent] = {}
    found = []
    for segment in segments:
        if segment.seq == segment.end or segment.flags & RST:
            continue  # a mere ACK, a keepalive, a probe of the window
        if segment.flow not in sent or (segment.flags & SYN and not sent[segment.flow].begins_with(segment)):
            sent[segment.flow] = _Sent(segment)
        elif sent[segment.flow].repeats(segment):
            found.append(segment)
    return found


class _Sent:
    """The sequence space that a flow has sent, as distances from its first segment: up to ``end`` but for ``holes``."""

    def __init__(self, first: Segment) -> None:
        self._first, self._end = first.seq, 0
        self._holes: list[tuple[int, int]] = []
        self.repeats(first)

    def begins_with(self, segment: Segment) -> bool:
        return segment.seq == self._first

    def repeats(self, segment: Segment) -> bool:
        """Whether some of the segment had been sent before; from now on all of it has."""
        start = self._end + (segment.seq - self._first - self._end + 2**31) % 2**32 - 2**31
        end = start + (segment.end - segment.seq) % 2**32
        if start > self._end:
            self._holes.append((self._end, start))
        new = max(0, end - max(start, self._end))
        holes = []
        for low, high in self._holes:
            filled = max(low, start), min(high, end)
            if filled[0] >= filled[1]:
                holes.append((low, high))
                continue
            new += filled[1] - filled[0]
            holes += [hole for hole in ((low, filled[0]), (filled[1], high)) if hole[0] < hole[1]]
        self._holes, self._end = holes, max(end, self._end)
        return new < end - start


def _parsed(frame: bytes, network: int, ethertype: int, time: int, outgoing: bool) -> Segment | None:
    if ethertype == 0x0800 and frame[network + 9] == socket.IPPROTO_TCP:
        transport = network + (frame[network] & 15) * 4
        end = network + int.from_bytes(frame[network + 2 : network + 4])
        source, destination = frame[network + 12 : network + 16], frame[network + 16 : network + 20]
        ecn = frame[network + 1] & 3
    elif ethertype == 0x86DD and frame[network + 6] == socket.IPPROTO_TCP:
        transport = network + 40
        end = transport + int.from_bytes(frame[network + 4 : network + 6])
        source, destination = frame[network + 8 : network + 24], frame[network + 24 : network + 40]
        ecn = frame[network + 1] >> 4 & 3
    else:
        return None
    source_port, destination_port, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", frame, transport)
    length = end - transport - (offset >> 4) * 4
    macs = (frame[6:12], frame[0:6])
    ends = (source, source_port, destination, destination_port)
    return Segment(time, outgoing, *macs, *ends, seq, ack, flags, window, length, ecn)
