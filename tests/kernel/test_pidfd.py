"""kernel/pidfd.py: whose a socket is, and a duplicate of it, against real processes."""

from __future__ import annotations

import array
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.errors import HostError, NotFound, PrivilegeError
from migrate.kernel import pidfd
from migrate.kernel.pidfd import Owner

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes; they end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str, **more: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more)  # type: ignore[call-overload]
        started.append(process)
        return process  # type: ignore[no-any-return]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


Sockets = tuple[socket.socket, socket.socket]


def test_this_process_owns_its_sockets(pair: Sockets) -> None:
    left, right = pair
    comm = Path("/proc/self/comm").read_text().strip()
    duplicate = os.dup(left.fileno())
    try:
        owners = pidfd.owners_of([inode(left), inode(right)])
    finally:
        os.close(duplicate)
    assert sorted(owners[inode(left)]) == sorted(Owner(os.getpid(), fd, comm) for fd in (left.fileno(), duplicate))
    assert owners[inode(right)] == [Owner(os.getpid(), right.fileno(), comm)]


def test_all_who_inherited_it(pair: Sockets, start: Start) -> None:
    left, _ = pair
    heirs = [start("sleep", "60", pass_fds=[left.fileno()]) for _ in range(2)]
    owners = pidfd.owners_of([inode(left)])[inode(left)]
    assert {(owner.pid, owner.fd) for owner in owners} == {
        (pid, left.fileno()) for pid in (os.getpid(), *(heir.pid for heir in heirs))
    }
    assert {owner.comm for owner in owners if owner.pid != os.getpid()} == {"sleep"}


def test_one_who_was_given_it(pair: Sockets, start: Start) -> None:
    left, right = pair
    with socket.create_server(("127.0.0.1", 0)) as passed:
        taker = start(
            sys.executable,
            "-c",
            "import socket, sys\n"
            "got = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 1)[1]\n"
            "print(got[0], flush=True); sys.stdin.read()",
            str(right.fileno()),
            pass_fds=[right.fileno()],
        )
        left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed.fileno()]))])
        assert taker.stdout
        number, wanted = int(taker.stdout.readline()), inode(passed)
    owners = pidfd.owners_of([wanted])
    assert [(owner.pid, owner.fd) for owner in owners[wanted]] == [(taker.pid, number)]


def test_nobody(pair: Sockets) -> None:
    gone = socket.socket()
    number = inode(gone)
    gone.close()
    assert pidfd.owners_of([number, 0, 1, 4294967295]) == {}
    assert pidfd.owners_of([]) == {}


def test_a_file_of_the_same_number_is_no_socket(pair: Sockets, start: Start) -> None:
    reader, writer = os.pipe()
    try:
        assert pidfd.owners_of([os.fstat(reader).st_ino]) == {}
    finally:
        os.close(reader)
        os.close(writer)


def test_while_processes_come_and_go(pair: Sockets) -> None:
    left, _ = pair
    with subprocess.Popen(["sh", "-c", "while :; do true & wait; done"], start_new_session=True) as busy:
        try:
            for _ in range(10):
                assert [owner.pid for owner in pidfd.owners_of([inode(left)])[inode(left)]] == [os.getpid()]
        finally:
            os.killpg(busy.pid, 9)


def test_those_that_may_not_be_read_are_passed_over(pair: Sockets, start: Start) -> None:
    left, _ = pair
    heir = start("sleep", "60", pass_fds=[left.fileno()])
    program = (
        "import os, sys; from migrate.kernel import pidfd\n"
        "os.setresuid(12345, 12345, 12345)\n"
        "print(pidfd.owners_of([int(sys.argv[1])]))"
    )
    stranger = start(sys.executable, "-c", program, str(inode(left)))
    assert stranger.communicate()[0] == b"{}\n"
    assert stranger.returncode == 0
    assert heir.poll() is None


def test_a_duplicate_is_the_same_open_file(start: Start) -> None:
    left, right = socket.socketpair()
    child = start("sleep", "60", pass_fds=[right.fileno()])
    number = right.fileno()
    right.close()
    process = pidfd.open_process(child.pid)
    try:
        assert not os.get_inheritable(process)
        taken = pidfd.get_fd(process, number)
    finally:
        os.close(process)
    with left, socket.socket(fileno=taken) as again:
        assert not os.get_inheritable(taken)
        again.send(b"still there")
        assert left.recv(100) == b"still there"


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="there is no process 4194999"):
        pidfd.open_process(4194999)
    with pytest.raises(NotFound, match="there is no process -1"):
        pidfd.open_process(-1)


def test_a_descriptor_that_is_not_there(start: Start) -> None:
    child = start("sleep", "60")
    process = pidfd.open_process(child.pid)
    try:
        for number in (999, -1, 0x7FFFFFFF):
            with pytest.raises(NotFound, match=f"the process has no descriptor {number}"):
                pidfd.get_fd(process, number)
        child.kill()
        child.wait()
        with pytest.raises(NotFound, match="the process has ended"):
            pidfd.get_fd(process, 0)
    finally:
        os.close(process)


def test_without_the_privilege(start: Start) -> None:
    child = start("sleep", "60")
    program = (
        "import os, sys; from migrate.kernel import pidfd\n"
        "os.setresuid(12345, 12345, 12345)\n"
        "pidfd.get_fd(pidfd.open_process(int(sys.argv[1])), 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(child.pid)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert f"{PrivilegeError.__name__}: descriptor 0 of another process cannot be taken: not permitted" in done.stderr
    assert "CAP_SYS_PTRACE" in done.stderr


def test_no_descriptor_left(start: Start) -> None:
    child = start("sleep", "60")
    process = pidfd.open_process(child.pid)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(50)]  # whatever gap there was is filled
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, hard))
    try:
        with pytest.raises(HostError, match=r"no descriptor left \(raise the limit of open files"):
            pidfd.get_fd(process, 0)
        with pytest.raises(HostError, match="no descriptor left"):
            pidfd.open_process(child.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in (process, *taken):
            os.close(descriptor)
