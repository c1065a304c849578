"""Selectors, alike in every verb: CONN, --local, --remote, --state, --pid, --fd."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from migrate.errors import NotFound, UsageError
from migrate.ici import FourTuple, parse_endpoint
from migrate.kernel import diag, pidfd
from migrate.tcpstate import TcpState

__all__ = ["Found", "Selector", "add_arguments", "find", "from_arguments"]


class Selector(NamedTuple):
    """Which connections are meant: all conditions must hold."""

    connection: FourTuple | None = None
    local: tuple[bytes, int | None] | None = None
    remote: tuple[bytes, int | None] | None = None
    states: frozenset[TcpState] | None = None
    pid: int | None = None
    descriptor: int | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for, which means everything."""
        return not any(part is not None for part in self)


class Found(NamedTuple):
    """A connection and the processes that have it open."""

    connection: diag.Connection
    owners: Sequence[pidfd.Owner]


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


def find(selector: Selector, *, extensions: int = 0, owners: bool = True) -> list[Found]:
    """The connections of this network namespace that the selector means. Raises NotFound for a pid or fd that is not.

    Listeners are among them only if asked for by state, CONN or descriptor.
    """
    inodes = None if selector.pid is None else _inodes(selector.pid, selector.descriptor)
    states = selector.states
    if states is None and selector.descriptor is not None:
        states = frozenset(TcpState)
    if selector.connection is not None:
        one = diag.find(selector.connection, extensions=extensions)
        connections = [] if one is None else [one]
    else:
        connections = diag.list_connections(
            states=states, local=_endpoint(selector.local), remote=_endpoint(selector.remote), extensions=extensions
        )
    connections = [c for c in connections if _matches(c, selector, inodes)]
    if not owners:
        return [Found(connection, ()) for connection in connections]
    held = pidfd.owners_of({c.inode for c in connections if c.inode})
    return [Found(connection, held.get(connection.inode, ())) for connection in connections]


def _endpoint(end: tuple[bytes, int | None] | None) -> diag.Endpoint | None:
    return None if end is None else diag.Endpoint(*end)


def _matches(connection: diag.Connection, selector: Selector, inodes: frozenset[int] | None) -> bool:
    """What the kernel's filter did not see: it is not asked where the exact four-tuple is looked up."""
    local, local_port, remote, remote_port = connection.four_tuple
    for wanted, address, port in ((selector.local, local, local_port), (selector.remote, remote, remote_port)):
        if wanted is not None and (wanted[0] not in (b"", address) or wanted[1] not in (None, port)):
            return False
    if selector.states is not None and connection.state not in selector.states:
        return False
    return inodes is None or connection.inode in inodes


def _inodes(pid: int, descriptor: int | None) -> frozenset[int]:
    """The inode numbers of that process's sockets, or of one descriptor."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory) if descriptor is None else [str(descriptor)]
        links = []
        for name in names:
            try:
                links.append(os.readlink(f"{directory}/{name}"))
            except FileNotFoundError:
                if descriptor is not None and os.path.exists(directory):
                    raise NotFound(f"process {pid} has no descriptor {descriptor}") from None
    except PermissionError:
        from migrate.errors import PrivilegeError

        raise PrivilegeError(
            f"the descriptors of process {pid} cannot be read", hint="needs CAP_SYS_PTRACE; run as root"
        ) from None
    except FileNotFoundError:
        raise NotFound(f"there is no process {pid}") from None
    if descriptor is not None and not links:
        raise NotFound(f"there is no process {pid}")
    found = frozenset(int(match[1]) for match in map(re.compile(r"socket:\[(\d+)\]").match, links) if match)
    if descriptor is not None and not found:
        raise NotFound(f"descriptor {descriptor} of process {pid} is no socket ({links[0]})")
    return found
