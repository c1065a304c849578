"""The ICI record (placeholder; owner: record engineer)."""

from __future__ import annotations

import socket
from typing import NamedTuple

import msgspec

__all__ = ["FourTuple", "Ici"]


class FourTuple(NamedTuple):
    """A TCP four-tuple: packed addresses (4 or 16 bytes, network byte order) and ports, the local end first."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.local) == 4 else 6

    def __str__(self) -> str:
        if len(self.local) == 4:
            return (
                f"{socket.inet_ntoa(self.local)}:{self.local_port},{socket.inet_ntoa(self.remote)}:{self.remote_port}"
            )
        local, remote = (socket.inet_ntop(socket.AF_INET6, a) for a in (self.local, self.remote))
        return f"[{local}]:{self.local_port},[{remote}]:{self.remote_port}"

    def reversed(self) -> FourTuple:
        """The same connection as the peer names it."""
        return FourTuple(self.remote, self.remote_port, self.local, self.local_port)


class Ici(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Everything needed to rebuild one connection elsewhere."""

    id: bytes = b""
    epoch: int = 0
    family: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    state: int
    snd_una: int
    rcv_nxt: int
    snd_wl1: int = 0
    snd_wnd: int = 0
    max_window: int = 0
    rcv_wnd: int = 0
    rcv_wup: int = 0
    mss_clamp: int = 0
    mss: int = 0
    snd_wscale: int = -1
    rcv_wscale: int = -1
    sack: bool = False
    timestamps: int = 0
    ts_value: int = 0
    ecn: int = 0
    congestion: str = ""
    cwnd: int = 0
    ssthresh: int = 0
    srtt_us: int = 0
    rttvar_us: int = 0
    options: dict[str, int | bytes | str] = {}
    urgent: int = -1
    app: bytes = b""
    origin_host: str = ""
    origin_time: int = 0
    origin_kernel: str = ""
    sent: bytes = b""
    unsent: bytes = b""
    received: bytes = b""

    @property
    def four_tuple(self) -> FourTuple:
        """The connection as it is on the wire."""
        return FourTuple(self.local, self.local_port, self.remote, self.remote_port)
