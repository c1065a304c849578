"""Taking part, for programs with plain sockets: connections leave with their state, and arrive with it.

::

    app = Application("/run/shop/tcpmig.sock", on_arrival=arrived, on_let_go=let_go, on_gone=gone, on_kept=kept)
    app.register("shop", "10.0.0.100:8080")
    poll.register(app, EPOLLIN)         # in the program's own loop: it has a fileno()
    ...
    app.process()                       # when it is readable: calls the functions above, and returns

Everything happens inside `Application.process`, so in the program's own thread: while it runs, no request is half
done. The functions:

``on_let_go(connection, fd) -> bytes | None``
    Between two requests: what must be known to go on elsewhere, at most MAX_STATE bytes; from then on the program
    leaves the descriptor alone. None, or `migrate.errors.Refused` raised: the connection stays.
``on_gone(connection, fd)``
    It lives elsewhere: close the descriptor, which tells nobody.
``on_kept(connection, fd)``
    It stayed after all: go on with it.
``on_arrival(sock, state)``
    A connection with its state: a blocking socket, the program's own from now on.

``connection`` is "LOCAL,REMOTE", ``fd`` the program's own descriptor or -1 if whoever asks does not know it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

import msgspec

from migrate.adopt.appproto import MAX_STATE, Gone, Keep, Service, Services
from migrate.adopt.sockets import check_directory, peer_of
from migrate.adopt.unix import serves
from migrate.app.caller import Arrival, Caller, Lent
from migrate.errors import Conflict, UsageError, from_oserror
from migrate.fourtuple import FourTuple, parse_endpoint

__all__ = ["MAX_STATE", "Application"]

_BACKLOG = 16

OnLetGo = Callable[[str, int], bytes | None]
OnFate = Callable[[str, int], object]
OnArrival = Callable[[socket.socket, bytes], object]


class Application:
    """Listens at ``path``, in a directory that it makes if it must (0700). Root, this user and ``users`` may call.

    Without ``on_let_go`` nothing leaves, without ``on_arrival`` nothing arrives. Raises UsageError, PrivilegeError,
    Conflict if another process listens there, KernelError. Not for several threads at once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        on_arrival: OnArrival | None = None,
        on_let_go: OnLetGo | None = None,
        on_gone: OnFate | None = None,
        on_kept: OnFate | None = None,
        users: Collection[int] = (),
    ) -> None:
        self.path = os.fspath(path)
        self.users = {0, os.geteuid(), *users}
        self.services: list[Service] = []
        self.on_arrival, self.on_let_go, self.on_gone, self.on_kept = on_arrival, on_let_go, on_gone, on_kept
        self._callers: dict[int, Caller] = {}
        self._stranded: dict[int, Lent] = {}
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(_listen(self.path))
            self._poll = stack.enter_context(select.epoll())
            self._poll.register(self._listener, select.EPOLLIN)
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For poll: readable when `process` has something to do."""
        return self._poll.fileno()

    def register(self, service: str, *locals: str) -> None:
        """Connections of these local ends (``ADDR:PORT``, ``ADDR``, ``*``) may leave and arrive. Raises UsageError."""
        for local in locals:
            parse_endpoint(local)
        added = [*self.services, Service(service, locals)]
        try:
            msgspec.convert(msgspec.to_builtins(Services(tuple(added))), Services)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"service {service!r}: {error}",
                hint="1 to 64 printable letters; 1 to 8 local ends; at most 32 services",
            ) from None
        self.services = added

    def process(self, timeout: float = 0.0) -> None:
        """Hear what callers say. Waits for the first word ``timeout`` seconds at most, and by default not at all.

        What the program's functions raise comes out here; a connection that one of them failed to give stays.
        """
        for descriptor, _ in self._poll.poll(timeout):
            if descriptor == self._listener.fileno():
                self._accept()
            elif caller := self._callers.get(descriptor):
                caller.hear()
                if caller.over:
                    self._forget(caller)
        for descriptor, lent in list(self._stranded.items()):
            if (fate := lent.fate()) is not None:
                del self._stranded[descriptor]
                self._poll.unregister(descriptor)
                lent.close()
                self.tell(fate, lent)

    def close(self) -> None:
        """Listen no more. What was lent and is undecided stays lent: nobody tells any more how it ended."""
        for caller in list(self._callers.values()):
            self._forget(caller)
        for lent in self._stranded.values():
            lent.close()
        self._stranded.clear()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._resources.close()

    def serves(self, four_tuple: FourTuple) -> bool:
        """Whether it is of a registered service."""
        return any(serves(service.locals, four_tuple) for service in self.services)

    def tell(self, fate: type[Gone] | type[Keep], lent: Lent) -> None:
        """How it ended with a connection that was lent."""
        call = self.on_gone if fate is Gone else self.on_kept
        if call is not None:
            call(lent.connection, lent.descriptor)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor left: the next one may have more luck
            return
        if peer_of(sock)[1] not in self.users:
            sock.close()
            return
        self._callers[sock.fileno()] = Caller(self, sock)
        self._poll.register(sock, select.EPOLLIN)

    def _forget(self, caller: Caller) -> None:
        del self._callers[caller.sock.fileno()]
        self._poll.unregister(caller.sock)
        arrived, stranded = caller.end()
        for lent in stranded:
            if lent.sock is None:
                self.tell(Keep, lent)
            else:
                self._stranded[lent.sock.fileno()] = lent
                self._poll.register(lent.sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        for arrival in arrived:
            self.arrived(arrival)

    def arrived(self, arrival: Arrival) -> None:
        """An active connection, for the program."""
        if self.on_arrival is not None:
            self.on_arrival(arrival.sock, arrival.state)


def _listen(path: str) -> socket.socket:
    """A socket at ``path``; one that an ended process left there is removed."""
    directory = Path(path).parent
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_oserror(
            f"making {str(directory)!r}", error, hint="its parent must exist and let this user in"
        ) from None
    check_directory(path, {os.geteuid()})
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        if _abandoned(path):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o666)  # the directory keeps others away; an agent that is not root has to write here
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"another process listens at {path}", hint="one path for each process") from None
        raise from_oserror(f"listening at {path}", error, hint="may this user write there?") from None
    return listener


def _abandoned(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
