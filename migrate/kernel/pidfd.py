"""Descriptors of other processes: who has a socket, and a duplicate of it here (pidfd_open(2), pidfd_getfd(2)).

A socket can have several owners: a forked child, a duplicated descriptor, one passed on. All of them count.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable
from typing import NamedTuple

from migrate.errors import HostError, KernelError, NotFound, PrivilegeError

__all__ = ["Owner", "get_fd", "open_process", "owners_of"]

SYS_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h, the same on every architecture but alpha

# The interpreter's lock is kept, as the call never waits. Declaring the arguments would double its cost.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall


class Owner(NamedTuple):
    """A descriptor of a process that is a given socket; ``comm`` is the process's name, 15 bytes at most."""

    pid: int
    fd: int
    comm: str


def open_process(pid: int) -> int:
    """A pidfd (close-on-exec) for a process; the caller closes it. Raises NotFound."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL: not positive, or a thread that leads no process
            raise NotFound(f"there is no process {pid}") from None
        if error.errno == errno.ENOSYS:
            raise HostError("this kernel has no pidfd_open", hint="Linux 5.3 or newer") from None
        raise _exhausted(error) or KernelError("pidfd_open", error.errno or 0) from None


def get_fd(pidfd: int, fd: int) -> int:
    """A duplicate (close-on-exec) of descriptor ``fd`` of that process: the same open file; the caller closes it.

    Raises NotFound if the process is gone or has no such descriptor, PrivilegeError, HostError.
    """
    result: int = _syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
    if result >= 0:
        return result
    error = OSError(ctypes.get_errno(), "pidfd_getfd")
    if error.errno == errno.EBADF:
        raise NotFound(f"the process has no descriptor {fd}")
    if error.errno == errno.ESRCH:
        raise NotFound("the process has ended")
    if error.errno == errno.EPERM:
        raise PrivilegeError(
            f"descriptor {fd} of another process cannot be taken: not permitted",
            hint="needs CAP_SYS_PTRACE, or the same user and kernel.yama.ptrace_scope=0; run as root",
        )
    if error.errno == errno.ENOSYS:
        raise HostError(
            "this kernel has no pidfd_getfd", hint="Linux 5.6 or newer, and a seccomp filter that allows it"
        )
    raise _exhausted(error) or KernelError("pidfd_getfd", error.errno or 0)


def owners_of(inodes: Iterable[int]) -> dict[int, list[Owner]]:
    """Who has the sockets of these inode numbers, by inode; one that nobody has, or that may not be seen, is missing.

    Reads every /proc/PID/fd: a socket's inode number is unique on the host. Processes that end meanwhile, or whose
    descriptors may not be read, are passed over.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    owners: dict[int, list[Owner]] = {}
    if not wanted:
        return owners
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                matches = _matches(directory, wanted)
            finally:
                os.close(directory)
            if matches:
                number, comm = int(pid), _comm(pid)
                for inode, fd in matches:
                    owners.setdefault(inode, []).append(Owner(number, fd, comm))
    return owners


def _matches(directory: int, wanted: dict[str, int]) -> list[tuple[int, int]]:
    found = []
    for name in os.listdir(directory):
        try:
            inode = wanted.get(os.readlink(name, dir_fd=directory))
        except OSError:  # closed meanwhile
            continue
        if inode is not None:
            found.append((inode, int(name)))
    return found


def _comm(pid: str) -> str:
    with open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().rstrip(b"\n").decode(errors="replace")


def _exhausted(error: OSError) -> HostError | None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return HostError("no descriptor left", hint="raise the limit of open files: ulimit -n, LimitNOFILE= in systemd")
    return None
