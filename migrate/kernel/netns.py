"""Network namespaces: which one this thread is in, and a way to be in another for a while (setns(2)).

A network namespace belongs to the *thread*; a socket keeps the one it was made in. So it is enough to be
inside while a socket is made: afterwards it may be used from anywhere.

A namespace is named in one of three ways: ``NAME`` as `ip netns` knows it (/run/netns/NAME), a path (anything
with a slash), or ``pid:1234`` for the one that process is in.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

from migrate.errors import Error, KernelError, NotFound, PrivilegeError, UsageError

__all__ = ["entered", "entered_with", "exists", "identity", "open"]

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
DIRECTORY = "/run/netns"  # where `ip netns add` keeps its names
OWN = "/proc/thread-self/ns/net"
SIOCGSKNS = 0x894C  # include/uapi/linux/sockios.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.setns.restype = ctypes.c_int


@contextlib.contextmanager
def entered(name: str | None) -> Iterator[None]:
    """This thread is in the network namespace ``name`` meanwhile; None changes nothing. May be nested.

    Raises NotFound, PrivilegeError, UsageError, before anything changed.
    """
    if name is None:
        yield
        return
    before = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = open(name)
        try:
            _setns(there, name)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(before, OWN)
    finally:
        os.close(before)


@contextlib.contextmanager
def entered_with(sock: socket.socket) -> Iterator[None]:
    """This thread is in the socket's network namespace meanwhile. Raises PrivilegeError, KernelError."""
    try:
        there = fcntl.ioctl(sock, SIOCGSKNS)
    except OSError as error:
        raise _explained(f"of descriptor {sock.fileno()}", error) from None
    try:
        same = os.path.samestat(os.fstat(there), os.stat(OWN))
        with entered(None if same else f"/proc/self/fd/{there}"):
            yield
    finally:
        os.close(there)


def exists(name: str) -> bool:
    """Whether there is a network namespace of that name. Raises UsageError for what can be no name."""
    return os.path.exists(_path(name))


def identity(name: str | None = None) -> int:
    """The inode number of that network namespace, of this thread's for None: equal numbers, same namespace."""
    try:
        return os.stat(OWN if name is None else _path(name)).st_ino
    except OSError as error:
        raise _explained(name or OWN, error) from None


def open(name: str) -> int:
    """A descriptor (close-on-exec) of that network namespace; the caller closes it. Raises NotFound, PrivilegeError."""
    try:
        return os.open(_path(name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _explained(name, error) from None


def _path(name: str) -> str:
    if name.startswith("pid:"):
        if not (name[4:].isascii() and name[4:].isdigit()):
            raise UsageError(f"{name!r} names no network namespace: after 'pid:' comes a process id")
        return f"/proc/{name[4:]}/ns/net"
    if not name or "\0" in name or name == "." or ".." in name.split("/"):
        raise UsageError(
            f"{name!r} names no network namespace", hint="give a name of `ip netns list`, a path, or pid:NUMBER"
        )
    return name if "/" in name else f"{DIRECTORY}/{name}"


def _setns(descriptor: int, name: str) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) < 0:
        raise _explained(name, OSError(ctypes.get_errno(), "setns"))


def _explained(name: str, error: OSError) -> Error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENAMETOOLONG):
        return NotFound(f"there is no network namespace {name!r}", hint="`ip netns list` shows those with a name")
    if error.errno == errno.EINVAL:  # the file is there, but nothing is mounted on it, or something else
        return NotFound(f"{name!r} is no network namespace", hint="`ip netns list` shows those with a name")
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            f"network namespace {name!r} cannot be entered: not permitted",
            hint="needs CAP_SYS_ADMIN; run as root",
        )
    return KernelError(f"entering network namespace {name!r}", error.errno or 0)
