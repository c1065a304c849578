"""Why a connection cannot be moved, as far as its kind tells. Here, by itself, because it costs nothing to load."""

from __future__ import annotations

from migrate.errors import Refused
from migrate.tcpstate import REBUILD, TcpState

__all__ = ["obstacle", "seen_obstacle"]

_WAYS_OUT = {
    TcpState.SYN_RECEIVED: "`tcpmig dump --wait-handshakes SECONDS` waits longer",
    TcpState.TIME_WAIT: "`tcpmig dump` takes it along; agents leave it to itself",
}


def obstacle(
    state: int, *, multipath: bool = False, upper_layer: str = "", signed: bool = False, authenticated: bool = False
) -> Refused | None:
    """Why a TCP connection in that state cannot be moved, or None if it can.

    ``upper_layer`` is the name that TCP_ULP gives ("tls" for TLS in the kernel, "mptcp" for a subflow), empty for none.
    ``signed`` says that it has keys of TCP-MD5 (RFC 2385), ``authenticated`` of TCP-AO (RFC 5925).
    """
    if multipath or upper_layer == "mptcp":
        return Refused(
            "it is a Multipath TCP socket, which the kernel cannot repair",
            hint="have the server listen with plain TCP (for Go programs GODEBUG=multipathtcp=0)",
        )
    known = TcpState.from_kernel(state)
    if not REBUILD[known].dumpable:
        return Refused(f"it is in {known.name}: {REBUILD[known].reason}", hint=_WAYS_OUT[known])
    if upper_layer == "tls":
        return Refused("its TLS keys live in the kernel (kTLS)", hint="switch kernel TLS off in the application")
    if upper_layer:
        return Refused(f"its upper layer {upper_layer!r} lives in the kernel, which gives no copy of it")
    if authenticated:
        return Refused("it is authenticated (TCP-AO), and the kernel gives no copy of its keys")
    if signed:
        return Refused(
            "its segments are signed (TCP-MD5), and a record has no key unless somebody puts it there",
            hint="a program that knows the key can: docs/options.md, TCP_MD5SIG",
        )
    return None


def seen_obstacle(state: TcpState, *, upper_layer: str, signed: bool, owned: bool, referenced: bool) -> Refused | None:
    """Why one of the host's connections cannot be moved, as far as can be seen from outside.

    It is ``owned`` if a process is known that has it open; it has an inode if it is ``referenced`` by one out of sight.
    """
    refused = obstacle(state, upper_layer=upper_layer, signed=signed)
    if refused is not None or owned:
        return refused
    if referenced:
        return Refused("no process has it open")
    if state in (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT):
        return Refused("nobody has accepted it yet", hint="it goes along with its listener")
    return Refused("its owner has closed it, and the kernel brings it to its end")
