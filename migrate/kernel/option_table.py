"""Every socket option that a TCP socket can have: socket(7), tcp(7), ip(7), ipv6(7) and the headers beyond them.

One row an option: how its value is read, what it looks like in a record, and when a restored socket takes it.
`OPTIONS` is what moves, in the order in which it is set; `LEFT_OUT` is the rest, each with the reason. A number that
the running kernel answers and that stands in neither makes a test fail. `kernel.options` does the reading and setting.

Numbers are those of include/uapi/asm-generic/socket.h, which all architectures but alpha, mips, parisc, powerpc and
sparc use; records carry names, so hosts may differ.
"""

from __future__ import annotations

import enum
import socket
from typing import NamedTuple

__all__ = ["BY_NAME", "LEFT_OUT", "OPTIONS", "Kind", "LeftOut", "Option", "Phase", "Value"]

Value = int | bytes


class Phase(enum.IntEnum):
    """When a restored socket takes an option. The first four follow one another in the life of a connection."""

    BEFORE_BIND = 0  # buffers, and what decides which addresses and routes the socket may use
    BEFORE_CONNECT = 1  # what shapes the segments or the route: connect(2) takes both into account
    IN_REPAIR = 2  # all that needs no particular moment
    AFTER_REPAIR = 3  # what repair mode resets, or what would act on the restore itself: filters, time-outs
    UNCONNECTED = 4  # only in CLOSE and LISTEN, before bind; such a socket takes all other options then, too


class Kind(enum.Enum):
    """What a value is: in the kernel, and in a record where that differs."""

    INT = "int"
    HOPS = "int, or the route's"  # unset it reads as what the route or the namespace says
    DSCP = "int without the two ECN bits"  # those are the connection's, not the application's
    SIZE = "bytes"  # what the kernel keeps, twice of what was asked for; autotuning moves it
    CLAMP = "bytes, or by itself"  # of a connection: half of the receive buffer unless something changed it
    RATE = "bytes a second"  # unsigned long; 2**64 - 1: no limit
    TIMEVAL = "microseconds"  # struct timeval; 0: none
    LINGER = "seconds, or -1"  # struct linger; -1: off
    STRING = "string"  # bytes without the NUL
    DEVICE = "name of a network device"
    BYTES = "bytes as they are"
    STICKY = "IPv6 extension header"  # as BYTES; charged to the socket's option memory
    LABEL = "flow label"  # int, 20 bits: getpeername gives it, setting it leases it
    FILTER = "classic BPF program"  # bytes: struct sock_filter[], each >HBBI; charged to the option memory
    LOST = "nothing"  # that there is one can be seen, but neither read nor set


class Option(NamedTuple):
    """One option: ``name`` as in C, ``level`` and ``number`` for getsockopt(2), ``family`` 4 or 6 or 0 for both.

    An AF_INET6 socket has the options of both families: one that speaks IPv4 (IPv4-mapped) works by the first.
    ``sample`` is a value that differs from every default, for the tests and for `kernel.fingerprint`. ``readable``
    is False where the kernel tells nobody: such a value is set if somebody gives it.
    """

    name: str
    level: int
    number: int
    kind: Kind = Kind.INT
    phase: Phase = Phase.IN_REPAIR
    family: int = 0
    sample: Value = 1
    readable: bool = True
    note: str = ""


class LeftOut(NamedTuple):
    """An option that does not move, and why."""

    name: str
    level: int
    number: int
    reason: str


SOL, TCP, IP, IPV6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
BIND, CONNECT, REPAIR, AFTER, UNCONNECTED = Phase

# Samples: a filter that lets everything pass (ret #-1), a record-route option, extension headers of padding alone, a
# segment routing header with nothing left to visit, and the host's own loopback address in it.
PASS_ALL = bytes.fromhex("00060000ffffffff")
RECORD_ROUTE = bytes.fromhex("0707040000000000")
PADDING = bytes.fromhex("0000010400000000")
ROUTED = bytes.fromhex("0002040000000000 00000000000000000000000000000001")

OPTIONS: tuple[Option, ...] = (
    # Before bind. Sizes first: a queue is restored into them, and setting them locks them.
    Option("SO_SNDBUF", SOL, 7, Kind.SIZE, BIND, sample=100_000, note="by SO_SNDBUFFORCE where allowed"),
    Option("SO_RCVBUF", SOL, 8, Kind.SIZE, BIND, sample=100_000, note="by SO_RCVBUFFORCE where allowed"),
    Option("SO_BUF_LOCK", SOL, 72, phase=BIND, sample=3, note="1 send, 2 receive: autotuning keeps off"),
    Option("SO_MARK", SOL, 36, phase=BIND, sample=0x1234567),
    Option("SO_BINDTODEVICE", SOL, 25, Kind.DEVICE, BIND, sample=b"lo", note="the same name must be there"),
    Option("IP_FREEBIND", IP, 15, phase=BIND, family=4),
    Option("IP_TRANSPARENT", IP, 19, phase=BIND, family=4),
    Option("IPV6_FREEBIND", IPV6, 78, phase=BIND, family=6, note="the bit of IP_FREEBIND"),
    Option("IPV6_TRANSPARENT", IPV6, 75, phase=BIND, family=6, note="the bit of IP_TRANSPARENT"),
    # Before connect. Setting IP_TOS sets SO_PRIORITY, too, so that comes after it.
    Option("IP_TOS", IP, 1, Kind.DSCP, CONNECT, sample=0x20),
    Option("IPV6_TCLASS", IPV6, 67, Kind.DSCP, CONNECT, 6, sample=0x20),
    Option("SO_PRIORITY", SOL, 12, phase=CONNECT, sample=5),
    Option("SO_DONTROUTE", SOL, 5, phase=CONNECT),
    Option("IP_OPTIONS", IP, 4, Kind.BYTES, CONNECT, sample=RECORD_ROUTE),
    Option("IPV6_HOPOPTS", IPV6, 54, Kind.STICKY, CONNECT, 6, sample=PADDING),
    Option("IPV6_RTHDRDSTOPTS", IPV6, 55, Kind.STICKY, CONNECT, 6, sample=PADDING),
    Option("IPV6_RTHDR", IPV6, 57, Kind.STICKY, CONNECT, 6, sample=ROUTED),
    Option("IPV6_DSTOPTS", IPV6, 59, Kind.STICKY, CONNECT, 6, sample=PADDING),
    Option("IPV6_FLOWLABEL_MGR", IPV6, 32, Kind.LABEL, CONNECT, 6, sample=0x12345, note="connect must name it, too"),
    Option("IPV6_FLOWINFO_SEND", IPV6, 33, phase=CONNECT, family=6),
    Option("IPV6_AUTOFLOWLABEL", IPV6, 70, phase=CONNECT, family=6, sample=0),
    Option("IPV6_ADDR_PREFERENCES", IPV6, 72, phase=CONNECT, family=6, sample=0x402),
    Option("IP_MTU_DISCOVER", IP, 10, phase=CONNECT, sample=3),
    Option("IPV6_MTU_DISCOVER", IPV6, 23, phase=CONNECT, family=6, sample=3),
    Option("IPV6_DONTFRAG", IPV6, 62, phase=CONNECT, family=6),
    Option("TCP_CONGESTION", TCP, 13, Kind.STRING, CONNECT, sample=b"cubic", note="the kernel must have it"),
    Option("TCP_MD5SIG", TCP, 14, Kind.BYTES, CONNECT, sample=b"", readable=False, note="of the user: md5_key()"),
    # In repair mode.
    Option("TCP_NODELAY", TCP, 1),
    Option("TCP_CORK", TCP, 3),
    Option("TCP_WINDOW_CLAMP", TCP, 10, Kind.CLAMP, sample=20_000, note="after TCP_REPAIR_WINDOW"),
    Option("TCP_KEEPIDLE", TCP, 4, sample=100),
    Option("TCP_KEEPINTVL", TCP, 5, sample=10),
    Option("TCP_KEEPCNT", TCP, 6, sample=5),
    Option("SO_KEEPALIVE", SOL, 9, note="after TCP_KEEPIDLE: it starts the timer"),
    Option("TCP_SYNCNT", TCP, 7, sample=3),
    Option("TCP_LINGER2", TCP, 8, sample=20),
    Option("TCP_DEFER_ACCEPT", TCP, 9, sample=7, note="rounded up to a retransmission's time"),
    Option("TCP_THIN_LINEAR_TIMEOUTS", TCP, 16),
    Option("TCP_USER_TIMEOUT", TCP, 18, sample=30_000),
    Option("TCP_NOTSENT_LOWAT", TCP, 25, sample=16_384),
    Option("TCP_INQ", TCP, 36),
    Option("TCP_TX_DELAY", TCP, 37, sample=1000),
    Option("TCP_RTO_MAX_MS", TCP, 44, sample=30_000),
    Option("TCP_RTO_MIN_US", TCP, 45, sample=100_000),
    Option("TCP_DELACK_MAX_US", TCP, 46, sample=100_000),
    Option("SO_DEBUG", SOL, 1),
    Option("SO_BROADCAST", SOL, 6, note="nothing to TCP"),
    Option("SO_OOBINLINE", SOL, 10),
    Option("SO_NO_CHECK", SOL, 11, note="nothing to TCP"),
    Option("SO_REUSEPORT", SOL, 15),
    Option("SO_RCVLOWAT", SOL, 18, sample=100),
    Option("SO_RXQ_OVFL", SOL, 40, note="nothing to TCP"),
    Option("SO_WIFI_STATUS", SOL, 41, note="nothing to TCP"),
    Option("SO_NOFCS", SOL, 43, note="nothing to TCP"),
    Option("SO_SELECT_ERR_QUEUE", SOL, 45),
    Option("SO_BUSY_POLL", SOL, 46, sample=50),
    Option("SO_PREFER_BUSY_POLL", SOL, 69),
    Option("SO_BUSY_POLL_BUDGET", SOL, 70, sample=16, readable=False, note="the user gives it"),
    Option("SO_MAX_PACING_RATE", SOL, 47, Kind.RATE, sample=1 << 40),
    Option("SO_ZEROCOPY", SOL, 60),
    Option("SO_RESERVE_MEM", SOL, 73, sample=4096, note="needs a memory cgroup"),
    Option("SO_TXREHASH", SOL, 74, sample=0),
    Option("SO_RCVMARK", SOL, 75),
    Option("SO_RCVPRIORITY", SOL, 82),
    # The two generations of time stamps share their bits; the last one set decides which of them it is.
    Option("SO_TIMESTAMPING", SOL, 37, sample=0x18, note="SOF_TIMESTAMPING_OPT_ID counts from the move on"),
    Option("SO_TIMESTAMP", SOL, 29),
    Option("SO_TIMESTAMPNS", SOL, 35),
    Option("SO_TIMESTAMP_NEW", SOL, 63),
    Option("SO_TIMESTAMPNS_NEW", SOL, 64),
    Option("SO_TIMESTAMPING_NEW", SOL, 65, sample=0x18),
    Option("IP_TTL", IP, 2, sample=33),
    Option("IP_RECVERR", IP, 11),
    Option("IP_RECVERR_RFC4884", IP, 26),
    Option("IP_BIND_ADDRESS_NO_PORT", IP, 24),
    Option("IP_LOCAL_PORT_RANGE", IP, 51, sample=30_000 << 16 | 20_000),
    Option("IP_PKTINFO", IP, 8),
    Option("IP_RECVTTL", IP, 12),
    Option("IP_RECVTOS", IP, 13),
    Option("IP_RECVOPTS", IP, 6),
    Option("IP_RETOPTS", IP, 7),
    Option("IP_PASSSEC", IP, 18),
    Option("IP_RECVORIGDSTADDR", IP, 20),
    Option("IP_CHECKSUM", IP, 23, note="nothing to TCP"),
    Option("IPV6_UNICAST_HOPS", IPV6, 16, Kind.HOPS, family=6, sample=33),
    Option("IPV6_RECVERR", IPV6, 25, family=6),
    Option("IPV6_RECVERR_RFC4884", IPV6, 31, family=6),
    Option("IPV6_RECVPKTINFO", IPV6, 49, family=6),
    Option("IPV6_RECVHOPLIMIT", IPV6, 51, family=6),
    Option("IPV6_RECVHOPOPTS", IPV6, 53, family=6),
    Option("IPV6_RECVRTHDR", IPV6, 56, family=6),
    Option("IPV6_RECVDSTOPTS", IPV6, 58, family=6),
    Option("IPV6_RECVPATHMTU", IPV6, 60, family=6),
    Option("IPV6_RECVTCLASS", IPV6, 66, family=6),
    Option("IPV6_RECVORIGDSTADDR", IPV6, 74, family=6),
    Option("IPV6_RECVFRAGSIZE", IPV6, 77, family=6),
    Option("IPV6_FLOWINFO", IPV6, 11, family=6),
    Option("IPV6_2292PKTINFO", IPV6, 2, family=6),
    Option("IPV6_2292HOPOPTS", IPV6, 3, family=6),
    Option("IPV6_2292DSTOPTS", IPV6, 4, family=6),
    Option("IPV6_2292RTHDR", IPV6, 5, family=6),
    Option("IPV6_2292HOPLIMIT", IPV6, 8, family=6),
    # After repair mode, which leaves SO_REUSEADDR cleared. Filters and minimal hop counts would drop what the restore
    # injects, time-outs would end its own calls.
    Option("SO_REUSEADDR", SOL, 2, phase=AFTER),
    Option("SO_LINGER", SOL, 13, Kind.LINGER, AFTER, sample=3),
    Option("SO_RCVTIMEO", SOL, 20, Kind.TIMEVAL, AFTER, sample=1_500_000),
    Option("SO_SNDTIMEO", SOL, 21, Kind.TIMEVAL, AFTER, sample=1_500_000),
    Option("SO_PEEK_OFF", SOL, 42, phase=AFTER, sample=10),
    Option("TCP_QUICKACK", TCP, 12, phase=AFTER, sample=0, note="a state: the kernel clears it after an exchange"),
    Option("IP_MINTTL", IP, 21, phase=AFTER, sample=2),
    Option("IPV6_MINHOPCOUNT", IPV6, 73, phase=AFTER, family=6, sample=2),
    Option("SO_ATTACH_FILTER", SOL, 26, Kind.FILTER, AFTER, sample=PASS_ALL),
    Option(
        "SO_ATTACH_BPF", SOL, 50, Kind.LOST, AFTER, readable=False, note="seen, but the kernel gives no program back"
    ),
    Option("SO_LOCK_FILTER", SOL, 44, phase=AFTER),
    # What a connection does not need, or has no more.
    Option("SO_INCOMING_CPU", SOL, 49, phase=UNCONNECTED, sample=0, note="of a connection: where segments come in"),
    Option("IPV6_V6ONLY", IPV6, 26, phase=UNCONNECTED, family=6, note="bind to an IPv6 address sets it by itself"),
    Option("TCP_MAXSEG", TCP, 2, phase=UNCONNECTED, sample=1000, note="of a connection: a field of the record"),
    Option("TCP_SAVE_SYN", TCP, 27, phase=UNCONNECTED),
    Option("TCP_FASTOPEN", TCP, 23, phase=UNCONNECTED, sample=5),
    Option("TCP_FASTOPEN_CONNECT", TCP, 30, phase=UNCONNECTED),
    Option("TCP_FASTOPEN_NO_COOKIE", TCP, 34, phase=UNCONNECTED),
    Option("TCP_FASTOPEN_KEY", TCP, 33, Kind.BYTES, UNCONNECTED, sample=bytes(range(16)), note="a secret"),
)
BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}

NOTHING = "TCP does not look at it"
ANSWER = "an answer, not a setting"
RECORDED = "its content is a field of the record"
DATAGRAM = "of datagrams: a stream socket cannot set it"

LEFT_OUT: tuple[LeftOut, ...] = (
    LeftOut("SO_TYPE", SOL, 3, ANSWER),
    LeftOut("SO_ERROR", SOL, 4, "reading it takes the error away from the application"),
    LeftOut("SO_BSDCOMPAT", SOL, 14, "obsolete, without effect"),
    LeftOut("SO_PEERCRED", SOL, 17, "of Unix sockets"),
    LeftOut("SO_SNDLOWAT", SOL, 19, "cannot be set"),
    LeftOut("SO_PEERNAME", SOL, 28, RECORDED),
    LeftOut("SO_ACCEPTCONN", SOL, 30, ANSWER),
    LeftOut("SO_PROTOCOL", SOL, 38, ANSWER),
    LeftOut("SO_DOMAIN", SOL, 39, ANSWER),
    LeftOut("SO_BPF_EXTENSIONS", SOL, 48, ANSWER),
    LeftOut("SO_ATTACH_REUSEPORT_CBPF", SOL, 51, "belongs to a group of listeners and cannot be read"),
    LeftOut("SO_ATTACH_REUSEPORT_EBPF", SOL, 52, "belongs to a group of listeners and cannot be read"),
    LeftOut("SO_MEMINFO", SOL, 55, ANSWER),
    LeftOut("SO_INCOMING_NAPI_ID", SOL, 56, ANSWER),
    LeftOut("SO_COOKIE", SOL, 57, ANSWER),
    LeftOut("SO_PEERGROUPS", SOL, 59, "of Unix sockets"),
    LeftOut("SO_TXTIME", SOL, 61, NOTHING),
    LeftOut("SO_BINDTOIFINDEX", SOL, 62, "SO_BINDTODEVICE says the same by name"),
    LeftOut("SO_RCVTIMEO_NEW", SOL, 66, "SO_RCVTIMEO with another structure"),
    LeftOut("SO_SNDTIMEO_NEW", SOL, 67, "SO_SNDTIMEO with another structure"),
    LeftOut("SO_NETNS_COOKIE", SOL, 71, ANSWER),
    LeftOut("SO_PEERPIDFD", SOL, 77, "of Unix sockets"),
    LeftOut("TCP_INFO", TCP, 11, RECORDED),
    LeftOut("TCP_THIN_DUPACK", TCP, 17, "obsolete, without effect"),
    LeftOut("TCP_REPAIR", TCP, 19, "the means of the move"),
    LeftOut("TCP_REPAIR_QUEUE", TCP, 20, "the means of the move"),
    LeftOut("TCP_QUEUE_SEQ", TCP, 21, RECORDED),
    LeftOut("TCP_TIMESTAMP", TCP, 24, RECORDED),
    LeftOut("TCP_CC_INFO", TCP, 26, ANSWER),
    LeftOut("TCP_SAVED_SYN", TCP, 28, "reading it takes it away; a socket cannot be given one"),
    LeftOut("TCP_REPAIR_WINDOW", TCP, 29, RECORDED),
    LeftOut("TCP_ULP", TCP, 31, "such a connection is refused"),
    LeftOut("TCP_ZEROCOPY_RECEIVE", TCP, 35, "a way of reading"),
    LeftOut("TCP_AO_INFO", TCP, 40, "such a connection is refused"),
    LeftOut("TCP_IS_MPTCP", TCP, 43, ANSWER),
    LeftOut("IP_HDRINCL", IP, 3, "of raw sockets"),
    LeftOut("IP_ROUTER_ALERT", IP, 5, "of raw sockets"),
    LeftOut("IP_PKTOPTIONS", IP, 9, ANSWER),
    LeftOut("IP_MTU", IP, 14, ANSWER),
    LeftOut("IP_XFRM_POLICY", IP, 17, "cannot be read; policies of the host move with the host's settings"),
    LeftOut("IP_NODEFRAG", IP, 22, "of raw sockets"),
    LeftOut("IP_RECVFRAGSIZE", IP, 25, DATAGRAM),
    LeftOut("IP_MULTICAST_IF", IP, 32, DATAGRAM),
    LeftOut("IP_MULTICAST_TTL", IP, 33, DATAGRAM),
    LeftOut("IP_MULTICAST_LOOP", IP, 34, NOTHING),
    LeftOut("IP_MSFILTER", IP, 41, DATAGRAM),
    LeftOut("MCAST_MSFILTER", IP, 48, DATAGRAM),
    LeftOut("IP_MULTICAST_ALL", IP, 49, NOTHING),
    LeftOut("IP_UNICAST_IF", IP, 50, NOTHING),
    LeftOut("IP_PROTOCOL", IP, 52, ANSWER),
    LeftOut("IPV6_ADDRFORM", IPV6, 1, "turns it into an IPv4 socket, and as that it moves"),
    LeftOut("IPV6_2292PKTOPTIONS", IPV6, 6, "IPV6_HOPOPTS and the others say the same one by one"),
    LeftOut("IPV6_MULTICAST_IF", IPV6, 17, DATAGRAM),
    LeftOut("IPV6_MULTICAST_HOPS", IPV6, 18, DATAGRAM),
    LeftOut("IPV6_MULTICAST_LOOP", IPV6, 19, NOTHING),
    LeftOut("IPV6_ROUTER_ALERT", IPV6, 22, "of raw sockets"),
    LeftOut("IPV6_MTU", IPV6, 24, "reads as the path's MTU, and TCP does not look at it"),
    LeftOut("IPV6_MULTICAST_ALL", IPV6, 29, NOTHING),
    LeftOut("IPV6_ROUTER_ALERT_ISOLATE", IPV6, 30, NOTHING),
    LeftOut("IPV6_XFRM_POLICY", IPV6, 35, "cannot be read; policies of the host move with the host's settings"),
    LeftOut("MCAST_MSFILTER", IPV6, 48, DATAGRAM),
    LeftOut("IPV6_PKTINFO", IPV6, 50, "cannot be read; a connection's own address stands above it"),
    LeftOut("IPV6_PATHMTU", IPV6, 61, ANSWER),
    LeftOut("IPV6_UNICAST_IF", IPV6, 76, NOTHING),
)
