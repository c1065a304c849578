"""A running application at its unix socket: it takes connections that arrive, and gives its state of those that leave.

The application listens (`migrate.app.plain`, docs/app-protocol.md), and whoever moves connections connects: so an agent
that was killed finds it again at once, an application that ended is noticed before anything is touched, and nobody but
those that the operator named by their path can send us anything. What it sends is believed as little as a peer's.

::

    with Application(path) as application:
        answers = application.ask({four_tuple: descriptor})     # its state, as bytes, or why the connection stays
        ...                                                     # hold, dump, offer
        application.gone([four_tuple])                          # or .keep(); leaving the block keeps the undecided

Every call has a deadline and none waits beyond it. Not for several threads at once; descriptors that an application
sends are closed by the kernel, because no room is given for them.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Self

from migrate.adopt.appproto import (
    MAX_MESSAGE,
    Arrive,
    Drop,
    Exchange,
    Go,
    Gone,
    Greeting,
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
    shown,
    state_messages,
)
from migrate.adopt.sockets import HINT, check_directory, process_of
from migrate.errors import Error, HostError, Refused, RemoteError, UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.restore import Restored

__all__ = ["ANSWER", "AppAdoption", "Application", "UnixAdopter", "serves"]

ANSWER = 2.0  # seconds that an application has for its answers, unless told otherwise
_PARTING, _EACH = 0.2, 0.002  # seconds to get rid of last words, and for each of them


def serves(locals: Iterable[str], four_tuple: FourTuple) -> bool:
    """Whether one of these local ends (``ADDR:PORT``, ``ADDR``, ``*:PORT``, ``*``) is the connection's."""
    for text in locals:
        with contextlib.suppress(UsageError):  # an application's words
            address, port = parse_endpoint(text)
            if address in (b"", four_tuple.local) and port in (None, four_tuple.local_port):
                return True
    return False


class Application:
    """A session with the application that listens at ``path``. A context manager; leaving it keeps what is undecided.

    It must run as root, as this process's user, or as one of ``users`` (numbers). ``pid`` is its process: the owner of
    the connections that it can be asked for. ``services`` is what it registered, local ends by name.

    Raises HostError if nobody is there or it does not greet within ``seconds``, PrivilegeError for a stranger,
    RemoteError for one that does not speak the protocol, NotFound and UsageError for a path that cannot be.
    """

    def __init__(self, path: str | os.PathLike[str], *, users: Collection[int] = (), seconds: float = ANSWER) -> None:
        self.path = os.fspath(path)
        self._users = {0, os.geteuid(), *users}
        self._session = Session(Side.ASKER)
        self._waiting: deque[tuple[Message, int | None]] = deque()  # with a descriptor of ours to go along
        self._head: tuple[bytes, int | None] | None = None  # the one being sent
        self._ids: dict[FourTuple, int] = {}  # of what was asked for and is undecided
        self._answers: dict[int, bytes | Error] = {}
        self._pending: set[int] = set()  # what an answer is awaited for
        self._latest = 0
        self._leaves = False  # with the last decision
        self._over = HostError("the session is over")
        self._why: Error | None = None  # the session is over
        self.services: Mapping[str, tuple[str, ...]] = {}
        check_directory(self.path, self._users)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = self._connect(seconds)
            self._say(Hello())
            self._pump(lambda: self._session.greeting is Greeting.OPEN, time.monotonic() + seconds)
            if self._why is not None:
                raise self._why
            if self._session.greeting is not Greeting.OPEN:
                raise HostError(f"the application at {self.path} does not answer", hint=HINT)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, seconds: float) -> int:
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            raise HostError(f"no application at {self.path}: {error.strerror or error}", hint=HINT) from None
        self._socket.setblocking(False)
        return process_of(self._socket, self.path, self._users)

    def serves(self, four_tuple: FourTuple) -> bool:
        """Whether it registered a service of that local end."""
        return any(serves(locals, four_tuple) for locals in self.services.values())

    def ask(self, connections: Mapping[FourTuple, int], seconds: float = ANSWER) -> dict[FourTuple, bytes | Error]:
        """Ask it to let these go; the values are its own descriptor numbers, or -1: its state of each, or why it stays.

        Where there is a state the application leaves the connection alone until `gone` or `keep`; the others are its
        own again already. Ask before the connections are held: it costs the peer nothing. Never raises.
        """
        ids = {four_tuple: self._new_id() for four_tuple in connections}
        deadline = time.monotonic() + seconds
        for four_tuple, id in ids.items():
            self._say(LetGo(id, str(four_tuple), connections[four_tuple], int(seconds * 1000)))
        self._await_answers(deadline)
        answers = {four_tuple: self._answer(id) for four_tuple, id in ids.items()}
        late = [id for id in ids.values() if self._session.exchange(id) is Exchange.ASKED]
        self._part([Keep(id) for id in late])
        if self._why is not None:
            return dict.fromkeys(connections, Refused(self._why.what))
        self._ids |= {each: ids[each] for each, answer in answers.items() if isinstance(answer, bytes)}
        return answers

    def gone(self, connections: Iterable[FourTuple]) -> None:
        """These live elsewhere: it closes them. Those that it was not asked for are passed over. Never raises."""
        self._part([Gone(self._ids.pop(each)) for each in connections if each in self._ids])

    def keep(self, connections: Iterable[FourTuple]) -> None:
        """These stay, and are thawed: it goes on with them. Otherwise as `gone`."""
        self._part([Keep(self._ids.pop(each)) for each in connections if each in self._ids])

    def adopt(self, sockets: Sequence[socket.socket], seconds: float = ANSWER) -> list[AppAdoption]:
        """Offer it these silent restored sockets, each with its record's state. Raises Refused for another socket.

        One that it does not take in time is refused: its adoption's ``refusal`` says why, and `go` raises that.
        """
        offers = []
        for sock in sockets:
            if not isinstance(sock, Restored) or sock.record is None:
                raise Refused("only a silent restored socket can be handed to an application")
            offers.append((sock, sock.record, self._new_id()))
        deadline = time.monotonic() + seconds
        for sock, record, id in offers:
            self._say(Arrive(id, str(record.four_tuple)), sock.fileno())
            for piece in state_messages(id, record.app):
                self._say(piece)
        self._await_answers(deadline)
        adoptions = [AppAdoption(self, id, self._answer(id)) for _, _, id in offers]
        self._part([Drop(id) for _, _, id in offers if self._session.exchange(id) is Exchange.WHOLE])
        return adoptions

    def leave(self) -> None:
        """Close the session when the last adoption is decided."""
        self._leaves = True
        self._part([])

    def decide(self, message: Go | Drop) -> None:
        """The last word about an adoption. Raises HostError if the application cannot hear it any more."""
        if self._why is None:
            self._part([message])
        if self._why is not None and self._why is not self._over:
            raise HostError(self._why.what)

    def close(self) -> None:
        """End the session. What it was asked for and is undecided stays with it."""
        self.keep(list(self._ids))
        self._end(self._over)

    def _new_id(self) -> int:
        self._latest += 1
        self._pending.add(self._latest)
        return self._latest

    def _answer(self, id: int) -> bytes | Error:
        self._pending.discard(id)
        late = Refused(f"the application at {self.path} did not answer in time")
        return self._answers.pop(id, self._why or late)

    def _say(self, message: Message, descriptor: int | None = None) -> None:
        self._waiting.append((message, descriptor))

    def _part(self, messages: Iterable[Message]) -> None:
        """Say these without waiting for an answer. An application that does not listen has had its chance."""
        self._waiting.extend((message, None) for message in messages)
        self._pump(lambda: True, time.monotonic() + _PARTING + _EACH * len(self._waiting))
        self._end_if_deaf()
        if self._leaves and self._session.idle:
            self._end(self._over)

    def _await_answers(self, deadline: float) -> None:
        self._pump(lambda: self._answers.keys() >= self._pending, deadline)
        self._end_if_deaf()

    def _end_if_deaf(self) -> None:
        if self._sending:
            self._end(HostError(f"the application at {self.path} does not listen"))

    @property
    def _sending(self) -> bool:
        return bool(self._waiting or self._head)

    def _pump(self, done: Callable[[], bool], deadline: float) -> None:
        """Send and receive until all is said and ``done``, the deadline is over, or the session."""
        if self._why is not None:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while self._why is None and (self._sending or not done()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            poll.modify(self._socket, select.POLLIN | (select.POLLOUT if self._sending else 0))
            for _, events in poll.poll(left * 1000):
                try:
                    if events & ~select.POLLOUT:
                        self._hear()
                    if events & select.POLLOUT:
                        self._send()
                except BlockingIOError:
                    continue
                except RemoteError as error:
                    self._end(RemoteError(f"the application at {self.path} broke the protocol: {error}"))
                except OSError as error:
                    self._end(HostError(f"the application at {self.path} is gone: {error.strerror}"))
                if self._why is not None:
                    break

    def _send(self) -> None:
        if self._head is None:
            message, descriptor = self._waiting.popleft()
            self._head = self._session.send(message), descriptor
        data, descriptor = self._head
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        self._head = None

    def _hear(self) -> None:
        data, _, flags, _ = self._socket.recvmsg(MAX_MESSAGE + 1)  # no room for descriptors: the kernel closes them
        if not data:
            self._end(HostError(f"the application at {self.path} closed the session"))
            return
        if flags & socket.MSG_CTRUNC:
            raise RemoteError("a descriptor that nobody asked for")
        message = self._session.receive(data)
        match message:
            case State(id, more=False) if self._session.exchange(id) is Exchange.GIVEN:
                self._answers[id] = self._session.take_state(id)
            case Taken(id) if self._session.exchange(id) is Exchange.TAKEN:
                self._answers[id] = b""
            case Refuse(id, reason) if id in self._pending:
                self._answers[id] = Refused(f"the application refuses: {shown(reason)}")
            case Services(services):
                self.services = {service.name: service.locals for service in services}

    def _end(self, why: Error) -> None:
        if self._why is None:
            self._why = why
            self._waiting.clear()
            self._head = None
            self._ids.clear()
            self._socket.close()


class AppAdoption:
    """One silent connection at a running application: a `migrate.adopt.Adoption`."""

    def __init__(self, application: Application, id: int, answer: bytes | Error) -> None:
        self.refusal = answer if isinstance(answer, Error) else None
        self._application = application
        self._id = id

    def go(self) -> None:
        """The connection is active: the application may serve it. Raises HostError if it did not take it, or died."""
        if self.refusal is not None:
            raise HostError(self.refusal.what, hint=self.refusal.hint)
        self._application.decide(Go(self._id))

    def abort(self) -> None:
        """The application closes it, silently."""
        if self.refusal is None:
            with contextlib.suppress(HostError):
                self._application.decide(Drop(self._id))


class UnixAdopter:
    """The application that listens at ``path`` takes connections, each with its state."""

    def __init__(self, path: str | os.PathLike[str], *, users: Collection[int] = (), seconds: float = ANSWER) -> None:
        self._path, self._users, self._seconds = path, users, seconds

    def check(self) -> None:
        """Raise HostError, PrivilegeError, NotFound or RemoteError if it would not take any."""
        self._session().close()

    def adopt(self, sockets: Sequence[socket.socket]) -> list[AppAdoption]:
        """Offer them; the session lasts as long as the adoptions that come back."""
        session = self._session()
        try:
            adoptions = session.adopt(sockets, self._seconds)
        except BaseException:
            session.close()
            raise
        session.leave()
        return adoptions

    def _session(self) -> Application:
        return Application(self._path, users=self._users, seconds=self._seconds)
