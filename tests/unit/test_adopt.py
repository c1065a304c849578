"""Adoption by children: who waits, who runs, who vanishes, and what the peer sees of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.adopt.child import ChildAdoption, InetdAdopter, SystemdAdopter
from migrate.errors import HostError, UsageError
from migrate.kernel import sockopt
from tests.capture import FIN, RST, Capture
from tests.fix_netns import Lan
from tests.peers import connect
from tests.waiting import until


class Scene:
    def __init__(self, net: Lan, wire: Capture) -> None:
        self.net, self.wire = net, wire

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The peer's socket, and one that is silent like a restored one."""
        client, server = connect(self.net.host("client"), self.net.host("a"))
        client.settimeout(10)
        sockopt.enter_repair(server)
        with client, server:
            yield client, server
            with contextlib.suppress(OSError):
                sockopt.enter_repair(server)

    def ended(self, client: socket.socket) -> bool:
        """Whether the peer has been told that the connection is over."""
        port = client.getsockname()[1]
        return any(s.destination_port == port and s.flags & (FIN | RST) for s in self.wire.segments)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        net = Lan(("client", "a"))
        stack.callback(net.close)
        yield Scene(net, stack.enter_context(net.capture("client")))


def activate(*sockets: socket.socket) -> None:
    for sock in sockets:
        sockopt.leave_repair(sock, probe=False)


def wait(adoption: object) -> int:
    assert isinstance(adoption, ChildAdoption)
    return os.waitstatus_to_exitcode(os.waitpid(adoption.pid, 0)[1])


def gone(pid: int) -> None:
    """Nobody's child, or ours that ended."""
    with contextlib.suppress(ChildProcessError):
        until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, what=f"process {pid} ends")
    until(lambda: not runs(pid), what=f"process {pid} is gone")


def runs(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def test_inetd_style_runs_when_told(scene: Scene) -> None:
    with scene.connection() as (client, server), scene.connection() as (other, second):
        adoptions = InetdAdopter(["sh", "-c", "echo hello; exec cat"]).adopt([server, second])
        assert len(adoptions) == 2
        activate(server, second)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(10)
        for adoption, peer, sock in zip(adoptions, (client, other), (server, second), strict=True):
            adoption.go()
            sock.close()
            assert peer.recv(100) == b"hello\n"
            peer.sendall(b"ping")
            assert peer.recv(100) == b"ping"
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
            assert wait(adoption) == 0


def test_systemd_style_announces_all(scene: Scene) -> None:
    """sd_listen_fds(3): descriptors from 3 on in their order, LISTEN_PID the process itself, no other left open."""
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(scene.connection()) for _ in range(3)]
        script = 'echo "$LISTEN_FDS $LISTEN_PID $$ $LISTEN_FDNAMES" >&3; echo b >&4; exec ls /proc/self/fd >&5'
        (adoption,) = SystemdAdopter(["bash", "-c", script]).adopt([sock for _, sock in reversed(pairs)])
        assert isinstance(adoption, ChildAdoption)
        activate(*(sock for _, sock in pairs))
        adoption.go()
        assert pairs[2][0].recv(100) == f"3 {adoption.pid} {adoption.pid} connection:connection:connection\n".encode()
        assert pairs[1][0].recv(100) == b"b\n"
        assert {"3", "4", "5"} < set(pairs[0][0].recv(100).decode().split()) <= set("0123456")  # 6 is ls's own
        assert wait(adoption) == 0


@pytest.mark.parametrize("style", [InetdAdopter, SystemdAdopter])
def test_abort_is_silent(scene: Scene, style: type[InetdAdopter | SystemdAdopter]) -> None:
    with scene.connection() as (client, server):
        (adoption,) = style(["cat"]).adopt([server])
        server.close()
        adoption.abort()
        assert isinstance(adoption, ChildAdoption)
        gone(adoption.pid)
        assert not scene.ended(client)


def dies(work: Callable[[], list[int]]) -> list[int]:
    """Run that in a process that is killed afterwards; the pids it gave."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writes, " ".join(map(str, work())).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writes)
    with os.fdopen(reads) as answer:
        pids = [int(word) for word in answer.read(100).split()]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert pids
    return pids


def adopt(style: type[InetdAdopter | SystemdAdopter], command: list[str], *sockets: socket.socket) -> list[int]:
    return [child.pid for child in style(command).adopt(sockets) if isinstance(child, ChildAdoption)]


@pytest.mark.parametrize("style", [InetdAdopter, SystemdAdopter])
def test_parent_dies_before_the_activation(scene: Scene, style: type[InetdAdopter | SystemdAdopter]) -> None:
    """The children notice, also those that were forked while a sister's pipe was open, and nobody else does."""
    with scene.connection() as (client, server), scene.connection() as (other, second):
        pids = dies(lambda: adopt(style, ["cat"], server, second))
        server.close()
        second.close()
        for pid in pids:
            gone(pid)
        assert not scene.ended(client) and not scene.ended(other)


def test_parent_dies_after_the_activation_of_some(scene: Scene) -> None:
    """What lives gets its owner, what is silent vanishes."""
    with scene.connection() as (client, server), scene.connection() as (other, second):

        def work() -> list[int]:
            pids = adopt(InetdAdopter, ["cat"], server, second)
            activate(server)
            return pids

        pids = dies(work)
        server.close()
        second.close()
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        gone(pids[1])
        assert not scene.ended(other)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        gone(pids[0])


def test_a_command_that_cannot_run_leaves_silence(scene: Scene, tmp_path: Path) -> None:
    """The file is there and may be executed, and the kernel cannot."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o700)
    adopter = InetdAdopter([str(broken)])
    adopter.check()
    with scene.connection() as (client, server):
        (adoption,) = adopter.adopt([server])
        activate(server)
        with pytest.raises(HostError, match="could not be started: Exec format error"):
            adoption.go()
        until(lambda: sockopt.in_repair(server))
        assert wait(adoption) == 127
        server.close()
        assert not scene.ended(client)


def test_commands_are_checked_first() -> None:
    with pytest.raises(UsageError, match="a command to hand the connection to is missing"):
        InetdAdopter([])
    with pytest.raises(HostError, match="there is no command '/no/command'"):
        SystemdAdopter(["/no/command"]).check()


def test_children_get_no_ambient_capabilities() -> None:
    """An agent of an ordinary user has its privileges as ambient capabilities; whom it starts shall not."""
    program = """
import os, socket
from migrate.adopt.child import InetdAdopter
here, there = socket.socketpair()
child, = InetdAdopter(["grep", "CapAmb", "/proc/self/status"]).adopt([there])
there.close()
child.go()
print(open("/proc/self/status").read().partition("CapAmb:")[2].split()[0], here.recv(100).decode().split()[1])
os.waitpid(child.pid, 0)
"""
    command = ["setpriv", "--inh-caps=+net_admin", "--ambient-caps=+net_admin", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["0000000000001000", "0000000000000000"]
