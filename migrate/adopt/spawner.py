"""A small process of one thread that starts the children of a process that has many, and keeps sockets for it.

fork(2) in a process with threads copies locks that nobody will ever release. So the spawner is forked before there are
any, and is told over a socket whom to start with which descriptors (SCM_RIGHTS). A descriptor that was sent is safe:
the spawner reads what is on its way even if the sender has died since.

The sockets of one adoption wait at one gate, a pipe. A byte for each owner on it says: they are active, go. If it
closes without, the sender died, and each socket tells what it had done: one that is still silent is closed, which
nobody notices; one that is active goes ahead. A socket that is only kept stays with the spawner until its peer closes
it; so long the spawner outlives its parent.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence

import msgspec

from migrate.adopt.child import become
from migrate.errors import HostError, from_oserror
from migrate.kernel import sockopt

__all__ = ["Gate", "Spawner"]

_AT_ONCE = 250  # descriptors in a message; the kernel takes SCM_MAX_FD = 253
_LONGEST = 1 << 17  # bytes of a message
_BUFFER = 4 << 20  # bytes of messages on their way


class _Order(msgspec.Struct, array_like=True):
    """What to do with the next ``count`` descriptors; ``command`` empty: keep them."""

    command: tuple[str, ...]
    systemd: bool
    count: int


class Gate:
    """Sockets that wait with their owners; a `migrate.adopt.Adoption`.

    ``status`` can be read when the owners have started (empty) or could not (the reason); the caller closes it.
    """

    def __init__(self, word: int, status: int, owners: int) -> None:
        self.status = status
        self._word = word
        self._owners = owners

    def go(self) -> None:
        """Let the owners run. Does not wait for them."""
        try:
            os.write(self._word, b"g" * self._owners)
        except OSError as error:
            raise HostError(f"the owner of the connections has ended: {error.strerror}") from None
        finally:
            os.close(self._word)

    def abort(self) -> None:
        """Let them close what is silent."""
        os.close(self._word)


class Spawner:
    """The parent's end. Make it before the process has threads."""

    def __init__(self) -> None:
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        try:
            self.pid = os.fork()
        except OSError as error:
            self._socket.close()
            there.close()
            raise from_oserror("starting the spawner", error) from None
        if self.pid == 0:
            try:
                self._socket.close()
                _Spawning(there).run()
            finally:
                os._exit(0)
        there.close()

    def close(self) -> None:
        """It ends when it keeps nothing any more."""
        self._socket.close()

    def inetd(self, command: Sequence[str], sockets: Sequence[socket.socket]) -> Gate:
        """A child for each socket, with it as standard input and output."""
        return self._send(_Order(tuple(command), False, len(sockets)), sockets, len(sockets))

    def systemd(self, command: Sequence[str], sockets: Sequence[socket.socket]) -> Gate:
        """One child for all of them, as sd_listen_fds(3) says."""
        return self._send(_Order(tuple(command), True, len(sockets)), sockets, 1)

    def keep(self, sockets: Sequence[socket.socket]) -> Gate:
        """Own them and do nothing, until their peers close."""
        return self._send(_Order((), False, len(sockets)), sockets, 1)

    def _send(self, order: _Order, sockets: Sequence[socket.socket], owners: int) -> Gate:
        waits, word = os.pipe2(os.O_CLOEXEC)
        status, failed = os.pipe2(os.O_CLOEXEC)
        descriptors = [sock.fileno() for sock in sockets]
        try:
            self._message(msgspec.msgpack.encode(order), [waits, failed])
            for start in range(0, len(descriptors), _AT_ONCE):
                self._message(b"+", descriptors[start : start + _AT_ONCE])
        except OSError as error:
            os.close(word)
            os.close(status)
            raise from_oserror("handing connections to the spawner", error) from None
        finally:
            os.close(waits)
            os.close(failed)
        return Gate(word, status, owners)

    def _message(self, data: bytes, descriptors: list[int]) -> None:
        rights = array.array("i", descriptors)
        self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


class _Spawning:
    """The other process."""

    def __init__(self, control: socket.socket) -> None:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):  # SIGCHLD: nobody waits for them
            signal.signal(number, signal.SIG_IGN)
        self._control = control
        self._order: tuple[_Order, int, int] | None = None
        self._sockets: list[int] = []
        self._poll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._watch(control.fileno(), select.EPOLLIN, self._read)

    def run(self) -> None:
        """Until the parent is gone and nothing is kept."""
        while self._calls:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._calls:
                    self._calls[descriptor]()

    def _watch(self, descriptor: int, events: int, call: Callable[[], None]) -> None:
        self._poll.register(descriptor, events)
        self._calls[descriptor] = call

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._calls[descriptor]
        os.close(descriptor)

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_AT_ONCE * array.array("i").itemsize)
        data, ancillary, _, _ = self._control.recvmsg(_LONGEST, space, socket.MSG_CMSG_CLOEXEC)
        if not data:
            self._forget(self._control.detach())
            _leave_streams()
            return
        descriptors = array.array("i")
        for _, _, rights in ancillary:
            descriptors.frombytes(rights[: len(rights) - len(rights) % descriptors.itemsize])
        if self._order is None:
            waits, status = descriptors
            self._order = msgspec.msgpack.decode(data, type=_Order), waits, status
        else:
            self._sockets += descriptors
        order, waits, status = self._order
        if len(self._sockets) == order.count:
            sockets, self._order, self._sockets = self._sockets, None, []
            self._carry_out(order, sockets, waits, status)

    def _carry_out(self, order: _Order, sockets: list[int], waits: int, status: int) -> None:
        if not order.command:
            os.close(status)
            self._watch(waits, select.EPOLLIN, lambda: self._opened(waits, sockets))
            return
        for those in [sockets] if order.systemd else [[each] for each in sockets]:
            try:
                child = os.fork()
            except OSError as error:
                os.write(status, (error.strerror or "fork failed").encode())
                continue
            if child == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                become(order.command, those, waits, status, systemd=order.systemd, session=True)
        for descriptor in (*sockets, waits, status):
            os.close(descriptor)

    def _opened(self, gate: int, sockets: list[int]) -> None:
        """The gate of kept sockets opened, or its keeper died."""
        said = os.read(gate, 1)
        self._forget(gate)
        for descriptor in sockets:
            if said or not _silent(descriptor):
                self._watch(descriptor, select.EPOLLRDHUP, lambda mine=descriptor: self._forget(mine))  # type: ignore[misc]
            else:
                os.close(descriptor)


def _leave_streams() -> None:
    """Whoever reads what the parent wrote need not wait for what is kept here."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _silent(descriptor: int) -> bool:
    sock = socket.socket(fileno=descriptor)
    try:
        with contextlib.suppress(OSError):
            return sockopt.in_repair(sock)
        return False
    finally:
        sock.detach()
