"""The command line moves a whole server: its listener, what waits there, and TIME_WAIT."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest

from migrate.kernel import diag
from migrate.kernel.option_values import md5_key
from migrate.tcpstate import TcpState
from tests.capture import SYN
from tests.fix_netns import Lan, LanFactory
from tests.waiting import until

TCPMIG = [sys.executable, "-m", "migrate.cli"]
PORT = 8000
DEAF = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=9)
print("ready", flush=True)
time.sleep(1000)
"""
ECHO = """
import os, socket, threading
def serve(sock):
    while data := sock.recv(1000):
        sock.send(data)
for number in range(3, 3 + int(os.environ["LISTEN_FDS"])):
    sock = socket.socket(fileno=number)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener = sock
    else:
        threading.Thread(target=serve, args=(sock,)).start()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


class Server:
    """One that never accepts, on the floating address of host a."""

    def __init__(self, net: Lan) -> None:
        self.net, self.a, self.b = net, net.host("a"), net.host("b")
        net.assign(self.a, net.vip4)
        self.process = self.a.popen(
            [sys.executable, "-c", DEAF, net.vip4, str(PORT)], stdout=-1, env={"PYTHONUNBUFFERED": "1"}
        )
        assert self.process.stdout and self.process.stdout.readline() == b"ready\n"

    def connect(self) -> socket.socket:
        with self.net.host("client").entered():
            return socket.create_connection((self.net.vip4, PORT), timeout=10)

    def dump(self, file: Path, *more: str, check: bool = True) -> list[dict[str, object]]:
        command: list[str | Path] = [*TCPMIG, "dump", "--json", "--local", f"{self.net.vip4}:{PORT}", "-o", file, *more]
        done = self.a.run(command, check=check)
        assert check or done.returncode, done
        return [json.loads(line) for line in done.stdout.splitlines()] or [{"said": done.stderr}]


@pytest.fixture
def server(lan: LanFactory) -> Server:
    return Server(lan("client", "a", "b"))


def test_a_server_moves_with_its_queue(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "server.ici"
    with contextlib.ExitStack() as stack, server.net.capture("client") as wire:
        clients = [stack.enter_context(server.connect()) for _ in range(2)]
        for number, client in enumerate(clients):
            client.send(b"hello %d" % number)
        saved = server.dump(file, "--state", "LISTEN", "--steer", "vip:eth0")
        assert len(saved) == 3 and all(each["ok"] for each in saved)
        server.b.popen([*TCPMIG, "restore", file, "--steer", "vip:eth0", "--systemd", "--", sys.executable, "-c", ECHO])
        for number, client in enumerate(clients):
            assert client.recv(100) == b"hello %d" % number
        with server.connect() as newcomer:
            newcomer.send(b"new")
            assert newcomer.recv(100) == b"new"
        assert not wire.rsts


def test_who_connects_meanwhile_tries_again(server: Server, tmp_path: Path) -> None:
    """No listener here any more, and the address not there yet."""
    file = tmp_path / "server.ici"
    with server.net.capture("client") as wire, server.net.host("client").entered(), socket.socket() as newcomer:
        (saved,) = server.dump(file, "--state", "LISTEN", "--hold", "30")
        assert saved["ok"]
        newcomer.setblocking(False)
        with pytest.raises(BlockingIOError):
            newcomer.connect((server.net.vip4, PORT))
        until(lambda: [each for each in wire.segments if each.flags & SYN], what="its SYN")
        server.net.withdraw(server.a, server.net.vip4)
        server.net.assign(server.b, server.net.vip4)
        server.net.host("client").run(["ip", "neigh", "flush", "all"])
        server.b.popen([*TCPMIG, "restore", file, "--systemd", "--", sys.executable, "-c", ECHO])
        newcomer.settimeout(20)
        newcomer.send(b"late")
        assert newcomer.recv(100) == b"late"
        assert not wire.rsts


def test_a_dump_that_fails_keeps_what_it_accepted(server: Server, tmp_path: Path) -> None:
    """The disk is full: what waited in the queue cannot be put back, and is there for another dump."""
    room, file = tmp_path / "room", tmp_path / "server.ici"
    room.mkdir()
    with server.connect() as client, server.net.capture("client") as wire:
        client.send(b"hello")
        small = f"mount -t tmpfs -o size=4k tmpfs {room} && head -c 4096 /dev/zero > {room}/rest; exec "
        command = [*TCPMIG, "dump", "--local", f"{server.net.vip4}:{PORT}", "--state", "LISTEN", "-o", f"{room}/x"]
        done = server.a.run(["unshare", "-m", "sh", "-c", small + shlex.join(command)], check=False)
        assert done.returncode == 1 and "No space left on device" in done.stderr
        found = re.search(r"1 connections .* --pid (\d+)", done.stderr)
        assert found, done.stderr
        with server.connect(), server.a.entered():  # the listener goes on
            until(lambda: len(diag.list_connections(states={TcpState.ESTABLISHED})) == 2)
        (saved,) = server.dump(file, "--pid", found[1], "--steer", "vip:eth0")
        assert saved["ok"]
        until(lambda: not Path("/proc", found[1]).exists(), what="it keeps nothing any more")
        server.b.popen([*TCPMIG, "restore", file, "--steer", "vip:eth0", "--", "cat"])
        assert client.recv(100) == b"hello"
        assert not wire.rsts


def test_an_owner_that_never_accepts_is_waited_for_in_vain(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "server.ici"
    with server.connect() as client:
        said = server.dump(file, "--state", "LISTEN", "--wait-handshakes", "0.2", check=False)
        assert "1 connections not accepted" in str(said[0])
        assert not file.exists()
        with server.connect() as other, server.a.entered():
            until(lambda: len(diag.list_connections(states={TcpState.ESTABLISHED})) == 2, what="it goes on")
            assert other and client


def test_time_wait_goes_along(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "over.ici"
    with server.net.host("client").entered():
        listener = socket.create_server(("", 0))
    with listener, server.a.entered():
        ours = socket.create_connection(
            (server.net.host("client").ip4, listener.getsockname()[1]), source_address=(server.net.vip4, 0)
        )
        peer = listener.accept()[0]
    ours.close()
    peer.close()
    with server.a.entered():
        (over,) = until(lambda: diag.list_connections(states={TcpState.TIME_WAIT}))
    command: list[str | Path] = [*TCPMIG, "dump", "--json", str(over.four_tuple), "-o", file, "--steer", "vip:eth0"]
    assert json.loads(server.a.run(command).stdout)["ok"]
    done = server.b.run([*TCPMIG, "restore", "--json", file, "--steer", "vip:eth0", "--hold-open"])
    assert json.loads(done.stdout) == {"v": 1, "connection": str(over.four_tuple), "ok": True}
    with server.b.entered():
        made = diag.find(over.four_tuple)
    assert made and made.state is TcpState.TIME_WAIT


def test_restore_waits_for_the_address(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "early.ici"
    with server.connect() as client:
        client.send(b"early")
        server.dump(file, "--state", "LISTEN", "--hold", "20")
        command: list[str | Path] = [*TCPMIG, "restore", file, "--before-address", "--systemd"]
        command += ["--", sys.executable, "-c", ECHO]
        server.b.popen(command)
        until(
            lambda: f":{PORT}" in server.b.run(["ss", "-Htn"]).stdout, what="it is rebuilt before its address is here"
        )
        server.net.withdraw(server.a, server.net.vip4)
        server.net.assign(server.b, server.net.vip4)
        server.net.host("client").run(["ip", "neigh", "flush", "all"])
        assert client.recv(10) == b"early"


def test_a_signed_connection_is_refused_before_it_is_touched(server: Server, tmp_path: Path) -> None:
    with server.net.host("client").entered(), server.a.entered():
        listener = socket.create_server((server.net.vip4, 0))
    file = tmp_path / "signed.ici"
    with listener, server.net.host("client").entered(), socket.socket() as client:
        ends = (listener, server.net.host("client").ip4), (client, server.net.vip4)
        for sock, remote in ends:
            sock.setsockopt(socket.IPPROTO_TCP, 14, md5_key(socket.inet_aton(remote), b"a secret"))
        client.settimeout(10)
        client.connect(listener.getsockname())
        with listener.accept()[0] as ours:
            chosen = ["--local", "{}:{}".format(*ours.getsockname()), "--state", "ESTABLISHED"]
            (listed,) = server.a.run([*TCPMIG, "list", "--json", *chosen]).stdout.splitlines()
            assert not json.loads(listed)["migratable"] and "TCP-MD5" in json.loads(listed)["reason"]
            done = server.a.run([*TCPMIG, "dump", *chosen, "-o", file], check=False)
            assert done.returncode == 1 and "TCP-MD5" in done.stderr and "a secret" not in done.stderr
            assert not file.exists()
            ours.send(b"as before")
            assert client.recv(100) == b"as before"
