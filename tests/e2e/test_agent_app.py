"""Agents move the connections of applications that take part: again and again, in the middle of a body."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from migrate.agent.client import Client
from migrate.agent.v1 import migration_pb2
from migrate.kernel.diag import Connection, list_connections
from migrate.selection import Selector
from tests import taking_part_http
from tests.e2e.test_agent_move import VIP
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Host, Lan, LanFactory
from tests.taking_part_http import BLOCK, ITEMS, Digest, block, item
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PORT = 8080
PHASES = (60, 70, 70)  # moves while curl asks, uploads, downloads
BLOCKS = 3200  # of an upload and of a download: 200 MiB


def start(host: Host, program: str, *words: str | Path) -> subprocess.Popen[str]:
    """A program that takes part, when it is ready."""
    process = host.popen(
        [sys.executable, "-m", program, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def upload() -> Iterator[bytes]:
    return map(block, range(BLOCKS, 2 * BLOCKS))


class Curl:
    """curl with all its requests over one connection."""

    def __init__(self, net: Lan, directory: Path) -> None:
        self.output = directory / "output"
        source = directory / "upload"
        with source.open("wb") as file:
            file.writelines(upload())
        asking, uploading, downloading = PHASES
        to = f"http://{net.vip4}:{PORT}"
        config = directory / "curlrc"
        each = 'header = "Expect:"\nwrite-out = "%{stderr}%{local_port} %{num_connects} %{response_code}\\n"'
        requests = [
            f'url = "{to}/item/[1-{ITEMS}]?after=0&moves={asking}"',
            f'url = "{to}/upload/1?after={asking}&moves={uploading}"\nupload-file = "{source}"',
            # curl is the slower one, so that much is unsent and unacknowledged whenever the connection moves
            f'url = "{to}/noise/{BLOCKS * BLOCK}?after={asking + uploading}&moves={downloading}"\nlimit-rate = "60M"',
        ]
        config.write_text("\nnext\n".join(f"{request}\nsilent\nshow-error\n{each}" for request in requests))
        self.said = directory / "said"
        with self.output.open("wb") as output, self.said.open("wb") as said:
            self.process = net.host("client").popen(["curl", "-K", config], stdout=output, stderr=said)

    def check(self) -> None:
        """It has had the right bytes, all over one connection."""
        assert self.process.wait(60) == 0, self.said.read_text()
        ports, connects, codes = zip(*map(str.split, self.said.read_text().splitlines()), strict=True)
        assert len(codes) == ITEMS + 2
        assert set(codes) == {"200"}
        assert len(set(ports)) == 1
        assert sum(map(int, connects)) == 1
        digest = Digest()
        for each in upload():
            digest.update(each)
        expected = hashlib.sha256(b"".join(map(item, range(1, ITEMS + 1))) + f"{digest.hexdigest()}\n".encode())
        for number in range(BLOCKS):
            expected.update(block(number))
        with self.output.open("rb") as output:
            assert hashlib.file_digest(output, "sha256").hexdigest() == expected.hexdigest()


def moved(at: Client, chosen: Selector, to: Agent) -> migration_pb2.Summary:
    """Move it by the library's call."""
    *_, last = at.migrate(chosen, to.address, steer=VIP)
    return last.summary


@pytest.mark.timeout(240)
def test_two_hundred_moves_in_a_row(lan: LanFactory, agents: Agents, tmp_path: Path) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    gate = tmp_path / "gate"
    gate.write_text("0")
    paths = {name: tmp_path / f"app-{name}" / "socket" for name in "ab"}
    a, b = (agents(net.host(name), adopt=[f"{net.vip4}:{PORT}=unix:{path}"]) for name, path in paths.items())
    for name, path in paths.items():
        listen = ["listen"] if name == "a" else []
        start(net.host(name), taking_part_http.__name__, path, net.vip4, str(PORT), gate, *listen)
    net.host("client").sysctl("net.ipv4.tcp_rmem", "4096 65536 262144")  # or it took in all there is at once
    curl = Curl(net, tmp_path)

    def connection(host: Host) -> Connection | None:
        with host.entered():
            return next((each for each in list_connections() if each.four_tuple.local_port == PORT), None)

    def flows(host: Host) -> bool:
        found = connection(host)
        return found is not None and found.recv_queue + found.send_queue > BLOCK

    first = until(lambda: connection(a.host), what="curl is connected")
    assert first is not None
    chosen = Selector(connection=first.four_tuple)
    bulk = []
    with Client(f"unix:{a.socket}") as at_a, Client(f"unix:{b.socket}") as at_b:
        for number in range(sum(PHASES)):
            at, to = (at_a, b) if number % 2 == 0 else (at_b, a)
            if number >= PHASES[0]:
                with contextlib.suppress(AssertionError):  # most are enough, see below
                    until(partial(flows, (a if at is at_a else b).host), within=1)
            summary = moved(at, chosen, to)
            assert summary.done == 1, (number, summary)
            aside = tmp_path / "gate.new"
            aside.write_text(str(number + 1))
            aside.rename(gate)
            if number >= PHASES[0]:
                bulk.append(summary.bytes)
    curl.check()
    assert sum(size > BLOCK for size in bulk) > len(bulk) / 2, "data was on its way at most moves"
