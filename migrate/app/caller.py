"""An application's side of the protocol, with I/O: one caller, what it asked for and what it brought."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING

from migrate.adopt.appproto import (
    MAX_MESSAGE,
    MAX_REASON,
    MAX_STATE,
    Arrive,
    Drop,
    Exchange,
    Go,
    Gone,
    Hello,
    Keep,
    LetGo,
    Message,
    Refuse,
    Services,
    Session,
    Side,
    State,
    Taken,
    state_messages,
)
from migrate.errors import Error, Refused, RemoteError
from migrate.fourtuple import FourTuple, unmapped
from migrate.kernel import sockopt
from migrate.tcpstate import TcpState

if TYPE_CHECKING:
    from migrate.app.plain import Application

__all__ = ["Arrival", "Caller", "Lent"]

_AT_ONCE = 64  # messages of one caller
_PATIENCE = 5  # seconds that a caller may take to read an answer
_ONE_DESCRIPTOR = socket.CMSG_LEN(array.array("i").itemsize)  # CMSG_SPACE has room for two


class _Ended(Exception):
    """The session cannot go on."""


class Lent:
    """A connection whose state was given and whose fate is open; ``sock`` is a duplicate of the program's, if known."""

    def __init__(self, connection: str, descriptor: int) -> None:
        self.connection, self.descriptor = connection, descriptor
        self.sock: socket.socket | None = None
        if descriptor >= 0:
            self.sock = _duplicate(descriptor)
            if self.sock is None or _name(self.sock) != FourTuple.parse(connection):
                self.close()
                raise Refused(f"descriptor {descriptor} is not that connection")

    def fate(self) -> type[Gone] | type[Keep] | None:
        """Whoever asked for it died: what had become of it? None while it is frozen."""
        assert self.sock is not None
        if sockopt.in_repair(self.sock):
            return None
        return Gone if sockopt.state(self.sock) == TcpState.CLOSED else Keep

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


class Arrival:
    """A socket that came, and its state once that is whole."""

    def __init__(self, sock: socket.socket, connection: str) -> None:
        self.sock, self.connection = sock, connection
        self.state = b""
        self.taken = False


class Caller:
    """Somebody who moves connections."""

    def __init__(self, application: Application, sock: socket.socket) -> None:
        self.sock = sock
        self.over = False
        self._application = application
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _PATIENCE, 0))  # struct timeval
        self._session = Session(Side.APPLICATION)
        self._lent: dict[int, Lent] = {}
        self._arrivals: dict[int, Arrival] = {}

    def hear(self) -> None:
        """All that waits, up to a bound; whoever breaks the protocol is not listened to any more."""
        try:
            for _ in range(_AT_ONCE):
                try:
                    message = self._next()
                except BlockingIOError:
                    return
                if message is not None:
                    self._understand(message)
        except _Ended:
            self.over = True

    def end(self) -> tuple[list[Arrival], list[Lent]]:
        """Close the session. What is active already, and what was lent: the program's. What is silent is closed."""
        self.sock.close()
        active = []
        for arrival in self._arrivals.values():
            if arrival.taken and not sockopt.in_repair(arrival.sock):
                active.append(arrival)
            else:
                arrival.sock.close()
        return active, list(self._lent.values())

    def _next(self) -> Message | None:
        descriptors: list[int] = []
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                MAX_MESSAGE + 1, _ONE_DESCRIPTOR, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
            for _, _, rights in ancillary:
                descriptors += array.array("i", rights)
            if not data:
                raise _Ended
            message = self._session.receive(data)
            if flags & socket.MSG_CTRUNC or len(descriptors) != isinstance(message, Arrive):
                raise _Ended
            if isinstance(message, Arrive):
                self._arrivals[message.id] = Arrival(socket.socket(fileno=descriptors[0]), message.connection)
                descriptors.clear()
            return message
        except BlockingIOError:
            raise
        except ConnectionResetError:  # it closed without having read all of ours; what it said is still to be read
            return None
        except (RemoteError, OSError):
            raise _Ended from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _understand(self, message: Message) -> None:
        application = self._application
        match message:
            case Hello():
                self._say(Services(tuple(application.services)))
            case LetGo():
                self._let_go(message)
            case Keep(id) | Gone(id) if lent := self._lent.pop(id, None):
                lent.close()
                application.tell(type(message), lent)
            case State(id, more=False):
                self._answer_arrival(id)
            case Go(id):
                application.arrived(self._arrivals.pop(id))
            case Drop(id):
                if arrival := self._arrivals.pop(id, None):
                    arrival.sock.close()
                if self._session.exchange(id) is Exchange.DROPPED:
                    self._say(Refuse(id, "it was dropped"))

    def _let_go(self, request: LetGo) -> None:
        try:
            lent, state = self._wanted(request)
        except BaseException as error:
            reason = error.what if isinstance(error, Error) else "the application failed"
            self._say(Refuse(request.id, reason[:MAX_REASON]))
            if not isinstance(error, Error):
                raise
            return
        self._lent[request.id] = lent
        for piece in state_messages(request.id, state):
            self._say(piece)

    def _wanted(self, request: LetGo) -> tuple[Lent, bytes]:
        """Raises Error for what does not leave."""
        application = self._application
        if application.on_let_go is None:
            raise Refused("this application keeps its connections")
        if not application.serves(FourTuple.parse(request.connection)):
            raise Refused("it is of no registered service")
        lent = Lent(request.connection, request.descriptor)
        try:
            state = application.on_let_go(request.connection, request.descriptor)
            if state is None:
                raise Refused("not now")
            if len(state) > MAX_STATE:
                raise Refused(f"its state is longer than {MAX_STATE} bytes")
        except BaseException:
            lent.close()
            raise
        return lent, state

    def _answer_arrival(self, id: int) -> None:
        arrival = self._arrivals[id]
        arrival.state = self._session.take_state(id)
        try:
            if self._application.on_arrival is None:
                raise Refused("this application takes no connections")
            if not self._application.serves(FourTuple.parse(arrival.connection)):
                raise Refused("it is of no registered service")
        except Error as error:
            self._arrivals.pop(id).sock.close()
            self._say(Refuse(id, error.what[:MAX_REASON]))
            return
        self._say(Taken(id))
        arrival.taken = True

    def _say(self, message: Message) -> None:
        try:
            self.sock.sendmsg([self._session.send(message)], (), socket.MSG_NOSIGNAL)
        except OSError:  # gone, or it does not read
            raise _Ended from None


def _duplicate(descriptor: int) -> socket.socket | None:
    """A TCP socket of our own for it, if it is one."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return None
    try:
        sock = socket.socket(fileno=duplicate)
    except OSError:  # no socket
        os.close(duplicate)
        return None
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type is socket.SOCK_STREAM:
        return sock
    sock.close()
    return None


def _name(sock: socket.socket) -> FourTuple | None:
    try:
        (local, local_port, *_), (remote, remote_port, *_) = sock.getsockname(), sock.getpeername()
    except OSError:  # not connected any more
        return None
    local, remote = (unmapped(socket.inet_pton(sock.family, address)) for address in (local, remote))
    return FourTuple(local, local_port, remote, remote_port)
