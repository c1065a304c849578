"""The commands of docs/nat.md: a connection behind a DNAT load balancer goes on at another address."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrate import relocate
from migrate.errors import UsageError
from migrate.ici import Ici
from tests.fix_netns import Host, LanFactory, ip
from tests.waiting import until

ROOT = Path(__file__).parents[2]
CLIENT, OUTSIDE = "10.1.0.1", "10.1.0.2"
SERVER = """
import socket, sys
listener = socket.create_server(("", 8080))
print("ready", flush=True)
sock = listener.accept()[0]
while data := sock.recv(100):
    sock.send(b"a: " + data)
"""
ECHO = "import os\nwhile data := os.read(0, 100):\n    os.write(1, b'b: ' + data)"


def commands() -> list[tuple[str, list[str]]]:
    """(host, command) of each line of the page's example, in order."""
    page = (ROOT / "docs" / "nat.md").read_text().partition("## A DNAT")[2].replace("\\\n", " ")
    return [(host, shlex.split(line)) for host, line in re.findall(r"^ +(\w+)# (.*)$", page, re.MULTILINE)]


def test_a_connection_behind_dnat_gets_another_address(lan: LanFactory, tmp_path: Path) -> None:
    net = lan("lb", "a", "b", "client")
    lb, a, b, client = (net.host(name) for name in ("lb", "a", "b", "client"))
    net.assign(lb, net.vip4)
    ip([f"address add {CLIENT}/24 dev {client.dev}", f"route add {net.vip4} via {OUTSIDE}"], namespace=client.netns)
    ip([f"address flush dev {client.dev} to 10.0.0.0/24"], namespace=client.netns)
    ip([f"address add {OUTSIDE}/24 dev {lb.dev}"], namespace=lb.netns)
    lb.sysctl("net.ipv4.ip_forward", 1)
    for backend in (a, b):
        ip([f"route add 10.1.0.0/24 via {lb.ip4}"], namespace=backend.netns)
    lb.run(["nft", "table ip nat { chain prerouting { type nat hook prerouting priority dstnat; }; }"])
    todo = commands()
    _run(lb, todo.pop(0)[1])
    server = a.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline() == b"ready\n"
    with client.entered(), socket.socket() as sock, net.capture("client") as wire:
        sock.bind((CLIENT, 40000))
        sock.settimeout(10)
        sock.connect((net.vip4, 80))
        assert _ask(sock, b"one") == b"a: one"
        for host, command in todo:
            if "restore" in command:
                net.host(host).popen(_tcpmig(command, tmp_path))
                until(lambda: "ESTAB" in b.run(["ss", "-tn"]).stdout, what="it is restored")
            else:
                _run(net.host(host), _tcpmig(command, tmp_path))
        assert _ask(sock, b"two") == b"b: two"
        assert f"src={b.ip4} dst={CLIENT} sport=8080" in _run(lb, ["conntrack", "-L"])
        assert not wire.rsts


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


def test_another_port_alone_is_no_end_and_neither_is_another_version() -> None:
    record = Ici(4, b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 9, 1, 1, 1)
    relocate.relocate(record, "10.0.0.7")
    assert str(record.four_tuple) == "10.0.0.7:80,10.0.0.2:9"
    relocate.relocate(record, "10.0.0.8:81")
    assert str(record.four_tuple) == "10.0.0.8:81,10.0.0.2:9"
    for wrong in ("[fd00::1]:80", "*:80", "nonsense"):
        with pytest.raises(UsageError):
            relocate.relocate(record, wrong)
    assert str(record.four_tuple) == "10.0.0.8:81,10.0.0.2:9"
