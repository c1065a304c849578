"""The unix socket of an application that takes part: where it may lie, and who is at its other end."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Collection
from pathlib import Path

from migrate.errors import HostError, NotFound, PrivilegeError, UsageError

__all__ = ["HINT", "MAX_PATH", "check_directory", "listener_at", "peer_of", "process_of"]

HINT = "is the application running, and does it listen there (migrate.app.plain)?"
MAX_PATH = 107  # bytes, sun_path in unix(7)
_UCRED = struct.Struct("3i")  # struct ucred in unix(7): pid, uid, gid


def peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group that connected, or that listens, at the other end (SO_PEERCRED)."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def check_directory(path: str, users: Collection[int]) -> None:
    """Raise unless nobody but its owner, one of ``users``, can put anything into the directory of ``path`` (0700).

    UsageError for a path that no socket can have, NotFound, PrivilegeError.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise UsageError(f"{path!r} is too long for a socket", hint=f"at most {MAX_PATH} bytes")
    directory = Path(path).parent
    try:
        found = directory.stat()
    except OSError as error:
        raise NotFound(f"{str(directory)!r}: {error.strerror}", hint=HINT) from None
    if not stat.S_ISDIR(found.st_mode):
        raise NotFound(f"{str(directory)!r} is no directory")
    if found.st_mode & 0o077 or found.st_uid not in users:
        raise PrivilegeError(
            f"{str(directory)!r} is open to other users",
            hint="the directory of an application's socket has mode 0700 and belongs to the application's user",
        )


def process_of(sock: socket.socket, path: str, users: Collection[int]) -> int:
    """The process at the other end. Raises PrivilegeError if its user is none of ``users``."""
    pid, user, _ = peer_of(sock)
    if user not in users:
        raise PrivilegeError(
            f"the application at {path} runs as user {user}",
            hint=f"it must be one of {', '.join(map(str, sorted(users)))}",
        )
    return pid


def listener_at(path: str, users: Collection[int] = ()) -> int | None:
    """The process that listens at ``path``, or None if nobody does. Neither waits nor says a word.

    An application that is called looks at the sockets that an asker who died had asked for. Raises PrivilegeError and
    UsageError as `Application` does, HostError if it cannot be reached.
    """
    allowed = {0, os.geteuid(), *users}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
        try:
            check_directory(path, allowed)
            sock.connect(path)
        except (NotFound, FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise HostError(f"the application at {path} cannot be reached: {error.strerror}", hint=HINT) from None
        return process_of(sock, path, allowed)
