"""Choosing connections of this network namespace, and taking a descriptor of each out of its owner."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from migrate.errors import Error, NotFound, PrivilegeError, Refused
from migrate.fourtuple import FourTuple
from migrate.kernel import diag, pidfd
from migrate.obstacle import seen_obstacle
from migrate.tcpstate import TcpState

__all__ = ["Found", "Selector", "Takers", "find"]


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

    @property
    def obstacle(self) -> Error | None:
        """Why it cannot be moved, as far as can be seen from outside; needs diag's Extension.INFO."""
        seen = self.connection
        return seen_obstacle(
            seen.state,
            upper_layer=seen.ulp,
            signed=seen.signed,
            owned=bool(self.owners),
            referenced=seen.inode != 0,
        )


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


class Takers:
    """Takes descriptors out of processes; a context manager that keeps a pidfd of each process."""

    def __init__(self) -> None:
        self._opened = contextlib.ExitStack()
        self._processes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pidfds, not what was taken."""
        self._processes.clear()
        self._opened.close()

    def take(
        self, owners: Mapping[FourTuple, Sequence[pidfd.Owner]]
    ) -> tuple[dict[FourTuple, socket.socket], dict[FourTuple, Error]]:
        """A socket of each connection, out of its first owner, the caller's to close; and why there is none."""
        sockets: dict[FourTuple, socket.socket] = {}
        failures: dict[FourTuple, Error] = {}
        for four_tuple, those in owners.items():
            try:
                if not those:
                    raise Refused("no process has it open")
                sockets[four_tuple] = self._take(those[0])
            except Error as error:
                failures[four_tuple] = error
        return sockets, failures

    def _take(self, owner: pidfd.Owner) -> socket.socket:
        if owner.pid not in self._processes:
            self._processes[owner.pid] = pidfd.open_process(owner.pid)
            self._opened.callback(os.close, self._processes[owner.pid])
        descriptor = pidfd.get_fd(self._processes[owner.pid], owner.fd)
        # Type and protocol are said, or each would be asked for; the family is not known. A dump asks for all of them.
        return socket.socket(type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, fileno=descriptor)


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
        names: Iterable[str] = os.listdir(directory) if descriptor is None else [str(descriptor)]
        links = []
        for name in names:
            try:
                links.append(os.readlink(f"{directory}/{name}"))
            except FileNotFoundError:
                if descriptor is not None and os.path.exists(directory):
                    raise NotFound(f"process {pid} has no descriptor {descriptor}") from None
    except PermissionError:
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
