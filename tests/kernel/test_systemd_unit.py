"""The systemd unit's capabilities: with these five a connection moves, without any one of them it does not."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until

UNIT = Path(__file__).parents[2] / "packaging/systemd/tcpmig-agent.service"
NOBODY = 65534
PORT = 80  # a privileged one


def of_unit(key: str) -> list[str]:
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]


CAPABILITIES = [name.removeprefix("CAP_").lower() for name in of_unit("AmbientCapabilities")[0].split()]


def confined(host: Host, user: int, capabilities: Sequence[str]) -> list[str]:
    """Words that run the words after them in ``host`` with these capabilities and no others."""
    sets = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    words = ["ip", "netns", "exec", host.netns, "setpriv", f"--bounding-set={sets}", f"--inh-caps={sets}"]
    if user:
        words += [f"--reuid={user}", f"--regid={user}", "--clear-groups", f"--ambient-caps={sets}"]
    return [*words, sys.executable, "-m", "migrate.cli"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that everybody may write to."""
    path = Path(tempfile.mkdtemp(prefix="tcpmig-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def net(lan: LanFactory) -> Lan:
    """A floating address at host a, where another user's server echoes on a privileged port."""
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    server = ["socat", f"TCP-LISTEN:{PORT},fork", "EXEC:cat"]
    net.host("a").popen(["setpriv", f"--reuid={NOBODY - 1}", "--clear-groups", *bind_service(), *server])
    until(lambda: f":{PORT}" in net.host("a").run(["ss", "-Hltn"]).stdout, what="the server listens")
    return net


def bind_service() -> list[str]:
    return ["--inh-caps=-all,+net_bind_service", "--ambient-caps=-all,+net_bind_service"]


def dump(net: Lan, file: Path, user: int, capabilities: Sequence[str]) -> subprocess.CompletedProcess[str]:
    words = ["dump", "--local", f"{net.vip4}:{PORT}", "--state", "ESTABLISHED", "-o", str(file), "--steer", "vip:eth0"]
    command = [*confined(net.host("a"), user, capabilities), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def restore(net: Lan, file: Path, user: int, capabilities: Sequence[str]) -> int:
    words = ["restore", str(file), "--detach", "--steer", "vip:eth0", "--", "cat"]
    command = [*confined(net.host("b"), user, capabilities), *words]
    # Not captured: the adopting command would inherit the pipe.
    return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode


def connect(net: Lan) -> socket.socket:
    with net.host("client").entered():
        sock = socket.create_connection((net.vip4, PORT), timeout=10)
    sock.sendall(b"before")
    assert sock.recv(6) == b"before"
    return sock


def test_they_are_all_it_has() -> None:
    assert of_unit("CapabilityBoundingSet") == of_unit("AmbientCapabilities")
    assert of_unit("User") == ["tcpmig"]
    assert of_unit("NoNewPrivileges") == ["yes"]


def test_they_are_enough_for_an_ordinary_user(net: Lan, directory: Path) -> None:
    with connect(net) as sock:
        done = dump(net, directory / "record", NOBODY, CAPABILITIES)
        assert done.returncode == 0, done.stderr
        assert restore(net, directory / "record", NOBODY, CAPABILITIES) == 0
        sock.sendall(b"after")
        assert sock.recv(5) == b"after"


LACKING = {
    "net_admin": "needs CAP_NET_ADMIN",
    "net_raw": "needs CAP_NET_RAW",
    "sys_ptrace": "no process has it open",
    "dac_read_search": "no process has it open",
    "net_bind_service": "",  # only the restore needs it
}


@pytest.mark.parametrize("missing", CAPABILITIES)
def test_none_can_be_spared(net: Lan, directory: Path, missing: str) -> None:
    """Asked of root, to whom files are no obstacle; what it does lack changes nothing."""
    rest = [name for name in CAPABILITIES if name != missing]
    with connect(net) as sock:
        done = dump(net, directory / "record", 0, rest)
        if LACKING[missing]:
            assert done.returncode != 0
            assert LACKING[missing] in done.stderr
            sock.sendall(b"still here")
            assert sock.recv(10) == b"still here"
        else:
            assert done.returncode == 0, done.stderr
            assert restore(net, directory / "record", 0, rest) == 4
