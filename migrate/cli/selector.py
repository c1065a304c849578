"""Selectors, alike in every verb: CONN, --local, --remote, --state, --pid, --fd."""

from __future__ import annotations

import argparse

from migrate.errors import UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.selection import Found, Selector, find
from migrate.tcpstate import TcpState

__all__ = ["Found", "Selector", "add_arguments", "find", "from_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The selector's arguments on a verb's parser."""
    group = parser.add_argument_group("selectors")
    group.add_argument(
        "connection", metavar="CONN", nargs="?", help="one connection: LOCAL,REMOTE as in 10.0.0.1:80,10.0.0.9:53972"
    )
    group.add_argument("--local", metavar="ADDR[:PORT]", help="its end on this host")
    group.add_argument("--remote", metavar="ADDR[:PORT]", help="the peer's end")
    group.add_argument("--state", metavar="S[,S]", help="TCP states, such as ESTABLISHED,CLOSE_WAIT")
    group.add_argument("--pid", metavar="N", type=int, help="a process that has it open")
    group.add_argument("--fd", metavar="N", type=int, help="its descriptor there (with --pid)")


def from_arguments(arguments: argparse.Namespace) -> Selector:
    """The selector that the arguments spell. Raises UsageError."""
    if arguments.fd is not None and arguments.pid is None:
        raise UsageError("--fd needs --pid: a descriptor belongs to a process")
    return Selector(
        FourTuple.parse(arguments.connection) if arguments.connection else None,
        parse_endpoint(arguments.local) if arguments.local else None,
        parse_endpoint(arguments.remote) if arguments.remote else None,
        _states(arguments.state) if arguments.state else None,
        arguments.pid,
        arguments.fd,
    )


def _states(text: str) -> frozenset[TcpState]:
    chosen = set()
    for word in text.split(","):
        name = word.strip().upper().replace("-", "_")
        if name not in TcpState.__members__:
            raise UsageError(f"{word!r} is no TCP state", hint="they are " + ", ".join(TcpState.__members__))
        chosen.add(TcpState[name])
    return frozenset(chosen)
