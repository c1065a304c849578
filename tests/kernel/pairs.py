"""Connections between two hosts, one of each kind, with the server's four-tuple as the wire has it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from typing import NamedTuple

from migrate.fourtuple import FourTuple, unmapped
from migrate.kernel import sockopt, uapi
from tests.fix_netns import Host

__all__ = ["KINDS", "Pair", "echo", "flow", "numbers", "pair", "unacknowledged", "unprivileged"]

KINDS = ["IPv4", "IPv6", "mapped"]  # the last: an IPv6 socket at the server, IPv4 on the wire


class Pair(NamedTuple):
    """Both ends, and the connection as the server names it."""

    client: socket.socket
    server: socket.socket
    flow: FourTuple


@contextlib.contextmanager
def pair(client: Host, server: Host, kind: str) -> Iterator[Pair]:
    """A connection from one host to the other; both sockets send at once and time out after 10 s."""
    family = socket.AF_INET if kind == "IPv4" else socket.AF_INET6
    with server.entered():
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=kind == "mapped")
    with listener:
        with client.entered():
            here = socket.create_connection((server.ip6 if kind == "IPv6" else server.ip4, listener.getsockname()[1]))
        there = listener.accept()[0]
    with here, there:
        for sock in (here, there):
            sock.settimeout(10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Pair(here, there, flow(there))


def echo(ends: Pair) -> None:
    """A word in each direction."""
    for one, two in ((ends.client, ends.server), (ends.server, ends.client)):
        one.sendall(b"ping")
        assert two.recv(4) == b"ping"


def flow(sock: socket.socket) -> FourTuple:
    """A socket's connection."""
    names = sock.getsockname(), sock.getpeername()
    (local, remote) = (unmapped(socket.inet_pton(sock.family, name[0])) for name in names)
    return FourTuple(local, names[0][1], remote, names[1][1])


def unacknowledged(sock: socket.socket) -> int:
    """Bytes written that the peer has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def numbers(sock: socket.socket) -> tuple[int, int]:
    """(sequence number of the next byte it will send, of the next it expects)."""
    sockopt.enter_repair(sock)
    ends = []
    for queue in (uapi.TCP_SEND_QUEUE, uapi.TCP_RECV_QUEUE):
        sockopt.select_queue(sock, queue)
        ends.append(sockopt.queue_end(sock))
    sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)
    sockopt.leave_repair(sock, probe=False)
    return ends[0], ends[1]


def unprivileged(attempt: Callable[[], object]) -> str:
    """What ``attempt`` raises in a process of an ordinary user: the type's name and the text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            attempt()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text
