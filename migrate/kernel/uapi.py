"""Numbers of the kernel's interface that Python 3.11 does not name. Each block cites its header."""

from __future__ import annotations

# include/uapi/linux/tcp.h: options at IPPROTO_TCP, and their values
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
TCP_REPAIR_ON = 1
TCP_REPAIR_OFF = 0
TCP_REPAIR_OFF_NO_WP = -1
TCP_NO_QUEUE = 0
TCP_RECV_QUEUE = 1
TCP_SEND_QUEUE = 2

# include/net/tcp.h: option kinds, as TCP_REPAIR_OPTIONS takes them
TCPOPT_MSS = 2
TCPOPT_WINDOW = 3
TCPOPT_SACK_PERMITTED = 4
TCPOPT_TIMESTAMP = 8

# include/uapi/linux/tcp.h: bits of tcpi_options
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_SACK = 2
TCPI_OPT_WSCALE = 4
TCPI_OPT_ECN = 8
TCPI_OPT_USEC_TS = 64

# include/uapi/asm-generic/socket.h
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_PEEK_OFF = 42
SO_MEMINFO = 55
SO_COOKIE = 57
SO_BUF_LOCK = 72

# include/uapi/linux/in.h, in6.h
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75

# include/uapi/linux/sockios.h: ioctls on a TCP socket, each gives an int
SIOCINQ = 0x541B
SIOCATMARK = 0x8905
SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B

# include/uapi/linux/in.h and tcp.h: what cannot be moved shows here
IPPROTO_MPTCP = 262
TCP_ULP = 31
TCP_AO_INFO = 40
