"""Adoption by a child process: inetd style (one child a connection) or systemd style (one child for all).

The child is forked while its sockets are still silent and waits on a pipe. A byte on it says: they are active, go.
If the pipe closes without one, the parent died; then the sockets themselves tell what it had done: still in repair
mode, and the child exits, which nobody notices; active already, and the child goes ahead.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
from collections.abc import Sequence
from typing import NoReturn

from migrate.errors import HostError, UsageError, from_oserror
from migrate.kernel import sockopt
from migrate.kernel.capabilities import drop_ambient

__all__ = ["LISTEN_FDS_START", "ChildAdoption", "InetdAdopter", "SystemdAdopter", "become"]

LISTEN_FDS_START = 3  # sd_listen_fds(3)
_DESCRIPTOR_LIMIT = 1 << 30


class ChildAdoption:
    """A forked child that holds its sockets and waits for the word. ``pid`` is the process it will be."""

    def __init__(
        self, command: Sequence[str], sockets: Sequence[socket.socket], *, systemd: bool, session: bool
    ) -> None:
        self._status, status = os.pipe2(os.O_CLOEXEC)  # exec() closes it; a failure of exec() is written to it
        waits, self._word = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid = os.fork()
        except OSError as error:
            for descriptor in (self._status, status, waits, self._word):
                os.close(descriptor)
            raise from_oserror("starting a child", error) from None
        if self.pid == 0:
            become(command, [sock.fileno() for sock in sockets], waits, status, systemd=systemd, session=session)
        os.close(waits)
        os.close(status)
        self._command = command[0]

    def go(self) -> None:
        """Let the child run its command; raises HostError if it could not be executed."""
        try:
            os.write(self._word, b"g")
            self._end()
            failure = os.read(self._status, 256)
        finally:
            os.close(self._status)
        if failure:
            raise HostError(f"{self._command!r} could not be started: {failure.decode('utf-8', 'replace')}")

    def abort(self) -> None:
        """Let the child exit; its sockets are silent."""
        self._end()
        os.close(self._status)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _end(self) -> None:
        os.close(self._word)


def become(
    command: Sequence[str], descriptors: list[int], waits: int, status: int, *, systemd: bool, session: bool
) -> NoReturn:
    """In the child: wait at the gate, then be the command. Never returns, whatever happens.

    ``waits`` says b"g"; if it closes without, what is still silent is left out. What keeps the command from running is
    written to ``status``.
    """
    try:
        # Every other copy of a word pipe's writing end that this child inherited would hide the parent's death.
        keep = sorted({2, waits, status, *descriptors})
        for low, high in itertools.pairwise([*keep, _DESCRIPTOR_LIMIT]):
            os.closerange(low + 1, high)
        if session:
            os.setsid()
        # All that can be done before the word is, since the connection waits for what comes after it.
        program = shutil.which(command[0]) or command[0]  # a name that is nowhere is searched again, for the error
        environment = _environment()
        drop_ambient()  # an agent's privileges are not for whom it starts
        if os.read(waits, 1) != b"g":
            descriptors = [descriptor for descriptor in descriptors if not _silent(descriptor)]
            if not descriptors:
                os._exit(0)
        _place(descriptors, environment, systemd=systemd)
        for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(program, list(command), environment)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(status, (getattr(error, "strerror", None) or repr(error)).encode()[:256])
        # The connection was active but has no owner: go back to silence, so that the peer keeps waiting.
        for descriptor in descriptors:
            _hush(descriptor)
    finally:
        os._exit(127)


def _silent(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sockopt.in_repair(sock)


def _hush(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
        sockopt.enter_repair(sock)


def _environment() -> dict[str, str]:
    """This process's, without what another one was told of its sockets."""
    environment = dict(os.environ)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    return environment


def _place(descriptors: list[int], environment: dict[str, str], *, systemd: bool) -> None:
    """Put the sockets where the convention wants them, and tell the environment to run with."""
    if not systemd:
        os.dup2(descriptors[0], 0)
        os.dup2(descriptors[0], 1)
        return
    count = len(descriptors)
    # Move them out of the way first: a target number may be a source number that is still needed.
    beyond = max(LISTEN_FDS_START + count, *descriptors) + 1
    import fcntl

    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, beyond) for descriptor in descriptors]
    for position, descriptor in enumerate(high):
        os.dup2(descriptor, LISTEN_FDS_START + position)
    environment |= {
        "LISTEN_FDS": str(count),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": ":".join(["connection"] * count),
    }


class _Command:
    """What both styles share: a command that must exist. ``session`` puts the children into a session of their own."""

    def __init__(self, command: Sequence[str], *, session: bool = False) -> None:
        if not command:
            raise UsageError("a command to hand the connection to is missing", hint="… -- CMD ARGUMENTS")
        self.command = list(command)
        self.session = session

    def check(self) -> None:
        """Raise HostError if the command does not exist or may not be run."""
        if shutil.which(self.command[0]) is None:
            raise HostError(f"there is no command {self.command[0]!r}", hint="install it, or give its path")


class InetdAdopter(_Command):
    """One child a connection, with the socket as its standard input and output; standard error is inherited."""

    def adopt(self, sockets: Sequence[socket.socket]) -> list[ChildAdoption]:
        """A waiting child for each socket."""
        return [ChildAdoption(self.command, [sock], systemd=False, session=self.session) for sock in sockets]


class SystemdAdopter(_Command):
    """One child for all connections, which are its descriptors from 3 on, announced as sd_listen_fds(3) says.

    LISTEN_FDNAMES says "connection" for each: they are connected sockets, not listeners.
    """

    def adopt(self, sockets: Sequence[socket.socket]) -> list[ChildAdoption]:
        """One waiting child."""
        return [ChildAdoption(self.command, sockets, systemd=True, session=self.session)]
