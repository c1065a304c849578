"""`tcpmig demo`: it runs, it can tell a failure, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from migrate.demo import web
from migrate.demo.network import ADDRESS, Network, ResetCounter
from migrate.demo.traffic import Plan, Traffic
from migrate.kernel import netns
from tests.waiting import until

COMMAND: list[str | Path] = [sys.executable, "-m", "migrate.cli", "demo"]


def remains(environment: dict[str, str]) -> list[str]:
    """What lies in that temporary directory, and the processes that know of it.

    By their environment, or by a file that they have open there: nginx writes over its environment.
    """
    mark = f"TMPDIR={environment['TMPDIR']}".encode()
    found = os.listdir(environment["TMPDIR"])
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            known = mark in (process / "environ").read_bytes().split(b"\0")
            if known or any(file.startswith(environment["TMPDIR"]) for file in files):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    directory = tmp_path / "temporary"
    directory.mkdir()
    return {**os.environ, "TMPDIR": str(directory)}


def test_a_hundred_connections(environment: dict[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    command = [*COMMAND, "--connections", "100", "--json", "--svg", picture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {name: result[name] for name in ("v", "ok", "connections", "moved", "lost", "resets", "failures")} == {
        "v": 1,
        "ok": True,
        "connections": 100,
        "moved": 100,
        "lost": 0,
        "resets": 0,
        "failures": [],
    }
    assert result["answers"] > 1000 and result["bytes_verified"] > 1_000_000
    assert 0 < result["freeze_p50_ms"] <= result["freeze_p99_ms"] <= result["freeze_max_ms"]
    assert 0 <= result["blackout_p50_ms"] <= result["blackout_p99_ms"] <= result["blackout_max_ms"]
    assert "100 of 100 moved" in done.stderr
    assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert remains(environment) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_takes_all_down(number: int, environment: dict[str, str], tmp_path: Path) -> None:
    # What a shell starts in the background ignores SIGINT, and so would all that this suite starts.
    command = ["env", "--default-signal", *COMMAND, "--connections", "100", "--svg", tmp_path / "picture.svg"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr
        until_moving(demo.stderr)
        assert len(remains(environment)) == 12  # itself, four namespaces, two nginx of two, clients, relay, directory
        demo.send_signal(number)
        words = demo.stderr.read()
        assert demo.wait(30) == 130
    assert "Traceback" not in words
    assert remains(environment) == []


def test_killed_it_leaves_no_process(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "--connections", "100", "--svg", tmp_path / "picture.svg"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr
        until_moving(demo.stderr)
        demo.kill()
    files = len(os.listdir(environment["TMPDIR"]))
    until(lambda: len(remains(environment)) == files, what="its processes end")


def until_moving(lines: Iterator[str]) -> None:
    """Read what the demo says up to the first batch that has moved."""
    for line in lines:
        if "moved" in line:
            return
    raise AssertionError("it never moved anything")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--connections", "0"], "between 1 and"),
        (["--connections", "many"], "many"),
        (["--svg", "/nowhere/at/all.svg"], "cannot be written"),
        (["--svg", "/"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_at_once(words: list[str], complaint: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def test_resets_on_the_wire_are_counted(network: Network) -> None:
    with ResetCounter(network.client) as resets, netns.entered(network.client.netns):
        for expected in (1, 2):
            with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
                sock.connect((ADDRESS, 81))
            assert resets.count() == expected


def test_the_clients_notice_a_wrong_byte(network: Network, tmp_path: Path) -> None:
    with ExitStack() as opened:
        digests = web.make_files(tmp_path / "files")
        web.serve(network.a, tmp_path / "files", tmp_path / "A", 256, opened)
        for number in range(0, len(digests), 2):
            with (tmp_path / "files" / str(number)).open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]))
        traffic = Traffic(network.client, Plan(ADDRESS, web.PORT, 20, 0.05, digests))
        opened.callback(traffic.close)
        until(lambda: segments(network) > 1000, what="traffic")
        report = traffic.end()
    assert len(report.answers) > 100
    assert report.failures and all("has the wrong digest" in why for why in report.failures.values())


def segments(network: Network) -> int:
    """That have come to host A so far."""
    with netns.entered(network.a.netns):
        names, values = (
            line.split()
            for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
            if line.startswith("Tcp:")
        )
    return int(values[names.index("InSegs")])
