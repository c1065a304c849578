"""Commands that are killed, at every step: a connection lives on, or its record does; never both gone, never a RST."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest

from migrate import unconnected
from migrate.fourtuple import FourTuple
from migrate.kernel import sockopt
from migrate.kernel.nft import HOLD, tables
from migrate.tcpstate import TcpState
from tests.capture import RST, Capture
from tests.fix_netns import Lan
from tests.killing import Killer, Place, Run
from tests.peers import connect
from tests.waiting import until


class Scene:
    """A client, the host where commands are killed, and what goes over the wire."""

    def __init__(self, net: Lan, killer: Killer, capture: Capture, directory: Path) -> None:
        self.net, self.killer, self.capture, self.directory = net, killer, capture, directory
        self.client, self.a = net.host("client"), net.host("a")
        self.count = 0

    def new_file(self) -> Path:
        """A name in a directory of its own, which is empty."""
        self.count += 1
        room = self.directory / str(self.count)
        room.mkdir()
        return room / "record.ici"

    def dump(self, name: str, file: Path, *more: str, at: int | Place | None = None) -> Run:
        return self.killer.run("dump", name, "-o", file, "--netns", self.a.netns, "--hold", "20", *more, at=at)

    def restore(self, file: Path, at: Place | None = None) -> Run:
        words: list[str | Path] = ["restore", file, "--netns", self.a.netns, "--detach", "--hold", "20", "--", "cat"]
        return self.killer.run(*words, at=at)

    def no_rst(self, name: str) -> None:
        """The peer of that connection has seen none."""
        port = FourTuple.parse(name).remote_port
        flow = [segment for segment in self.capture.segments if port in (segment.source_port, segment.destination_port)]
        assert not [segment for segment in flow if segment.flags & RST], flow

    def over(self, listener: socket.socket, file: Path) -> bool:
        """Its dump: it is closed, or as before and nothing is held."""
        if file.exists():
            return sockopt.state(listener) == TcpState.CLOSED
        held = any(name.startswith(HOLD) for name in self.tables())
        return not (held or unconnected.frozen_listener(listener))

    def tables(self) -> list[str]:
        with self.a.entered():
            return sorted(tables())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("faults")
    with contextlib.ExitStack() as stack:
        net = Lan(("client", "a"))
        stack.callback(net.close)
        killer = stack.enter_context(Killer({"TCPMIG_STATE": str(directory / "state")}))
        capture = stack.enter_context(net.capture("client"))
        yield Scene(net, killer, capture, directory)


@contextlib.contextmanager
def connection(scene: Scene) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """Both ends, with b"before " unread at the server's, and its name."""
    client, server = connect(scene.client, scene.a)
    with client, server:
        client.settimeout(10)
        server.settimeout(10)
        name = str(FourTuple.parse("{}:{},{}:{}".format(*server.getsockname(), *server.getpeername())))
        client.sendall(b"before ")
        until(lambda: sockopt.received_length(server) == 7)
        yield client, server, name


def lives(client: socket.socket, server: socket.socket) -> None:
    """The connection is whole where it was."""
    client.sendall(b"after")
    expected = b"before after"
    received = b""
    while len(received) < len(expected):
        received += server.recv(100)
    assert received == expected
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    client.close()
    assert server.recv(1) == b""


def echoes(client: socket.socket, *, said: bytes = b"") -> None:
    """`cat` has the connection: it sends back what was unread and what comes."""
    client.sendall(b"after" if not said else b"")
    client.shutdown(socket.SHUT_WR)
    received = b""
    while data := client.recv(100):
        received += data
    assert received == b"before after"


def gone(server: socket.socket) -> None:
    """Its owner has been told that it lost the connection."""
    with pytest.raises(ConnectionAbortedError):
        server.recv(1)


def settled(scene: Scene, server: socket.socket, file: Path) -> bool:
    """The guard of a killed dump has done its work; whether the record is in its place."""
    with server.dup() as mine:
        until(lambda: file.exists() or not (sockopt.in_repair(mine) or scene.tables()), what="the guard has finished")
        until(lambda: not sockopt.in_repair(mine))
    return file.exists()


def in_peace(scene: Scene) -> tuple[list[Place], list[Place]]:
    """The steps of a dump and of a restore that nobody kills."""
    with connection(scene) as (client, server, name):
        file = scene.new_file()
        dumped = scene.dump(name, file)
        gone(server)
        restored = scene.restore(file)
        assert dumped.code == restored.code == 0, (dumped, restored)
        echoes(client)
    return dumped.places, restored.places


def test_dump(scene: Scene) -> None:
    """Killed at any step, the connection goes on or the complete record is there."""
    outcomes: dict[bool, list[str]] = {False: [], True: []}
    places, _ = in_peace(scene)
    for at in places:
        file = scene.new_file()
        with connection(scene) as (client, server, name):
            run = scene.dump(name, file, at=at)
            assert run.code in (0, -SIGKILL), run
            saved = run.code == 0 or settled(scene, server, file)
            if saved:
                gone(server)
                again = scene.restore(file)
                assert again.code == 0, (at, again)
                echoes(client)
                scene.no_rst(name)
            else:
                assert not outcomes[True], run.steps
                lives(client, server)
                assert list(file.parent.iterdir()) == [], run.steps
            if run.code:  # it came to that place
                outcomes[saved].append(run.steps[-1])
    # One step decides: before the link the connection goes on, after it the record counts.
    assert outcomes[False][-1] == "link", outcomes
    assert {"fork", "setsockopt", "writev", "fsync"} <= set(outcomes[False]), outcomes
    assert {"send", "setsockopt", "close"} <= set(outcomes[True]), outcomes
    until(lambda: not scene.tables(), what="no table is left")
    assert not scene.capture.rsts


def test_dump_that_leaves_it_running(scene: Scene) -> None:
    """Killed at any step, the connection goes on."""
    for at in itertools.count(1, 3):
        with connection(scene) as (client, server, name):
            code = scene.dump(name, scene.new_file(), "--leave-running", at=at).code
            until(lambda mine=server: not sockopt.in_repair(mine))  # type: ignore[misc]
            lives(client, server)
            if code == 0:
                break
    assert at > 30
    until(lambda: not scene.tables(), what="no table is left")
    assert not scene.capture.rsts


def test_dump_of_a_listener(scene: Scene) -> None:
    """Killed at any step, what nobody had accepted waits: in the queue, in the guard's hands, or in the record."""
    found = set()
    for at in itertools.count(2, 3):
        file = scene.new_file()
        with scene.a.entered():
            listener = socket.create_server((scene.a.ip4, 0))
        chosen = "--local={}:{}".format(*listener.getsockname())
        with listener, scene.client.entered(), socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(b"before ")
            until(lambda mine=listener: unconnected.waiting(mine) == 1)  # type: ignore[misc]
            run = scene.dump(chosen, file, "--state", "LISTEN", at=at)
            until(lambda f=file, s=listener: scene.over(s, f), what="the guard has finished")  # type: ignore[misc]
            name = str(FourTuple.parse("{}:{},{}:{}".format(*client.getsockname(), *listener.getsockname())).reversed())
            where = "record" if file.exists() else "queue" if unconnected.waiting(listener) else "guard"
            found.add(where)
            if where == "queue":
                with listener.accept()[0] as sock:
                    lives(client, sock)
            else:
                if where == "guard":
                    file = scene.new_file()
                    assert scene.dump(name, file).code == 0
                assert scene.restore(file).code == 0
                echoes(client)
            scene.no_rst(name)
        if run.code == 0:
            break
    assert found == {"queue", "guard", "record"}


def test_restore(scene: Scene) -> None:
    """Killed at any step, the connection lives already or its record brings it to life; the peer waits meanwhile."""
    steps = []
    codes = []
    _, places = in_peace(scene)
    for number, at in enumerate(places, start=1):
        with connection(scene) as (client, server, name):
            file = scene.new_file()
            assert scene.dump(name, file).code == 0
            gone(server)
            said = b"after" if number % 4 == 0 else b""  # what the peer says while nobody is there, and has to repeat
            if number % 8 == 0:
                client.sendall(said)
            run = scene.restore(file, at=at)
            assert run.code in (0, -SIGKILL), run
            if number % 8 == 4:
                client.sendall(said)
            if run.code:  # it came to that place
                steps.append(run.steps[-1])
                again = scene.restore(file)
                assert again.code == 0 or "exists here already" in again.stderr or "before" in again.stderr, (
                    run,
                    again,
                )
                codes.append(again.code)
            echoes(client, said=said)
            scene.no_rst(name)
    assert codes == sorted(codes) and codes[0] == 0, list(zip(steps, codes, strict=True))
    assert {"fork", "setsockopt", "bind", "connect", "send"} <= set(steps), steps
    until(lambda: not scene.tables(), what="no table is left")
    assert not scene.capture.rsts
