"""Lives of connections: the events of `migrate.tcpstate`, each brought about between two real kernels.

Ours is the end that moves; the peer stays. An event names what happens to *our* end: RCV_FIN is a shutdown() of the
peer's. So that our FIN or SYN stays unanswered for as long as a test wants, the peer can be deaf: what arrives there
is kept (by a hold of its own), and heard later.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Self

import migrate
from migrate.kernel import diag, option_values, sockopt, tcpinfo
from migrate.kernel.nft import MARK
from migrate.kernel.option_table import OPTIONS, Kind, Phase, Value
from migrate.kernel.segment import Injector, fix_checksums
from migrate.kernel.segment import Segment as Packet
from migrate.pathstate import Marks
from migrate.tcpstate import Event, TcpState
from tests.capture import ACK, FIN, RST, SYN, Capture, Segment
from tests.fix_netns import Host, Lan
from tests.moving import Mover
from tests.waiting import until

__all__ = ["FAMILIES", "Life", "judge", "option_values_of"]

FAMILIES = ("ipv4", "ipv6", "mapped")
PORT = 7000
TO_PEER, TO_US = 50_000, 30_000  # bytes in full queues; the first is more than an initial window
_FRAMES = 1 << 12


class Life:
    """One connection, and its peer at the host "client". ``full`` leaves both queues filled for as long as it can."""

    def __init__(self, net: Lan, mover: Mover, family: str, *, full: bool = False) -> None:
        self.net, self.mover, self.full = net, mover, full
        self.client = net.host("client")
        self._ipv6 = family == "ipv6"
        self._mapped = "::ffff:" if family == "mapped" else ""
        self._family = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        self.address = self._mapped + (net.vip6 if self._ipv6 else net.vip4)
        self.peer_address = self.client.ip6 if self._ipv6 else self.client.ip4
        self._stack = contextlib.ExitStack()
        self._deaf: migrate.hold | None = None
        self._filled = False
        self.ours = self.peer = socket.socket()
        self.listener: socket.socket | None = None
        self.expected_by_peer = self.expected_by_us = b""
        self.wire = self._stack.enter_context(Capture(self.client.netns, self.client.dev, frames=_FRAMES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hear()
        for sock in (self.ours, self.peer, self.listener):
            if sock is not None:
                sock.close()
        self._stack.close()

    @property
    def four_tuple(self) -> migrate.FourTuple:
        """The connection as our end names it."""
        return self._four_tuple

    def state(self) -> TcpState:
        """What our host's kernel says, with or without a descriptor."""
        with self.mover.here.entered():
            found = diag.find(self._four_tuple)
        return TcpState.CLOSED if found is None else found.state

    def peer_state(self) -> TcpState:
        """What the peer's kernel says."""
        with self.client.entered():
            found = diag.find(self._four_tuple.reversed())
        return TcpState.CLOSED if found is None else found.state

    # Opening

    def fresh(self, host: Host) -> socket.socket:
        """A socket of our end's family."""
        with host.entered():
            return socket.socket(self._family)

    def listen(self, prepare: Callable[[socket.socket], None] | None = None) -> socket.socket:
        """PASSIVE_OPEN, on any address of a dual-stack socket if the connection shall be IPv4-mapped."""
        self.listener = self.fresh(self.mover.here)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._mapped:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if prepare:
            prepare(self.listener)
        self.listener.bind((self.address, 0))
        self.listener.listen(16)
        return self.listener

    def backlog(self) -> int:
        """The listener's, from its kernel."""
        assert self.listener
        return int(tcpinfo.parse(sockopt.tcp_info(self.listener)).sacked)

    def peer_connects(self, *, deaf: bool = False) -> None:
        """Begin a connection from the peer's side, which may be ``deaf`` to the answer."""
        assert self.listener
        port = self.listener.getsockname()[1]
        self.peer.close()
        with self.client.entered():
            self.peer = socket.socket(socket.AF_INET6 if self._ipv6 else socket.AF_INET)
        self.peer.bind((self.peer_address, 0))
        self.name(port, self.peer.getsockname()[1])
        if deaf:
            self.deafen()
        self.peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.peer.connect((self.address.removeprefix("::ffff:"), port))

    def accept(self) -> None:
        """Take our end out of the listener's queue."""
        assert self.listener
        self.ours.close()
        self.listener.settimeout(10)
        self.ours = self.listener.accept()[0]
        self.listener.settimeout(None)
        self._ready()

    def passive(self, prepare: Callable[[socket.socket], None] | None = None) -> None:
        """ESTABLISHED, opened by the peer."""
        self.listen(prepare)
        self.peer_connects()
        self.accept()
        assert self.listener
        self.listener.close()
        self.listener = None

    def connect(self, prepare: Callable[[socket.socket], None] | None = None) -> None:
        """ACTIVE_OPEN: our SYN leaves, and the peer hears it when it accepts."""
        with self.client.entered():
            self.listener = socket.create_server(
                (self.peer_address, 0), family=socket.AF_INET6 if self._ipv6 else socket.AF_INET
            )
        self._call(self.listener.getsockname()[1], prepare)

    def call(self, prepare: Callable[[socket.socket], None] | None = None) -> None:
        """ACTIVE_OPEN: our SYN leaves to a peer that does not listen."""
        self.peer.close()
        with self.client.entered():
            self.peer = socket.socket(socket.AF_INET6 if self._ipv6 else socket.AF_INET)
        self.peer.bind((self.peer_address, 0))
        self._call(self.peer.getsockname()[1], prepare)

    def cross(self) -> None:
        """The peer calls too, and each SYN arrives where one has left already: simultaneous open."""
        with migrate.hold([self._four_tuple], netns=self.mover.here.netns, outgoing=False) as late:
            self.peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                self.peer.connect((self.address.removeprefix("::ffff:"), self._four_tuple.local_port))
            until(lambda: late.collect() or late.kept, what="the peer's SYN")
            self.hear()
            until(lambda: self.peer_state() is TcpState.SYN_RECEIVED)
        until(lambda: {self.state(), self.peer_state()} == {TcpState.ESTABLISHED})
        self._ready()

    def _call(self, port: int, prepare: Callable[[socket.socket], None] | None) -> None:
        self.ours.close()
        self.ours = self.fresh(self.mover.here)
        if prepare:
            prepare(self.ours)
        self.ours.bind((self.address, 0))
        self.name(self.ours.getsockname()[1], port)
        self.deafen()
        self.ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.ours.connect((self._mapped + self.peer_address, port))

    def peer_accepts(self, *, again: bool = False) -> None:
        """RCV_SYN_ACK: the peer hears our SYN, the first one or (``again``) only one that is sent from now on."""
        assert self.listener
        missed = [] if again else until(self.missed, what="our SYN is on its way")
        self.hear()
        if not again:  # a hold keeps to itself what has no connection yet
            with self.client.entered(), Injector(MARK) as injector:
                injector.inject(missed[0].build())
        self.listener.settimeout(20)
        self.peer.close()
        self.peer = self.listener.accept()[0]
        self._ready()

    def name(self, local: int, remote: int) -> None:
        """The four-tuple from now on, of these ports."""
        address = self.address.removeprefix("::ffff:")
        text = "[{}]:{},[{}]:{}" if self._ipv6 else "{}:{},{}:{}"
        self._four_tuple = migrate.FourTuple.parse(text.format(address, local, self.peer_address, remote))

    def _ready(self) -> None:
        """The queue that the peer fills; ours has to be filled when the peer is deaf."""
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        if self.full:
            self.expected_by_us += _bytes(TO_US)
            assert self.peer.send(self.expected_by_us) == TO_US
            until(lambda: sockopt.received_length(self.ours) == TO_US, what="the peer's bytes are here")

    # What happens to it

    def deafen(self) -> None:
        """From now on nothing reaches the peer, until `hear`."""
        if self._deaf is None:
            self._deaf = migrate.hold([self._four_tuple.reversed()], netns=self.client.netns, outgoing=False)

    def missed(self) -> list[Packet]:
        """What has not reached the deaf peer since the last look; it is lost."""
        assert self._deaf
        return [Packet.parse(fix_checksums(packet)) for packets in self._deaf.take().values() for packet in packets]

    def hear(self) -> None:
        """The peer gets what it missed."""
        if self._deaf is not None:
            self._deaf.lift()
            self._deaf = None

    def fill(self) -> None:
        """Bytes that are sent and not acknowledged, and bytes that are not even sent."""
        if self.full and not self._filled:
            self._filled = True
            self.deafen()
            self.send(_bytes(TO_PEER))

    def send(self, data: bytes) -> None:
        """Our end writes."""
        self.expected_by_peer += data
        assert self.ours.send(data) == len(data)

    def happen(self, event: Event) -> None:
        """Bring the event about."""
        match event:
            case Event.SEND:
                self.hear()
                self.send(_bytes(1000))
            case Event.CLOSE:
                self.fill()
                self.deafen()
                self.ours.shutdown(socket.SHUT_WR)
            case Event.RCV_FIN:
                self.peer.shutdown(socket.SHUT_WR)
            case Event.RCV_ACK_OF_FIN:
                self.hear()
            case Event.RCV_SYN_ACK:
                self.peer_accepts()
            case _:
                raise AssertionError(f"{event} is not to be had here")

    def move(self, *, marks: Marks | None = None) -> None:
        """To the other host."""
        self.ours = self.mover.move(self.ours, self._four_tuple, marks=marks)
        self.ours.setblocking(False)

    def deliver(self) -> None:
        """Both applications read all that they should get, and nothing else comes."""
        self.hear()
        for sock, expected, who in (
            (self.ours, self.expected_by_us, "our end"),
            (self.peer, self.expected_by_peer, "the peer"),
        ):
            got = bytearray()

            def arrived(sock: socket.socket = sock, got: bytearray = got, length: int = len(expected)) -> bool:
                with contextlib.suppress(BlockingIOError):
                    got.extend(sock.recv(1 << 20))
                return len(got) >= length

            until(arrived, what=f"{who} got {len(expected)} bytes")
            assert got == expected, f"{who} got other bytes"
        self.expected_by_us = self.expected_by_peer = b""

    def at_end(self, sock: socket.socket) -> bool:
        """Whether the other side's FIN has been read."""
        with contextlib.suppress(BlockingIOError):
            assert sock.recv(1) == b"", "more than was sent"
            return True
        return False


def _bytes(length: int) -> bytes:
    return (bytes(number * 7 & 0xFF for number in range(251)) * (length // 251 + 1))[:length]


def judge(segments: Iterable[Segment], four_tuple: migrate.FourTuple, *, closed: bool = True) -> None:
    """Raise AssertionError unless the wire shows one lawful connection (RFC 9293).

    No RST before the end; one SYN and one FIN a direction, however often repeated; nothing after a FIN; nothing
    acknowledged that was not sent; and if it was ``closed``, both FINs acknowledged. The end is when they are: who has
    left LAST_ACK then has no connection any more, and answers what is repeated or came late with RST (3.10.7.1).
    """
    local, local_port, remote, remote_port = four_tuple
    ways = (local, local_port, remote, remote_port), (remote, remote_port, local, local_port)
    end: dict[tuple[bytes, int, bytes, int], int] = {}  # of all that a side has sent
    fin: dict[tuple[bytes, int, bytes, int], int] = {}  # the sequence number after its FIN
    acked: dict[tuple[bytes, int, bytes, int], int] = {}
    syn: dict[tuple[bytes, int, bytes, int], int] = {}
    for segment in segments:
        if segment.flow not in ways:
            continue
        me, other = segment.flow, ways[segment.flow == ways[0]]
        if segment.flags & RST:
            over = all(one in fin and acked.get(two) == fin[one] for one, two in (ways, ways[::-1]))
            assert over, f"a reset: {segment}"
            continue
        if segment.flags & SYN:
            assert syn.setdefault(me, segment.seq) == segment.seq, f"another SYN: {segment}"
        if segment.flags & FIN:
            assert fin.setdefault(me, segment.end) == segment.end, f"another FIN: {segment}"
        end[me] = segment.end if me not in end or _after(segment.end, end[me]) else end[me]
        assert me not in fin or not _after(end[me], fin[me]), f"after the FIN: {segment}"
        if segment.flags & ACK:
            if other in end:
                assert not _after(segment.ack, end[other]), f"acknowledges what was never sent: {segment}"
            if me not in acked or _after(segment.ack, acked[me]):
                acked[me] = segment.ack
    if closed:
        for me, other in (ways, ways[::-1]):
            assert me in fin, f"no FIN from {me}"
            assert acked.get(other) == fin[me], f"the FIN of {me} is not acknowledged"


def _after(one: int, other: int) -> bool:
    return 0 < (one - other) % 2**32 < 2**31


_BY_ITSELF = {Kind.SIZE, Kind.CLAMP}  # the kernel tunes these
_STATES = {"TCP_QUICKACK"}


def option_values_of(sock: socket.socket) -> dict[str, Value]:
    """Every option of a connection that getsockopt() gives and that does not change by itself."""
    found: dict[str, Value] = {}
    for option in OPTIONS:
        if not option.readable or option.phase is Phase.UNCONNECTED:
            continue
        if option.kind in _BY_ITSELF or option.name in _STATES:
            continue
        if option.family == 6 and sock.family != socket.AF_INET6:
            continue
        with contextlib.suppress(OSError):
            found[option.name] = option_values.get(sock, option)
    return found
