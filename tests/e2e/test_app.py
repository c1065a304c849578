"""Two processes that take part, on two hosts: a connection moves between them with its state, or stays."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrate
from migrate.adopt.sockets import listener_at
from migrate.adopt.unix import Application, UnixAdopter
from migrate.cli.main import main
from migrate.errors import Error, HostError, Refused
from migrate.kernel import netns, sockopt
from migrate.selection import Found, Selector, Takers, find
from tests import taking_part
from tests.capture import Capture
from tests.fix_netns import Host, Lan
from tests.moving import Mover
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PORT = 8080


class Lines:
    """A client that counts along."""

    def __init__(self, host: Host, address: str) -> None:
        with host.entered():
            self.sock = socket.create_connection((address, PORT), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # halves of lines are not kept back
        self.count = self.crc = 0
        self.answers = self.sock.makefile("rb")
        name = "{}:{},{}:{}".format(*self.sock.getpeername(), *self.sock.getsockname())
        self.server = migrate.FourTuple.parse(name)

    def talk(self, lines: int = 20) -> None:
        for _ in range(lines):
            self.begin()
            self.end()

    def begin(self) -> None:
        """The first half of a line."""
        self.line = os.urandom(20).hex()
        self.sock.sendall(self.line[:17].encode())

    def end(self) -> None:
        """The other half; and its answer must be right."""
        self.sock.sendall(self.line[17:].encode() + b"\n")
        self.count, self.crc = self.count + 1, zlib.crc32(self.line.encode(), self.crc)
        assert self.answers.readline() == b"%d %d\n" % (self.count, self.crc)

    def close(self) -> None:
        self.answers.close()
        self.sock.close()


class Scene:
    """Hosts a and b with an application each, and the floating address at a."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self.directory = directory
        self.net = Lan(("client", "a", "b"))
        stack.callback(self.net.close)
        self.mover = stack.enter_context(Mover(self.net.host("a"), self.net.host("b"), self.net.vip4))
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.start("a", "listen")
        self.start("b")
        self.capture: Capture = stack.enter_context(self.net.capture("client"))
        self.client = Lines(self.net.host("client"), self.net.vip4)
        stack.callback(self.client.close)
        self.client.talk(3)

    def path(self, host: Host | str) -> str:
        return str(self.directory / (host if isinstance(host, str) else host.name) / "app")

    def start(self, name: str, *words: str) -> None:
        """The application on that host."""
        command = [sys.executable, taking_part.__file__, self.path(name), self.net.vip4, str(PORT), *words]
        process = self.net.host(name).popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self.running[name] = process

    def found(self) -> Found:
        """The connection and its owner, on the host where it is."""
        with self.mover.here.entered():
            (found,) = find(Selector(connection=self.client.server))
        return found

    def owners(self, host: Host) -> list[int]:
        """The processes that have it."""
        with host.entered():
            return sorted(
                owner.pid for found in find(Selector(connection=self.client.server)) for owner in found.owners
            )

    def ask(self, application: Application, seconds: float = 5.0) -> bytes | Error:
        (descriptor,) = [owner.fd for owner in self.found().owners if owner.pid == application.pid]
        return application.ask({self.client.server: descriptor}, seconds)[self.client.server]

    @contextlib.contextmanager
    def taken(self) -> Iterator[socket.socket]:
        with Takers() as takers:
            sockets, failures = takers.take({self.client.server: self.found().owners})
        assert not failures
        with sockets[self.client.server] as sock:
            yield sock

    def move(self, *, dies: str = "") -> None:
        """As an agent would: ask, hold, dump, restore, adopt, activate.

        The one that hands the connection over ``dies`` when it is "silent", and another one tries again; or "active".
        """
        here, there, name = self.mover.here, self.mover.there, self.client.server
        with Application(self.path(here)) as application:
            state = self.ask(application)
            assert isinstance(state, bytes)
            with (
                self.taken() as sock,
                migrate.hold([name], netns=here.netns) as before,
                migrate.hold([name], netns=there.netns) as after,
            ):
                record = migrate.dump(sock)
                record.app = state
                self.mover.move_address()
                with netns.entered(there.netns):
                    restored = migrate.restore(migrate.Ici.decode(record.encode()), activate=False)
                with restored:
                    if dies == "silent":
                        die_having_offered(self.path(there), restored)
                        until(lambda: self.owners(there) == [os.getpid()], what="the application closes it")
                    (adoption,) = UnixAdopter(self.path(there)).adopt([restored])
                    assert adoption.refusal is None
                    migrate.release(sock)
                    after.keep(packet for packets in before.take().values() for packet in packets)
                    after.replay()
                    migrate.activate(restored)
                    if dies == "active":
                        die(adoption._application)
                    else:
                        adoption.go()
            application.gone([name])


def die(application: Application) -> None:
    """End the session as a killed process does: without a word."""
    application._socket.close()


def die_having_offered(path: str, restored: socket.socket) -> None:
    application = Application(path)
    (adoption,) = application.adopt([restored])
    assert adoption.refusal is None
    die(application)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(stack, tmp_path)


def test_a_connection_moves_with_its_state_and_back(scene: Scene) -> None:
    for _ in range(6):
        scene.client.begin()
        scene.move()
        scene.client.end()
        scene.client.talk()
        (owner,) = scene.found().owners
        assert owner.pid == scene.running[scene.mover.here.name].pid
    assert not scene.capture.rsts


@pytest.mark.parametrize("when", ["silent", "active"])
def test_who_hands_it_over_dies(scene: Scene, when: str) -> None:
    scene.client.begin()
    scene.move(dies=when)
    scene.client.end()
    scene.client.talk()
    assert scene.owners(scene.mover.here) == [scene.running["b"].pid]
    assert not scene.capture.rsts


def test_silence_means_that_it_stays(scene: Scene) -> None:
    scene.running["a"].send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(HostError, match="does not answer"):
            Application(scene.path("a"), seconds=0.2)
    finally:
        scene.running["a"].send_signal(signal.SIGCONT)
    with Application(scene.path("a")) as application:
        scene.running["a"].send_signal(signal.SIGSTOP)
        try:
            answer = scene.ask(application, 0.2)
        finally:
            scene.running["a"].send_signal(signal.SIGCONT)
        assert isinstance(answer, Refused)
        assert "in time" in answer.what
    scene.client.talk()
    scene.move()
    scene.client.talk()


def test_an_asker_that_dies_while_the_connection_is_frozen(scene: Scene) -> None:
    """Whoever thaws it then, the application notices."""
    with scene.taken() as sock:
        application = Application(scene.path("a"))
        assert isinstance(scene.ask(application), bytes)
        scene.client.begin()
        until(lambda: sockopt.received_length(sock))  # nobody reads it now
        with migrate.hold([scene.client.server], netns=scene.mover.here.netns):
            migrate.dump(sock)
            die(application)
            with Application(scene.path("a")) as another:  # it still answers others
                assert another.serves(scene.client.server)
            migrate.thaw(sock)
    scene.client.end()
    scene.client.talk()
    assert not scene.capture.rsts


def test_who_thaws_it_calls_and_the_application_looks(scene: Scene) -> None:
    """Thawing is no event for those who poll a socket."""
    with scene.taken() as sock:
        application = Application(scene.path("a"))
        assert isinstance(scene.ask(application), bytes)
        scene.client.begin()
        until(lambda: sockopt.received_length(sock))  # nobody reads it now
        with migrate.hold([scene.client.server], netns=scene.mover.here.netns):
            migrate.dump(sock)
            die(application)
            with Application(scene.path("a")):  # it answers: it knows that its asker died
                pass
            migrate.thaw(sock)
        assert listener_at(scene.path("a")) == scene.running["a"].pid
        until(lambda: not sockopt.received_length(sock), what="the application goes on")
    scene.client.end()
    scene.client.talk()


def test_restore_into_a_running_application(scene: Scene) -> None:
    file = scene.directory / "connections.ici"
    name, a, b = scene.client.server, scene.net.host("a"), scene.net.host("b")
    with Application(scene.path("a")) as application, scene.taken() as sock:
        state = scene.ask(application)
        assert isinstance(state, bytes)
        with migrate.hold([name], netns=b.netns, outgoing=False):
            with migrate.hold([name], netns=a.netns):
                record = migrate.dump(sock)
                record.app = state
                with file.open("wb") as stream:
                    migrate.write_records(stream.fileno(), [record])
                scene.mover.move_address()
                migrate.release(sock)
            application.gone([name])
            done = tcpmig(scene, "restore", file, "--adopter", scene.path("b"))
    assert "restored" in done.stdout
    scene.client.talk()
    (owner,) = scene.found().owners
    assert owner.pid == scene.running["b"].pid


def test_restore_refuses_where_no_application_is(tmp_path: Path) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    tmp_path.chmod(0o700)
    words = ["restore", "/dev/null", "--adopter", str(tmp_path / "nobody")]
    assert main(words, stdout=stdout, stderr=stderr) == HostError.exit_code
    assert "no application at" in stderr.getvalue()


def tcpmig(scene: Scene, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TCPMIG_STATE": str(scene.directory / "state")}
    return scene.net.host("b").run(
        [sys.executable, "-c", "from migrate.cli.main import main; raise SystemExit(main())", *words], env=environment
    )
