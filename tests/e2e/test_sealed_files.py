"""tcpmig dump, show and restore with --key and --path-state: the connection lives on, and the file tells nothing."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrate.sealed import Key, read_records, write_records
from tests.fix_netns import Lan, LanFactory

TCPMIG = [sys.executable, "-m", "migrate.cli"]
SECRET = b"what nobody else shall read"
SERVER = """
import socket, sys
listener = socket.create_server(("", 8080))
print("ready", flush=True)
sock = listener.accept()[0]
sock.recv(1)
print("read", flush=True)
listener.accept()
"""
# It answers with its threshold and its congestion window, then everything it reads.
OWNER = """
import os, socket
info = socket.socket(fileno=os.dup(0)).getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
os.write(1, info[76:84])
while data := os.read(0, 1000):
    os.write(1, data)
"""


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    return path


def tcpmig(*words: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*TCPMIG, *words], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_a_connection_goes_through_a_sealed_file(lan: LanFactory, key: Path, tmp_path: Path) -> None:
    net = lan("client", "a", "b")
    file, other = tmp_path / "conns.ici", tmp_path / "other"
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    with _connected(net) as sock:
        a, b = net.host("a"), net.host("b")
        words = ["--netns", a.netns, "--local", f"{net.vip4}:8080", "--hold", "5", "--state", "ESTABLISHED"]
        refused = tcpmig("dump", *words, "-o", file, "--key", tmp_path / "none")
        assert (refused.returncode, file.exists()) == (1, False)
        done = tcpmig("dump", *words, "-o", file, "--key", key)
        assert done.returncode == 0, done.stderr
        data = file.read_bytes()
        assert data.startswith(b"\x8aICS") and SECRET not in data
        assert file.stat().st_mode & 0o777 == 0o600

        shown = _shown(tcpmig("show", file, "--json", "--key", key))
        assert shown["received_bytes"] == len(SECRET)
        attempts: list[tuple[list[str | Path], str]] = [
            (["show", file], "--key FILE"),
            (["show", file, "--key", other], "another key"),
            (["restore", file, "--netns", b.netns, "--hold-open"], "--key FILE"),
            (["restore", file, "--netns", b.netns, "--hold-open", "--key", other], "another key"),
        ]
        for attempt, said in attempts:
            failed = tcpmig(*attempt)
            assert failed.returncode == 1
            assert said in failed.stderr

        for damaged, said in [(data[:-1], "ends within"), (data[:-1] + bytes([data[-1] ^ 1]), "was changed")]:
            bad = tmp_path / "bad.ici"
            bad.write_bytes(damaged)
            failed = tcpmig("restore", bad, "--netns", b.netns, "--hold-open", "--key", key)
            assert failed.returncode == 1
            assert said in failed.stderr

        net.withdraw(a, net.vip4)
        _on_a_well_known_path(file, key)
        owned: list[str | Path] = [
            "restore",
            file,
            "--netns",
            b.netns,
            "--detach",
            "--steer",
            "vip:eth0",
            "--key",
            key,
            "--path-state",
        ]
        command = [*TCPMIG, *owned, "--", sys.executable, "-c", OWNER]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0
        with sock.makefile("rb") as stream:
            assert struct.unpack("=II", stream.read(8)) == (77, 200)
            assert stream.read(len(SECRET)) == SECRET


def _connected(net: Lan) -> socket.socket:
    a = net.host("a")
    net.assign(a, net.vip4)
    server = a.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline() == b"ready\n"
    with net.host("client").entered():
        sock = socket.create_connection((net.vip4, 8080), timeout=10)
    sock.sendall(b"!")
    assert server.stdout.readline() == b"read\n"
    sock.sendall(SECRET)
    return sock


def _on_a_well_known_path(file: Path, key: Path) -> None:
    """Rewrite the record, as of a connection that has sent much, on a host whose clock is ahead."""
    opened = Key.read(str(key))
    with file.open("rb") as stream:
        (record,) = read_records(stream, opened)
    record.cwnd, record.ssthresh, record.max_window = 200, 77, 1 << 20
    record.origin_time += 3600 * 10**9
    with file.open("wb") as stream:
        write_records(stream.fileno(), [record], opened)


def _shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_plain_records_where_sealed_ones_are_expected(key: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.ici"
    file.write_bytes(bytes.fromhex((Path(__file__).parents[1] / "vectors/ici/good/example.hex").read_text()))
    assert tcpmig("show", file).returncode == 0
    failed = tcpmig("show", file, "--key", key)
    assert failed.returncode == 1
    assert "leave the key out" in failed.stderr
