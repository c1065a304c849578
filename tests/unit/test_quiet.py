"""Quiet points: the verdict on observations, and real connections whose owner does what owners do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from migrate.fourtuple import FourTuple
from migrate.hold import Hold
from migrate.kernel import sockopt
from migrate.kernel.nft import tables
from migrate.quiet import PATIENCE, SETTLE, Activity, observe, rounds, verdict
from tests.fix_netns import Lan
from tests.peers import connect
from tests.waiting import until

LONG = int(PATIENCE * 1000)  # milliseconds


def activity(
    *,
    unread: int = 0,
    notsent: int = 0,
    sent: int = 8,
    received: int = 8,
    bytes_received: int = 100,
    bytes_sent: int = 100,
) -> Activity:
    """``sent`` and ``received``: milliseconds ago."""
    return Activity(unread, notsent, sent, received, bytes_received, bytes_sent)


NOW = activity()


@pytest.mark.parametrize(
    ("before", "now", "settled", "expected"),
    [
        # Something is on its way through the owner or out of it: wait.
        (NOW, activity(unread=1), 1.0, None),
        (NOW, activity(notsent=1), 1.0, None),
        # The last thing was a request.
        (activity(sent=500, received=8), activity(sent=500, received=8), 1.0, None),
        (activity(sent=5000, received=4996), activity(sent=5000, received=4996), 1.0, None),
        # What is sent again for want of an acknowledgement is no answer.
        (activity(sent=500, received=8), activity(sent=0, received=12), 1.0, None),
        # The last thing was an answer: quiet as soon as no more of it comes.
        (activity(sent=4, received=8), activity(sent=4, received=8), SETTLE, True),
        (activity(sent=4, received=8), activity(sent=4, received=8), SETTLE / 2, None),
        (activity(sent=4, received=5000), activity(sent=4, received=5000), SETTLE, True),
        # The owner sent something while nothing could come in: whatever the times say, that was last.
        (NOW, activity(sent=8, received=8, bytes_sent=101), SETTLE, True),
        (NOW, activity(sent=8, received=8, bytes_sent=101), 0.0, None),
        (activity(sent=500, received=4), activity(sent=8, received=4, bytes_sent=101), SETTLE, True),
        # Both in one tick: undecided for a while, then an owner that meant to answer would have.
        (NOW, activity(sent=8, received=8), SETTLE, False),
        (NOW, activity(sent=LONG - 1, received=LONG - 1), SETTLE, False),
        (NOW, activity(sent=LONG, received=LONG), SETTLE, True),
        (NOW, activity(sent=LONG, received=LONG), 0.0, None),
        # Nothing ever came: nobody waits for an answer.
        (NOW, activity(sent=8, received=8, bytes_received=0), SETTLE, True),
        (NOW, activity(sent=8, received=4, bytes_received=0), SETTLE, True),
    ],
)
def test_verdict(before: Activity, now: Activity, settled: float, expected: bool | None) -> None:
    assert verdict(before, now, settled=settled) is expected
    # A thorough attempt waits where a quick one gives up.
    assert verdict(before, now, settled=settled, thorough=True) is (None if expected is False else expected)


class Owner:
    """A server in a thread of its own, which does ``serve`` with its socket until the peer has closed."""

    def __init__(self, net: Lan, serve: Callable[[socket.socket], None]) -> None:
        self.client, self.server = connect(net.host("client"), net.host("a"))
        self.client.settimeout(10)
        self.netns = net.host("a").netns
        self.name = FourTuple.parse("{}:{},{}:{}".format(*self.server.getsockname(), *self.server.getpeername()))
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], None]) -> None:
        with contextlib.suppress(OSError):
            serve(self.server)

    def close(self) -> None:
        self.client.close()
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.server.close()
        assert not self._thread.is_alive()

    def becomes_quiet(self, seconds: float) -> bool:
        """Whether it does; if so it is held on both sides at that moment, and in any case not any more afterwards."""
        with Hold(netns=self.netns) as hold:
            for group, more in rounds({self.name: self.server}, hold, seconds=seconds):
                assert group == [self.name] and not more
                assert hold.tuples == {self.name: True}
                return True
            assert hold.tuples == {}
        return False


@pytest.fixture(scope="module")
def net() -> Iterator[Lan]:
    net = Lan(("client", "a"))
    with contextlib.closing(net):
        yield net
        with net.host("a").entered():
            assert not tables()


@contextlib.contextmanager
def owner(net: Lan, serve: Callable[[socket.socket], None]) -> Iterator[Owner]:
    with contextlib.closing(Owner(net, serve)) as made:
        yield made


def answer(sock: socket.socket) -> None:
    while request := sock.recv(100):
        sock.sendall(b"answer to " + request)


def think(sock: socket.socket) -> None:
    while request := sock.recv(100):
        time.sleep(0.3)
        sock.sendall(b"answer to " + request)


def stream(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"x")
        time.sleep(SETTLE / 4)


def listen_only(sock: socket.socket) -> None:
    while sock.recv(100):
        pass


def answer_once(sock: socket.socket) -> None:
    sock.sendall(b"answer to " + sock.recv(100))
    listen_only(sock)


def test_an_answered_request_is_quiet(net: Lan) -> None:
    with owner(net, answer) as served:
        for _ in range(3):
            served.client.sendall(b"request")
            assert served.client.recv(100) == b"answer to request"
            assert served.becomes_quiet(5)


def test_a_request_on_its_way_is_waited_for(net: Lan) -> None:
    """The owner thinks longer than an attempt lasts: what is found quiet has the answer sent."""
    with owner(net, think) as served:
        for count in (1, 2):
            served.client.sendall(b"request")
            until(lambda wanted=count * 7: observe(served.server).bytes_received == wanted)  # type: ignore[misc]
            if count == 1:
                assert served.client.recv(100) == b"answer to request"
                time.sleep(0.02)  # the next request comes in another tick
        assert served.becomes_quiet(5)
        assert observe(served.server).bytes_sent == 2 * len(b"answer to request")


def test_nothing_said_is_quiet(net: Lan) -> None:
    with owner(net, answer) as served:
        assert served.becomes_quiet(1)


def test_unread_data_is_never_quiet(net: Lan) -> None:
    with owner(net, lambda sock: None) as served:
        served.client.sendall(b"request")
        until(lambda: sockopt.received_length(served.server) == 7)
        began = time.monotonic()
        assert not served.becomes_quiet(0.2)
        assert time.monotonic() - began < 2


def test_a_request_without_an_answer_is_not_quiet(net: Lan) -> None:
    """Once it has answered, the owner is asked something that it never answers."""
    with owner(net, answer_once) as served:
        served.client.sendall(b"request")
        assert served.client.recv(100) == b"answer to request"
        time.sleep(0.02)  # another tick
        served.client.sendall(b"another")
        until(lambda: observe(served.server).unread == 0)
        assert not served.becomes_quiet(0.3)


def test_a_stream_is_never_quiet(net: Lan) -> None:
    with owner(net, stream) as served:
        reader = threading.Thread(target=lambda: listen_only(served.client), daemon=True)
        reader.start()
        assert not served.becomes_quiet(0.3)
        served.server.shutdown(socket.SHUT_RDWR)
        reader.join(5)


def test_what_was_held_is_given_back(net: Lan) -> None:
    """A request that comes in the middle of an attempt is answered afterwards, whether that became quiet or not."""
    with owner(net, answer) as served, Hold(netns=served.netns) as hold:
        hold.add([served.name], outgoing=False)
        served.client.sendall(b"request")
        until(lambda: hold.collect() or hold.kept)
        assert list(rounds({served.name: served.server}, hold, seconds=0.5))
        hold.remove([served.name])
        assert served.client.recv(100) == b"answer to request"


class Burdened:
    """A host that is as busy as can be: in each second some task waits for a processor for a second."""

    def waited(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        pass


def test_time_counts_less_while_somebody_waits_for_a_processor(net: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that gets a processor late only looks idle; it is given more time, not refused."""

    def attempts_last() -> float:
        with owner(net, answer) as served:
            began = time.monotonic()
            assert served.becomes_quiet(5)
            return time.monotonic() - began

    monkeypatch.setattr("migrate.kernel.processors.Pressure", Burdened)
    assert attempts_last() > 3 * SETTLE


def test_a_processor_that_stood_still_makes_it_settle_anew(net: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [1.0, 0.0]
    visits: list[float] = []

    def visit() -> float:
        visits.append(time.monotonic())
        return answers.pop(0)

    monkeypatch.setattr("migrate.kernel.processors.visit", visit)
    with owner(net, answer) as served:
        assert served.becomes_quiet(5)
    assert len(visits) == 2 and visits[1] - visits[0] >= SETTLE
