"""kernel/netns.py: which namespace a thread is in, there and back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from migrate.errors import NotFound, PrivilegeError, UsageError
from migrate.kernel import netns
from tests.fix_netns import LanFactory


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_there_and_back(lan: LanFactory) -> None:
    a, b = lan("a", "b").hosts.values()
    here, open_before = netns.identity(), descriptors()
    with netns.entered(a.netns):
        assert netns.identity() == netns.identity(a.netns) != here
        with netns.entered(b.netns):
            assert netns.identity() == netns.identity(b.netns)
            with netns.entered(None):
                assert netns.identity() == netns.identity(b.netns)
        assert netns.identity() == netns.identity(a.netns)
    assert netns.identity() == here
    assert descriptors() == open_before


def test_a_socket_keeps_its_namespace(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    with netns.entered(a.netns):
        server = socket.create_server((a.ip4, 0))
    with server, netns.entered(a.netns), socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_back_after_an_error(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    here, open_before = netns.identity(), descriptors()
    with pytest.raises(ZeroDivisionError), netns.entered(a.netns):
        raise ZeroDivisionError
    assert (netns.identity(), descriptors()) == (here, open_before)


def test_only_this_thread(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    inside, seen = threading.Event(), threading.Event()
    found: list[int] = []

    def visit() -> None:
        with netns.entered(a.netns):
            found.append(netns.identity())
            inside.set()
            seen.wait(10)

    thread = threading.Thread(target=visit)
    thread.start()
    assert inside.wait(10)
    assert netns.identity() != found[0]
    seen.set()
    thread.join()


def test_three_ways_to_name_one(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    process = a.popen(["sleep", "60"])
    names = [a.netns, f"/run/netns/{a.netns}", f"pid:{process.pid}"]
    assert len({netns.identity(name) for name in names}) == 1
    for name in names:
        assert netns.exists(name)
        with netns.entered(name):
            assert netns.identity() == netns.identity(a.netns)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tcpmig-no-such", NotFound, "there is no network namespace 'tcpmig-no-such' (`ip netns list`"),
        ("pid:4194999", NotFound, "there is no network namespace 'pid:4194999'"),
        ("x" * 300, NotFound, "there is no network namespace"),
        ("/etc/hostname", NotFound, "'/etc/hostname' is no network namespace"),
        ("/proc/self/ns/uts", NotFound, "'/proc/self/ns/uts' is no network namespace"),
        ("/etc/hostname/net", NotFound, "there is no network namespace"),
        ("", UsageError, "'' names no network namespace"),
        (".", UsageError, "'.' names no network namespace"),
        ("..", UsageError, "'..' names no network namespace"),
        ("../netns/x", UsageError, "'../netns/x' names no network namespace"),
        ("/run/netns/../x", UsageError, "names no network namespace"),
        ("a\0b", UsageError, "names no network namespace"),
        ("pid:", UsageError, "after 'pid:' comes a process id"),
        ("pid:-1", UsageError, "after 'pid:' comes a process id"),
        ("pid:1/../1", UsageError, "after 'pid:' comes a process id"),
        ("pid:\u0661", UsageError, "after 'pid:' comes a process id"),
    ],
)
def test_bad_names(name: str, error: type[Exception], words: str) -> None:
    here, open_before = netns.identity(), descriptors()
    with pytest.raises(error) as caught, netns.entered(name):
        pass
    assert words in str(caught.value)
    assert (netns.identity(), descriptors()) == (here, open_before)


def test_exists() -> None:
    assert not netns.exists("tcpmig-no-such")
    with pytest.raises(UsageError):
        netns.exists("../x")
    with pytest.raises(NotFound):
        netns.identity("tcpmig-no-such")


def test_without_the_privilege(lan: LanFactory) -> None:
    (a,) = lan("a").hosts.values()
    program = "import sys; from migrate.kernel import netns\nwith netns.entered(sys.argv[1]): pass"
    drop = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    python = [sys.executable, "-c", program, a.netns]
    done = subprocess.run([*drop, *python], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"{PrivilegeError.__module__}.{PrivilegeError.__name__}: network namespace '{a.netns}' cannot be entered: "
        "not permitted (needs CAP_SYS_ADMIN; run as root)"
    )
