"""The commands of docs/nat.md: a connection behind a DNAT load balancer goes on at another address."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.balancer import CLIENT, balanced
from tests.fix_agents import Agents
from tests.fix_netns import Host, Lan, LanFactory
from tests.waiting import until

ROOT = Path(__file__).parents[2]
SERVER = """
import socket, sys
listener = socket.create_server(("", 8080))
print("ready", flush=True)
sock = listener.accept()[0]
while data := sock.recv(100):
    sock.send(b"a: " + data)
"""
ECHO = "import os\nwhile data := os.read(0, 100):\n    os.write(1, b'b: ' + data)"


def commands(section: str) -> list[tuple[str, list[str]]]:
    """(host, command) of each line of the page's example, in order."""
    page = (ROOT / "docs" / "nat.md").read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    lines = re.findall(r"^ +(\w+)# (.*)$", page.replace("\\\n", " "), re.MULTILINE)
    return [(host, shlex.split(line)) for host, line in lines]


def test_a_connection_behind_dnat_gets_another_address(lan: LanFactory, tmp_path: Path) -> None:
    net = balanced(lan)
    lb, a, b = (net.host(name) for name in ("lb", "a", "b"))
    todo = commands("A DNAT load balancer")
    _run(lb, todo.pop(0)[1])
    with _asking(net, a) as sock, net.capture("client") as wire:
        for host, command in todo:
            if "restore" in command:
                net.host(host).popen(_tcpmig(command, tmp_path))
                until(lambda: "ESTAB" in b.run(["ss", "-tn"]).stdout, what="it is restored")
            else:
                _run(net.host(host), _tcpmig(command, tmp_path))
        assert _ask(sock, b"two") == b"b: two"
        assert f"src={b.ip4} dst={CLIENT[4]} sport=8080" in _run(lb, ["conntrack", "-L"])
        assert not wire.rsts


def test_agents_do_the_same(lan: LanFactory, agents: Agents) -> None:
    net = balanced(lan)
    lb, a, b = (net.host(name) for name in ("lb", "a", "b"))
    child = shlex.join([sys.executable, "-c", ECHO])
    mover = agents(a)
    agents(b, adopt=[f"{b.ip4}:8080=child:{child}"])
    _run(lb, commands("A DNAT load balancer")[0][1])
    with _asking(net, a) as sock, net.capture("client") as wire:
        for host, command in commands("The same between two agents"):
            if command[0] == "tcpmig":
                done = mover.tcpmig(*command[1:])
                assert done.code == 0, done
            else:
                _run(net.host(host), command)
        assert _ask(sock, b"two") == b"b: two"
        assert not wire.rsts


@contextlib.contextmanager
def _asking(net: Lan, server: Host) -> Iterator[socket.socket]:
    """The page's client, which has had its first answer."""
    process = server.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    with net.host("client").entered():
        sock = socket.socket()
    with sock:
        sock.bind((CLIENT[4], 40000))
        sock.settimeout(10)
        sock.connect((net.vip4, 80))
        assert _ask(sock, b"one") == b"a: one"
        yield sock


def _ask(sock: socket.socket, question: bytes) -> bytes:
    sock.send(question)
    return sock.recv(100)


def _tcpmig(command: list[str], directory: Path) -> list[str]:
    command = [str(directory / "FILE") if word == "FILE" else word for word in command]
    if command[-1] == "CMD":
        command[-1:] = [sys.executable, "-c", ECHO]
    return [sys.executable, "-m", "migrate.cli", *command[1:]] if command[0] == "tcpmig" else command


def _run(host: Host, command: list[str]) -> str:
    return host.run(command).stdout
