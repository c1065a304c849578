"""The main job with Debian's own programs: they know nothing of tcpmig, and their peers notice nothing of the moves."""

from __future__ import annotations

import hashlib
import json
import random
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.fourtuple import FourTuple
from migrate.steer.vip import Vip
from tests.fix_netns import Host, Lan, LanFactory
from tests.fix_programs import Content, Programs
from tests.moving import Mover
from tests.peers import Peer, connect, digest, noise
from tests.waiting import until

TCPMIG = [sys.executable, "-m", "migrate.cli"]
REQUESTS, MOVES = 1000, 20
STREAM = 256 << 20  # bytes each way


class Commands:
    """The floating address, and tcpmig's commands that move connections of it from host to host."""

    def __init__(self, net: Lan, directory: Path) -> None:
        self.net = net
        self._directory = directory
        self._count = 0
        with Vip("eth0", namespace=net.host("a").netns) as vip:
            vip.announce(socket.inet_aton(net.vip4))

    def tcpmig(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One command, its output as text."""
        done = subprocess.run([*TCPMIG, *words], capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def dump(self, host: Host, *words: str) -> Path:
        """Take a connection and its address from a host; the file it is in."""
        self._count += 1
        file = self._directory / f"{self._count}.ici"
        self.tcpmig("dump", *words, "-o", file, "--netns", host.netns, "--hold", "5", "--steer", "vip:eth0")
        return file

    def restore(self, host: Host, file: Path, *command: str) -> None:
        """Bring them to another, the connection owned by a command that goes on in the background."""
        words: list[str | Path] = [
            "restore",
            file,
            "--netns",
            host.netns,
            "--detach",
            "--steer",
            "vip:eth0",
            "--",
            *command,
        ]
        # Not captured: the command would inherit the pipe, and whoever reads it wait for the command.
        assert subprocess.run([*TCPMIG, *words], stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0

    def list(self, host: Host, *selector: str) -> list[dict[str, Any]]:
        """What `tcpmig list --json` says."""
        listed = self.tcpmig("list", "--netns", host.netns, "--json", *selector).stdout
        return [json.loads(line) for line in listed.splitlines()]


@pytest.fixture
def commands(lan: LanFactory, tmp_path: Path) -> Iterator[Commands]:
    yield Commands(lan("client", "a", "b"), tmp_path)


def test_nginx_keep_alive(commands: Commands, programs: Programs, content: Content, tmp_path: Path) -> None:
    """curl makes 1,000 requests over one connection that moves twenty times between two hosts' nginx."""
    client, a, b = (commands.net.host(name) for name in ("client", "a", "b"))
    servers = {host.name: programs.nginx(host, content) for host in (a, b)}
    chance = random.Random(7)
    names = [chance.choice(list(content.digests)) for _ in range(REQUESTS)]
    answers = tmp_path / "answers"
    answers.mkdir()
    requests = tmp_path / "requests"
    requests.write_text(
        "".join(
            f'url = "http://{commands.net.vip4}/{name}"\noutput = "{answers}/{i}"\n' for i, name in enumerate(names)
        )
    )
    with commands.net.capture("client") as capture:
        command: list[str | Path] = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--config",
            requests,
            "--rate",
            "25/s",
        ]
        curl = client.popen(
            [*command, "--write-out", "%{local_port} %{num_connects}\n"], stdout=subprocess.PIPE, text=True
        )
        here, there = a, b
        selector = ["--local", f"{commands.net.vip4}:80", "--state", "ESTABLISHED"]
        connection = until(lambda: commands.list(here, *selector), what="curl's connection")[0]
        name = f"{connection['local']},{connection['remote']}"
        for _ in range(MOVES):
            file = commands.dump(here, name, "--when-quiet", "10")
            commands.restore(there, file, "socat", "-", "TCP:127.0.0.1:80")
            here, there = there, here
        assert curl.poll() is None, "curl was through before the moves were"
        output, _ = curl.communicate(timeout=120)
    assert curl.returncode == 0
    ports, connects = zip(*(line.split() for line in output.splitlines()), strict=True)
    assert set(ports) == {str(FourTuple.parse(name).remote_port)}
    assert sum(map(int, connects)) == 1
    for number, wanted in enumerate(names):
        assert hashlib.sha256((answers / str(number)).read_bytes()).hexdigest() == content.digests[wanted], number
    assert not [segment for segment in capture.rsts if segment.flow[1] == FourTuple.parse(name).remote_port]
    complaints = [line for server in servers.values() for line in server.errors()]
    assert not [line for line in complaints if "Software caused connection abort" not in line]


def test_inetd_style(commands: Commands) -> None:
    """`restore FILE -- cat` answers what had arrived unread, what arrives during the move, and what comes after."""
    client, a, b = (commands.net.host(name) for name in ("client", "a", "b"))
    with a.entered():
        listener = socket.create_server((commands.net.vip4, 7))
    with listener, client.entered():
        sock = socket.create_connection((commands.net.vip4, 7), timeout=10)
        accepted, _ = listener.accept()
    with sock, accepted:
        sock.sendall(b"before ")
        name = f"{commands.net.vip4}:7,{client.ip4}:{sock.getsockname()[1]}"
        until(lambda: commands.list(a, name)[0]["recv_queue"] == 7)
        file = commands.dump(a, name)
        with pytest.raises(ConnectionAbortedError):
            accepted.recv(100)
        sock.sendall(b"during ")
        commands.restore(b, file, "cat")
        sock.sendall(b"after")
        sock.shutdown(socket.SHUT_WR)
        echoed = b""
        while data := sock.recv(100):
            echoed += data
        assert echoed == b"before during after"


def test_the_client_side_moves_too(commands: Commands, programs: Programs, tmp_path: Path) -> None:
    """An idle redis-cli's connection goes to another host, where a script goes on with it."""
    client, a, b = (commands.net.host(name) for name in ("client", "a", "b"))
    programs.redis(client)
    # redis-cli has no option for its own address: let the route choose the one that moves.
    a.run(["ip", "route", "replace", f"{client.ip4}/32", "dev", "eth0", "src", commands.net.vip4])
    cli = a.popen(["redis-cli", "-h", client.ip4], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert cli.stdin and cli.stdout
    cli.stdin.write("CLIENT SETNAME traveller\nSELECT 3\nSET greeting hello\n")
    cli.stdin.flush()
    assert [cli.stdout.readline() for _ in range(3)] == ["OK\n"] * 3
    file = commands.dump(a, "--remote", f"{client.ip4}:6379")
    script = 'printf "GET greeting\\r\\nCLIENT GETNAME\\r\\nQUIT\\r\\n"; exec cat > "$0"'
    answers = tmp_path / "answers"
    commands.restore(b, file, "sh", "-c", script, str(answers))
    expected = b"$5\r\nhello\r\n$9\r\ntraveller\r\n+OK\r\n"
    until(lambda: answers.exists() and answers.stat().st_size >= len(expected))
    assert answers.read_bytes() == expected


def test_streams(lan: LanFactory) -> None:
    """A server that owns its socket moves it between two of its reads, twenty times, under 256 MiB each way."""
    net = lan("client", "a", "b")
    with Mover(net.host("a"), net.host("b"), net.vip4) as mover, net.capture("client") as capture:
        client, server = connect(net.host("client"), net.host("a"), net.vip4)
        with client:
            peer = Peer(client, send=STREAM, receive=STREAM, seed=1)
            received = hashlib.sha256()
            count = moves = 0
            sender = _Sender(server, STREAM)
            while count < STREAM:
                data = server.recv(1 << 16)
                received.update(data)
                count += len(data)
                if count > (moves + 1) * STREAM // (MOVES + 2):
                    server = sender.change(mover.move)
                    moves += 1
            sender.join()
            peer.join()
        server.close()
    assert moves == MOVES + 1
    assert received.hexdigest() == digest(noise(1), STREAM)
    assert peer.received_digest == digest(noise(2), STREAM)
    assert not capture.rsts


class _Sender:
    """Sends noise in a thread of its own, and stands still between two writes while the socket is changed."""

    def __init__(self, sock: socket.socket, length: int) -> None:
        self._socket, self._length = sock, length
        self._turn = threading.Lock()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def change(self, move: Callable[[socket.socket], socket.socket]) -> socket.socket:
        with self._turn:
            self._socket = move(self._socket)
            return self._socket

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self._errors

    def _run(self) -> None:
        try:
            left = memoryview(b"")
            stream, count = noise(2), 0
            while count < self._length:
                left = left or memoryview(next(stream))[: self._length - count]
                with self._turn:
                    try:
                        sent = self._socket.send(left, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        sent = 0
                    sock = self._socket
                if not sent:
                    select.select((), (sock,), (), 0.01)
                left, count = left[sent:], count + sent
        except BaseException as error:
            self._errors.append(error)
