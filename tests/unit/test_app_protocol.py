"""The application protocol: its tables, its parser, and what neither side may suffer from the other."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.adopt import appproto
from migrate.adopt.appproto import (
    GREETING,
    MAX_CHUNK,
    MAX_MESSAGE,
    MAX_STATE,
    TRANSITIONS,
    Arrive,
    Drop,
    Exchange,
    Go,
    Gone,
    Hello,
    Keep,
    LetGo,
    Message,
    On,
    Refuse,
    Service,
    Services,
    Session,
    Side,
    State,
    Taken,
    state_messages,
)
from migrate.adopt.unix import Application, UnixAdopter, serves
from migrate.app import plain
from migrate.errors import Conflict, Error, HostError, NotFound, PrivilegeError, Refused, RemoteError, UsageError
from migrate.fourtuple import FourTuple
from tests.waiting import until

CONNECTION = "10.0.0.1:80,10.0.0.9:4000"
FOUR_TUPLE = FourTuple.parse(CONNECTION)
SAID: dict[On, Message] = {
    On.LET_GO: LetGo(1, CONNECTION, -1, 100),
    On.STATE: State(1, True, b"s"),
    On.LAST: State(1, False, b"s"),
    On.REFUSE: Refuse(1, "no"),
    On.KEEP: Keep(1),
    On.GONE: Gone(1),
    On.ARRIVE: Arrive(1, CONNECTION),
    On.TAKEN: Taken(1),
    On.GO: Go(1),
    On.DROP: Drop(1),
}
WAYS: dict[Exchange, tuple[On, ...]] = {  # how to come to each state
    Exchange.NEW: (),
    Exchange.ASKED: (On.LET_GO,),
    Exchange.GIVEN: (On.LET_GO, On.LAST),
    Exchange.WITHDRAWN: (On.LET_GO, On.KEEP),
    Exchange.OFFERED: (On.ARRIVE,),
    Exchange.WHOLE: (On.ARRIVE, On.LAST),
    Exchange.TAKEN: (On.ARRIVE, On.LAST, On.TAKEN),
    Exchange.DROPPED: (On.ARRIVE, On.LAST, On.DROP),
    Exchange.OVER: (On.LET_GO, On.REFUSE),
}


def pair() -> dict[Side, Session]:
    """Both sides after the greetings."""
    sides = {side: Session(side) for side in Side}
    say(sides, Side.ASKER, Hello())
    say(sides, Side.APPLICATION, Services(()))
    return sides


def say(sides: dict[Side, Session], speaker: Side, message: Message) -> None:
    (listener,) = set(Side) - {speaker}
    assert sides[listener].receive(sides[speaker].send(message)) == message


def reach(state: Exchange) -> dict[Side, Session]:
    sides, now = pair(), Exchange.NEW
    for on in WAYS[state]:
        speaker, now = TRANSITIONS[now][on]
        say(sides, speaker, SAID[on])
    assert now is state
    return sides


@pytest.mark.parametrize("state", Exchange)
@pytest.mark.parametrize("on", SAID)
@pytest.mark.parametrize("speaker", Side)
def test_what_the_table_has_is_done_and_all_else_refused(state: Exchange, on: On, speaker: Side) -> None:
    sides = reach(state)
    (listener,) = set(Side) - {speaker}
    allowed = TRANSITIONS[state].get(on)
    data = msgspec.msgpack.encode(SAID[on])
    if allowed and allowed[0] is speaker:
        say(sides, speaker, SAID[on])
        assert {side.exchange(1) for side in sides.values()} == {allowed[1]}
        return
    with pytest.raises(RemoteError):
        sides[listener].receive(data)
    with pytest.raises(RuntimeError):
        sides[speaker].send(SAID[on])
    expected = Exchange.OVER if state is Exchange.NEW else state
    assert {side.exchange(1) for side in sides.values()} == {expected}


def test_every_state_can_be_reached_and_left_and_speaks_one_language() -> None:
    assert set(TRANSITIONS) == set(Exchange)
    reached = {after for row in TRANSITIONS.values() for _, after in row.values()}
    assert reached | {Exchange.NEW} == set(Exchange)
    assert [state for state, row in TRANSITIONS.items() if not row] == [Exchange.OVER]
    assert {on for row in (*TRANSITIONS.values(), *GREETING.values()) for on in row} == set(On)


def test_the_documentation_has_the_same_tables() -> None:
    text = (Path(__file__).parents[2] / "docs" / "app-protocol.md").read_text()
    rows = [
        f"| {state.name} | {on.name} | {speaker.name.lower()} | {after.name} |"
        for state, row in TRANSITIONS.items()
        for on, (speaker, after) in row.items()
    ]
    assert "\n".join(rows) + "\n\n" in text
    for message in (Hello(), Services(()), *SAID.values()):
        assert f"\n| {message.__struct_config__.tag} | {type(message).__name__} |" in text
    for limit in (MAX_MESSAGE, MAX_CHUNK, MAX_STATE):
        assert f"| {limit:,} bytes" in text


@pytest.mark.parametrize("message", SAID.values(), ids=lambda message: type(message).__name__)
def test_nothing_is_said_before_the_greetings(message: Message) -> None:
    with pytest.raises(RemoteError, match="before the greetings"):
        Session(Side.APPLICATION).receive(msgspec.msgpack.encode(message))


def test_the_lower_version_counts_and_more_elements_are_ignored() -> None:
    application = Session(Side.APPLICATION)
    application.receive(msgspec.msgpack.encode([0, 7, "new", {"a": 1}]))
    assert application.version == appproto.VERSION
    with pytest.raises(RemoteError):
        Session(Side.APPLICATION).receive(msgspec.msgpack.encode([0, 0]))


@pytest.mark.parametrize("length", [0, 1, MAX_CHUNK, MAX_CHUNK + 1, MAX_STATE])
def test_a_state_goes_through_in_pieces(length: int) -> None:
    sides, state = reach(Exchange.ASKED), os.urandom(length)
    for piece in state_messages(1, state):
        say(sides, Side.APPLICATION, piece)
    assert sides[Side.ASKER].take_state(1) == state


def test_a_state_that_is_too_long_ends_it() -> None:
    sides = reach(Exchange.ASKED)
    for piece in list(state_messages(1, bytes(MAX_STATE + 1)))[:-1]:
        say(sides, Side.APPLICATION, State(1, True, piece.data))
    with pytest.raises(RemoteError, match="longer"):
        sides[Side.ASKER].receive(msgspec.msgpack.encode(State(1, False, b"xx")))


def test_a_state_that_came_too_late_takes_no_memory() -> None:
    sides = reach(Exchange.ASKED)
    say(sides, Side.APPLICATION, SAID[On.STATE])
    say(sides, Side.ASKER, Keep(1))
    say(sides, Side.APPLICATION, SAID[On.LAST])
    assert sides[Side.ASKER].take_state(1) == b""


def test_a_number_is_used_once() -> None:
    sides = reach(Exchange.OVER)
    with pytest.raises(RemoteError):
        sides[Side.APPLICATION].receive(msgspec.msgpack.encode(LetGo(1, CONNECTION, -1, 0)))
    say(sides, Side.ASKER, LetGo(2, CONNECTION, -1, 0))


ELEMENT = st.integers(-9, 99) | st.binary(max_size=9) | st.text(max_size=9) | st.booleans()


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=64) | st.builds(msgspec.msgpack.encode, st.lists(ELEMENT, max_size=6)),
    st.sampled_from(list(Exchange)),
)
def test_bytes_give_a_message_or_an_error_that_changes_nothing(data: bytes, state: Exchange) -> None:
    for session in reach(state).values():
        before = session.exchange(1)
        try:
            session.receive(data)
        except RemoteError:
            assert session.exchange(1) is before


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 30000, bytes(MAX_MESSAGE + 1), b"\x93\x04\x01\xa1\xff"])
def test_the_worst_bytes(data: bytes) -> None:
    with pytest.raises(RemoteError):
        reach(Exchange.ASKED)[Side.ASKER].receive(data)


def test_which_connections_a_service_means() -> None:
    assert serves(["10.0.0.2:80", "10.0.0.1:80"], FOUR_TUPLE)
    assert serves(["*"], FOUR_TUPLE)
    assert serves(["10.0.0.1"], FOUR_TUPLE)
    assert not serves(["*:81", "nonsense::", "[fd00::1]:80"], FOUR_TUPLE)


# An asker and applications that mean no good.

Act = Callable[[socket.socket], object]
GREET = msgspec.msgpack.encode(Services((Service("s", ("*",)),)))


@contextlib.contextmanager
def application(directory: Path, *acts: Act) -> Iterator[str]:
    """An application that does these to one caller, in a thread, and then closes."""
    path = directory / "app" / "socket"
    path.parent.mkdir(mode=0o700)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            caller, _ = listener.accept()
            with caller:
                caller.settimeout(5)
                for act in acts:
                    act(caller)
        except BaseException as error:
            failures.append(error)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(5)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield str(path)
        finally:
            thread.join()
    assert not failures


def read(sock: socket.socket) -> bytes:
    return sock.recv(MAX_MESSAGE)


def write(data: bytes) -> Act:
    return lambda sock: sock.send(data)


def read_to_the_end(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(MAX_MESSAGE):
            pass


def with_descriptors(data: bytes, count: int) -> Act:
    """Sends the writing end of a pipe, and waits until nobody has it any more."""

    def act(sock: socket.socket) -> None:
        reads, writes = os.pipe()
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writes] * count))])
        os.close(writes)
        poll = select.poll()
        poll.register(reads, select.POLLHUP)
        assert poll.poll(5000), "the descriptor that came unasked was not closed"
        os.close(reads)

    return act


def piece(more: bool, length: int, id: int = 1) -> bytes:
    return msgspec.msgpack.encode(State(id, more, bytes(length)))


HOSTILE: dict[str, tuple[Act, ...]] = {
    "garbage": (read, write(b"\xc1garbage"), read_to_the_end),
    "oversized": (read, write(bytes(MAX_MESSAGE * 2)), read_to_the_end),
    "endless": (read, *[write(piece(True, MAX_CHUNK))] * 33, read_to_the_end),
    "of nothing asked": (read, write(piece(False, 1, id=9)), read_to_the_end),
    "disappears": (read,),
    "disappears at half": (read, write(piece(True, 9))),
    "silent": (read, read_to_the_end),
    "with descriptors": (read, with_descriptors(piece(False, 9), 200)),
    "greets twice": (read, write(GREET), read_to_the_end),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_the_asker_goes_on_whatever_an_application_does(how: str, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with application(tmp_path, read, write(GREET), *HOSTILE[how]) as path, Application(path) as there:
        assert there.serves(FOUR_TUPLE)
        answer = there.ask({FOUR_TUPLE: 5}, 0.3)[FOUR_TUPLE]
        assert isinstance(answer, Refused)
        there.gone([FOUR_TUPLE])
        there.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "acts",
    [(read,), (read, write(b"x")), (read, with_descriptors(GREET, 3)), (read, read_to_the_end), (write(GREET), read)],
    ids=["closes", "garbage", "descriptors", "silent", "speaks first"],
)
def test_a_bad_greeting_is_no_session(acts: tuple[Act, ...], tmp_path: Path) -> None:
    with application(tmp_path, *acts) as path, contextlib.suppress(AssertionError):
        if acts[0] is read:
            with pytest.raises((HostError, RemoteError)):
                UnixAdopter(path, seconds=0.3).check()
        else:  # the words crossed: whether it was too early cannot be told
            with contextlib.suppress(Error):
                UnixAdopter(path, seconds=0.3).check()


def test_one_that_does_not_read_is_left(tmp_path: Path) -> None:
    release = threading.Event()
    with (
        application(tmp_path, read, write(GREET), lambda _: release.wait(10)) as path,
        Application(path) as there,
    ):
        many = {FourTuple(FOUR_TUPLE.local, 80, FOUR_TUPLE.remote, port): -1 for port in range(1, 5000)}
        answers = there.ask(many, 0.3)
        release.set()
    assert {type(answer) for answer in answers.values()} == {Refused}
    assert {answer.what for answer in answers.values() if isinstance(answer, Refused)} == {
        f"the application at {path} does not listen"
    }


def test_one_that_is_late_is_told_that_the_connection_stays(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def listen(sock: socket.socket) -> None:
        heard.extend([sock.recv(MAX_MESSAGE), sock.recv(MAX_MESSAGE)])
        sock.send(piece(False, 9))
        heard.append(sock.recv(MAX_MESSAGE))

    with application(tmp_path, read, write(GREET), listen) as path, Application(path) as there:
        assert isinstance(there.ask({FOUR_TUPLE: 5}, 0.2)[FOUR_TUPLE], Refused)
        until(lambda: len(heard) == 2)
        another = FourTuple(FOUR_TUPLE.local, 80, FOUR_TUPLE.remote, 4001)
        assert isinstance(there.ask({another: 5}, 0.2)[another], Refused)
    assert [msgspec.msgpack.decode(each)[:2] for each in heard] == [[2, 1], [5, 1], [2, 2]]


def test_a_stranger_is_refused_by_both(tmp_path: Path) -> None:
    path = tmp_path / "app" / "socket"
    path.parent.mkdir(mode=0o700)
    os.chown(path.parent, 65534, 65534)
    with pytest.raises(PrivilegeError, match="open to other users"):
        UnixAdopter(path).check()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        as_nobody(listener.listen)
        with pytest.raises(PrivilegeError, match="open to other users"):
            UnixAdopter(path).check()
        os.chown(path.parent, 0, 0)
        with pytest.raises(PrivilegeError, match="user 65534"):
            UnixAdopter(path).check()
    with tempfile.TemporaryDirectory() as open_to_all, plain.Application(f"{open_to_all}/ours/socket") as ours:
        for each in (open_to_all, f"{open_to_all}/ours", ours.path):
            os.chmod(each, 0o777)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            as_nobody(lambda: caller.connect(ours.path))
            ours.process(5)
            assert caller.recv(9) == b""


def as_nobody(call: Callable[[], object]) -> None:
    """With another effective user: what SO_PEERCRED tells is that of the moment of listen() or connect()."""
    os.seteuid(65534)
    try:
        call()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("path", "error"),
    [("/nowhere/at/all", NotFound), ("/" + "x" * 200, UsageError), ("/etc/passwd/x", NotFound), ("/tmp/x", Error)],
)
def test_paths_that_cannot_be(path: str, error: type[Error]) -> None:
    with pytest.raises(error):
        UnixAdopter(path).check()


# The application's side.


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[plain.Application]:
    with plain.Application(tmp_path / "app" / "socket") as made:
        made.register("s", "*")
        yield made


@contextlib.contextmanager
def served(ours: plain.Application) -> Iterator[None]:
    """The application's loop, in a thread."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            ours.process(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("gives", "expected"),
    [
        (lambda *_: b"state", b"state"),
        (lambda *_: bytes(MAX_STATE), bytes(MAX_STATE)),
        (lambda *_: bytes(MAX_STATE + 1), "longer"),
        (lambda *_: None, "not now"),
        (None, "keeps its connections"),
    ],
    ids=["short", "longest", "too long", "refuses", "never"],
)
def test_asking(ours: plain.Application, gives: plain.OnLetGo | None, expected: bytes | str) -> None:
    told: list[tuple[str, str]] = []
    ours.on_let_go = gives
    ours.on_gone = lambda connection, _: told.append(("gone", connection))
    ours.on_kept = lambda connection, _: told.append(("kept", connection))
    with served(ours), Application(ours.path) as there:
        for fate in ("gone", "kept"):
            answer = there.ask({FOUR_TUPLE: -1})[FOUR_TUPLE]
            (there.gone if fate == "gone" else there.keep)([FOUR_TUPLE])
            if isinstance(expected, str):
                assert isinstance(answer, Refused)
                assert expected in str(answer)
            else:
                assert answer == expected
                until(lambda fate=fate: told and told.pop() == (fate, CONNECTION))  # type: ignore[misc]
    assert not told


def test_a_thousand_at_once(ours: plain.Application) -> None:
    gone: list[str] = []
    ours.on_let_go = lambda connection, _: connection.encode()
    ours.on_gone = lambda connection, _: gone.append(connection)
    many = {FOUR_TUPLE._replace(remote_port=port): -1 for port in range(1, 1001)}
    with served(ours), Application(ours.path) as there:
        answers = there.ask(many, 10)
        assert answers == {each: str(each).encode() for each in many}
        there.gone(many)
        until(lambda: len(gone) == len(many))


def test_a_wrong_descriptor_is_not_let_go(ours: plain.Application) -> None:
    ours.on_let_go = lambda *_: b"state"
    with served(ours), Application(ours.path) as there, socket.create_server(("127.0.0.1", 0)) as listener:
        for number in (0, 9999, listener.fileno(), ours.fileno()):
            assert "is not that connection" in str(there.ask({FOUR_TUPLE: number})[FOUR_TUPLE])


def test_an_asker_that_dies_leaves_the_connection(ours: plain.Application) -> None:
    kept: list[int] = []
    ours.on_let_go = lambda *_: b"state"
    ours.on_kept = lambda _, descriptor: kept.append(descriptor)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as peer,
        listener.accept()[0] as mine,
        served(ours),
    ):
        name = FourTuple.parse("{}:{},{}:{}".format(*mine.getsockname(), *mine.getpeername()))
        there = Application(ours.path)
        assert there.ask({name: mine.fileno()})[name] == b"state"
        there._socket.close()  # as a killed process: without a word
        until(lambda: kept == [mine.fileno()])
        peer.close()


def test_what_an_asker_said_before_it_died_counts(ours: plain.Application) -> None:
    """It had not read all that it was sent: the application is told of that first (ECONNRESET)."""
    told: list[str] = []
    ours.on_let_go = lambda *_: told.append("asked") or b"state"  # type: ignore[func-returns-value]
    ours.on_kept = lambda *_: told.append("kept")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(ours.path)
        caller.send(msgspec.msgpack.encode(Hello()))
        for _ in range(2):
            ours.process(0.05)
        caller.send(msgspec.msgpack.encode(SAID[On.LET_GO]))
    for _ in range(3):
        ours.process(0.05)
    assert told == ["asked", "kept"]


def test_what_an_application_raises_comes_out_and_the_connection_stays(ours: plain.Application) -> None:
    ours.on_let_go = lambda *_: bytes(1 // 0)
    answers: list[bytes | Error] = []
    with asking(ours) as asks:
        asks(answers)
        with pytest.raises(ZeroDivisionError):
            until(lambda: ours.process(0.01))
    assert "failed" in str(answers[0])


@contextlib.contextmanager
def asking(ours: plain.Application) -> Iterator[Callable[[list[bytes | Error]], None]]:
    threads: list[threading.Thread] = []

    def ask(answers: list[bytes | Error]) -> None:
        def run() -> None:
            with Application(ours.path) as there:
                answers.append(there.ask({FOUR_TUPLE: -1})[FOUR_TUPLE])

        threads.append(threading.Thread(target=run))
        threads[0].start()

    yield ask
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("data", [b"", b"\xc1", bytes(MAX_MESSAGE + 9), msgspec.msgpack.encode(Go(1))])
def test_a_caller_that_breaks_the_protocol_is_left(ours: plain.Application, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(ours.path)
        reads, writes = os.pipe()
        caller.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writes, writes]))])
        os.close(writes)
        for _ in range(3):
            ours.process(0.05)
        with contextlib.suppress(ConnectionResetError):
            assert caller.recv(9) == b""
        assert os.read(reads, 1) == b""
        os.close(reads)


def test_two_cannot_listen_at_one_path_but_a_dead_ones_is_taken(ours: plain.Application, tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        plain.Application(ours.path)
    left = tmp_path / "app" / "left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(left))
    plain.Application(left).close()
    assert not left.exists()


@pytest.mark.parametrize(("service", "locals"), [("", ("*",)), ("s", ()), ("s", ("*",) * 9), ("s", ("nonsense:x",))])
def test_services_that_cannot_be(ours: plain.Application, service: str, locals: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        ours.register(service, *locals)
    assert len(ours.services) == 1
