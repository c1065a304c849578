"""The application protocol: what an application and whoever moves its connections say to each other. No I/O.

What may live here: the messages, their bytes and limits, and the two tables of who may say what when. Both sides walk
the same tables (docs/app-protocol.md), so each of them knows at once what the other must not say. `Session.send` turns
a message into a datagram, `Session.receive` a datagram into a message; a message that the tables do not have raises,
changes nothing, and ends the session: its reader believes nothing of it any more.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from migrate.errors import RemoteError

__all__ = [
    "GREETING",
    "MAX_CHUNK",
    "MAX_MESSAGE",
    "MAX_REASON",
    "MAX_STATE",
    "TRANSITIONS",
    "VERSION",
    "Arrive",
    "Drop",
    "Exchange",
    "Go",
    "Gone",
    "Greeting",
    "Hello",
    "Keep",
    "LetGo",
    "Message",
    "On",
    "Refuse",
    "Service",
    "Services",
    "Session",
    "Side",
    "State",
    "Taken",
    "shown",
    "state_messages",
]

VERSION = 1
MAX_CHUNK = 1 << 15  # bytes of state in one datagram: a few of them fit into any socket buffer
MAX_MESSAGE = MAX_CHUNK + 1024  # bytes of a datagram
MAX_STATE = 1 << 20  # bytes of state of one connection
MAX_REASON = 200  # characters

T = TypeVar("T", bound=enum.Enum)

_Id = Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
_Version = Annotated[int, Meta(ge=1, le=0xFFFF)]
_Connection = Annotated[str, Meta(max_length=120)]
_Chunk = Annotated[bytes, Meta(max_length=MAX_CHUNK)]
_Word = Annotated[str, Meta(pattern="^[!-~]{1,64}$")]


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A msgpack array: the message's number, then its fields. Elements beyond those known are ignored."""


class Hello(Message, frozen=True, tag=0):
    """Asker: the first word, with the highest version it speaks."""

    version: _Version = VERSION


class Service(msgspec.Struct, array_like=True, frozen=True):
    """Connections that an application serves, by their local ends: ADDR:PORT, ADDR or ``*``."""

    name: _Word
    locals: Annotated[tuple[_Word, ...], Meta(min_length=1, max_length=8)]


class Services(Message, frozen=True, tag=1):
    """Application: the answer to Hello, with its version and what it serves. The lower version counts."""

    services: Annotated[tuple[Service, ...], Meta(max_length=32)]
    version: _Version = VERSION


class LetGo(Message, frozen=True, tag=2):
    """Asker: let go of a connection, and give its state within so many milliseconds.

    ``descriptor`` is the application's own number of it, or -1: not known.
    """

    id: _Id
    connection: _Connection
    descriptor: Annotated[int, Meta(ge=-1, le=0x7FFFFFFF)]
    milliseconds: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class State(Message, frozen=True, tag=3):
    """Either: the next piece of a state; ``more`` false: the last."""

    id: _Id
    more: bool
    data: _Chunk


class Refuse(Message, frozen=True, tag=4):
    """Application: no, and why."""

    id: _Id
    reason: Annotated[str, Meta(max_length=MAX_REASON)]


class Keep(Message, frozen=True, tag=5):
    """Asker: the connection stays; go on with it."""

    id: _Id


class Gone(Message, frozen=True, tag=6):
    """Asker: the connection lives elsewhere; close the descriptor."""

    id: _Id


class Arrive(Message, frozen=True, tag=7):
    """Asker: a connection, the one descriptor that comes with this datagram. It is silent; its state follows."""

    id: _Id
    connection: _Connection


class Taken(Message, frozen=True, tag=8):
    """Application: it has the socket and the state, and waits."""

    id: _Id


class Go(Message, frozen=True, tag=9):
    """Asker: the connection is active, serve it."""

    id: _Id


class Drop(Message, frozen=True, tag=10):
    """Asker: close it again, it is still silent."""

    id: _Id


class Side(enum.Enum):
    """Who speaks."""

    ASKER = enum.auto()  # an agent or a command, which moves connections
    APPLICATION = enum.auto()


class On(enum.Enum):
    """What is said. A State is one of two: there is more, or it is the last."""

    HELLO, SERVICES, LET_GO, STATE, LAST, REFUSE, KEEP, GONE, ARRIVE, TAKEN, GO, DROP = range(12)


class Greeting(enum.Enum):
    """How far a session has come."""

    NEW, GREETED, OPEN = range(3)


class Exchange(enum.Enum):
    """How far the talk about one connection has come."""

    NEW, ASKED, GIVEN, WITHDRAWN, OFFERED, WHOLE, TAKEN, DROPPED, OVER = range(9)


_A, _P = Side.ASKER, Side.APPLICATION

GREETING: Mapping[Greeting, Mapping[On, tuple[Side, Greeting]]] = {
    Greeting.NEW: {On.HELLO: (_A, Greeting.GREETED)},
    Greeting.GREETED: {On.SERVICES: (_P, Greeting.OPEN)},
    Greeting.OPEN: {},
}

# A Keep or a Drop may cross the application's answer on its way. The application answers all the same, so that each
# LetGo and each Arrive has exactly one answer and its number can be forgotten.
TRANSITIONS: Mapping[Exchange, Mapping[On, tuple[Side, Exchange]]] = {
    Exchange.NEW: {On.LET_GO: (_A, Exchange.ASKED), On.ARRIVE: (_A, Exchange.OFFERED)},
    Exchange.ASKED: {
        On.STATE: (_P, Exchange.ASKED),
        On.LAST: (_P, Exchange.GIVEN),
        On.REFUSE: (_P, Exchange.OVER),
        On.KEEP: (_A, Exchange.WITHDRAWN),
    },
    Exchange.GIVEN: {On.GONE: (_A, Exchange.OVER), On.KEEP: (_A, Exchange.OVER)},
    Exchange.WITHDRAWN: {
        On.STATE: (_P, Exchange.WITHDRAWN),
        On.LAST: (_P, Exchange.OVER),
        On.REFUSE: (_P, Exchange.OVER),
    },
    Exchange.OFFERED: {
        On.STATE: (_A, Exchange.OFFERED),
        On.LAST: (_A, Exchange.WHOLE),
        On.DROP: (_A, Exchange.OVER),
    },
    Exchange.WHOLE: {
        On.TAKEN: (_P, Exchange.TAKEN),
        On.REFUSE: (_P, Exchange.OVER),
        On.DROP: (_A, Exchange.DROPPED),
    },
    Exchange.TAKEN: {On.GO: (_A, Exchange.OVER), On.DROP: (_A, Exchange.OVER)},
    Exchange.DROPPED: {On.TAKEN: (_P, Exchange.OVER), On.REFUSE: (_P, Exchange.OVER)},
    Exchange.OVER: {},
}

_ON: Mapping[type[Message], On] = {
    Hello: On.HELLO,
    Services: On.SERVICES,
    LetGo: On.LET_GO,
    Refuse: On.REFUSE,
    Keep: On.KEEP,
    Gone: On.GONE,
    Arrive: On.ARRIVE,
    Taken: On.TAKEN,
    Go: On.GO,
    Drop: On.DROP,
}

AboutConnection = LetGo | State | Refuse | Keep | Gone | Arrive | Taken | Go | Drop
_decode = msgspec.msgpack.Decoder(Hello | Services | AboutConnection).decode
_encode = msgspec.msgpack.Encoder().encode


class Session:
    """One side's view of one connection of the unix socket. ``version`` counts once the greetings are over."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.greeting = Greeting.NEW
        self.version = VERSION
        self._other = _P if side is _A else _A
        self._exchanges: dict[int, Exchange] = {}
        self._latest = 0
        self._lengths: dict[int, int] = {}
        self._pieces: dict[int, bytearray] = {}

    def send(self, message: Message) -> bytes:
        """The datagram of what this side says. Raises RuntimeError if it must not say that now."""
        data = _encode(message)
        try:
            if len(data) > MAX_MESSAGE:
                raise RemoteError(f"a message of {len(data)} bytes")
            self._advance(message, self.side)
        except RemoteError as error:
            raise RuntimeError(f"this side would break the application protocol: {error}") from None
        return data

    def receive(self, data: bytes) -> Message:
        """What the other side says. Raises RemoteError, and nothing has changed, for what it must not say."""
        if len(data) > MAX_MESSAGE:
            raise RemoteError(f"a message longer than {MAX_MESSAGE} bytes")
        try:
            message: Message = _decode(data)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            raise RemoteError("bytes that are no message of the application protocol") from None
        kept = self._advance(message, self._other)
        if kept and isinstance(message, State):
            self._pieces.setdefault(message.id, bytearray()).extend(message.data)
        return message

    def exchange(self, id: int) -> Exchange:
        """How far the talk with that number has come; one that nobody knows, or knows any more, is OVER."""
        return self._exchanges.get(id, Exchange.OVER)

    @property
    def idle(self) -> bool:
        """Whether nothing is open but answers that nobody waits for any more."""
        return all(each in (Exchange.WITHDRAWN, Exchange.DROPPED) for each in self._exchanges.values())

    def take_state(self, id: int) -> bytes:
        """The state that came with this number, once: from then on it is the caller's."""
        return bytes(self._pieces.pop(id, b""))

    def _advance(self, message: Message, speaker: Side) -> bool:
        # Whether the message's content is of use: a state that nobody waits for any more is not.
        on = _ON[type(message)] if not isinstance(message, State) else On.STATE if message.more else On.LAST
        if isinstance(message, Hello | Services):
            self._greet(message, on, speaker)
            return False
        assert isinstance(message, AboutConnection)
        if self.greeting is not Greeting.OPEN:
            raise RemoteError(f"{on.name} before the greetings")
        fresh = message.id > self._latest
        before = Exchange.NEW if fresh else self.exchange(message.id)
        after = _step(TRANSITIONS[before].get(on), on, before, speaker)
        if isinstance(message, State):
            length = self._lengths.get(message.id, 0) + len(message.data)
            if length > MAX_STATE:
                raise RemoteError(f"a state longer than {MAX_STATE} bytes")
            self._lengths[message.id] = length
        if fresh:
            self._latest = message.id
        useless = after in (Exchange.OVER, Exchange.WITHDRAWN, Exchange.DROPPED)
        if useless:
            self._pieces.pop(message.id, None)
        if after is Exchange.OVER:
            self._exchanges.pop(message.id, None)
            self._lengths.pop(message.id, None)
        else:
            self._exchanges[message.id] = after
        return not useless

    def _greet(self, message: Hello | Services, on: On, speaker: Side) -> None:
        self.greeting = _step(GREETING[self.greeting].get(on), on, self.greeting, speaker)
        self.version = min(self.version, message.version)


def _step(row: tuple[Side, T] | None, on: On, before: T, speaker: Side) -> T:
    if row is None or row[0] is not speaker:
        raise RemoteError(f"{on.name} in state {before.name}")
    return row[1]


def state_messages(id: int, state: bytes) -> Iterator[State]:
    """The State messages that carry a state: at least one."""
    for start in range(0, max(len(state), 1), MAX_CHUNK):
        yield State(id, start + MAX_CHUNK < len(state), state[start : start + MAX_CHUNK])


def shown(reason: str) -> str:
    """What an application said, fit for a terminal and a log."""
    return "".join(letter if letter.isprintable() else "?" for letter in reason) or "no reason given"
