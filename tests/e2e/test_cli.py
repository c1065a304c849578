"""The commands as users and scripts see them: what they print, and that a record is used once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.fourtuple import FourTuple
from migrate.ici import FIELDS, Ici, read_records
from migrate.kernel import sockopt
from migrate.kernel.nft import tables
from tests.fix_netns import Lan
from tests.killing import Killer, Run
from tests.peers import connect
from tests.waiting import until


class Scene:
    """A client, hosts a and b that both have the floating address, so that nothing need be steered."""

    def __init__(self, net: Lan, killer: Killer, directory: Path) -> None:
        self.net, self.killer, self.directory = net, killer, directory
        self.count = 0

    def connection(self, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket, str]:
        client, server = connect(self.net.host("client"), self.net.host("a"))
        client.settimeout(10)
        server.settimeout(10)
        stack.enter_context(client)
        stack.enter_context(server)
        return client, server, str(FourTuple.parse("{}:{},{}:{}".format(*server.getsockname(), *server.getpeername())))

    def run(self, verb: str, *words: str | Path, code: int | None = 0) -> Run:
        run = self.killer.run(verb, "--netns", self.net.host("a").netns, *words)
        assert code is None or run.code == code, run
        return run

    def dump(self, name: str, *words: str | Path) -> tuple[Path, Ici]:
        self.count += 1
        file = self.directory / f"{self.count}.ici"
        self.run("dump", name, "-o", file, "--hold", "20", *words)
        with file.open("rb") as opened:
            (record,) = read_records(opened)
        return file, record

    def restore(self, file: Path, *words: str, code: int = 0) -> Run:
        return self.run("restore", file, "--detach", *words, "--", "cat", code=code)

    def owner(self, name: str) -> int:
        """The process that has the connection."""
        (line,) = self.run("list", name, "--json").stdout.splitlines()
        return int(json.loads(line)["owners"][0]["pid"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        net = Lan(("client", "a"))
        stack.callback(net.close)
        state = tmp_path_factory.mktemp("state") / "made" / "by the command"
        killer = stack.enter_context(Killer({"TCPMIG_STATE": str(state)}))
        scene = Scene(net, killer, tmp_path_factory.mktemp("cli"))
        yield scene
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()} == {0o600}
        with net.host("a").entered():
            until(lambda: not tables(), what="no hold is left", within=30)


def says(client: socket.socket, data: bytes) -> bool:
    client.sendall(data)
    return client.recv(100) == data


def test_a_record_is_used_once(scene: Scene) -> None:
    """Each move has an epoch of its own; what was restored, and what is older, is refused, also once it has ended."""
    with contextlib.ExitStack() as stack:
        client, _, name = scene.connection(stack)
        first, record = scene.dump(name)
        assert (len(record.id), record.epoch) == (16, 1)
        scene.restore(first)
        assert says(client, b"one")
        second, again = scene.dump(name)
        assert (again.id, again.epoch) == (record.id, 2)
        refused = scene.restore(first, code=1)
        assert refused.stderr == (
            f"tcpmig: {name}: this record was restored here before\n"
            "  hint: a second time it would make a ghost of the connection; --again does it all the same\n"
        )
        scene.restore(second)
        assert says(client, b"two")
        third, again = scene.dump(name)
        assert (again.id, again.epoch) == (record.id, 3)
        assert "restored here before, and a newer one, of epoch 2, after it" in scene.restore(first, code=1).stderr
        scene.restore(third)
        assert says(client, b"three")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    until(lambda: not scene.run("list", name).stdout.count("ESTABLISHED"))
    for file in (first, second, third):
        assert "restored here before" in scene.restore(file, code=1).stderr
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


def test_again_does_it_all_the_same(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        client, _, name = scene.connection(stack)
        file, _ = scene.dump(name)
        scene.restore(file)
        _, record = scene.dump(name)
        assert record.epoch == 2
        scene.restore(file, "--again")
        assert says(client, b"again")


def test_other_namespaces_remember_other_things(scene: Scene) -> None:
    """What host a saw is no business of another host's."""
    with contextlib.ExitStack() as stack:
        client, _, name = scene.connection(stack)
        file, _ = scene.dump(name)
        scene.restore(file)
        elsewhere = scene.net.host("client").netns
        run = scene.killer.run("restore", file, "--netns", elsewhere, "--hold", "0", "--", "cat")
        assert run.code == 4 and "this host does not have the address" in run.stderr
        assert says(client, b"here")


def test_there_and_back_within_the_hold(scene: Scene) -> None:
    """A restore does not wait for the hold that a dump on the same host has left: nothing is late, nothing repeated."""
    scene.net.host("client").sysctl("net.ipv4.tcp_early_retrans", 0)
    with contextlib.ExitStack() as stack, scene.net.capture("client") as wire:
        client, _, name = scene.connection(stack)
        for _ in range(5):
            file, _ = scene.dump(name, "--hold", "60")
            scene.restore(file)
            assert says(client, b"hello")
        port = client.getsockname()[1]
        assert not [s for s in wire.retransmissions if s.source_port == port]
        assert not [s for s in wire.rsts if s.destination_port == port]


def test_hold_open_outlives_a_killed_command(scene: Scene) -> None:
    """--hold-open in the foreground ends with its connections, and they with it when it is told to stop."""
    with contextlib.ExitStack() as stack:
        client, _, name = scene.connection(stack)
        file, _ = scene.dump(name)
        words: list[str | Path] = ["restore", file, "--netns", scene.net.host("a").netns, "--hold-open"]
        process = subprocess.Popen([sys.executable, "-m", "migrate.cli", *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == f"{name}: restored\n"
        process.kill()
        process.communicate(timeout=10)
        client.sendall(b"hello")
        assert select.select([client], [], [], 0.2)[0] == []
        file, record = scene.dump(name)
        assert bytes(record.received) == b"hello"
        words[1] = file
        process = subprocess.Popen([sys.executable, "-m", "migrate.cli", *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == f"{name}: restored\n"
        process.terminate()
        process.communicate(timeout=10)
        with contextlib.suppress(ConnectionResetError):  # it had unread data
            assert client.recv(1) == b""


def test_list_says_who_and_why_not(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        client, server, name = scene.connection(stack)
        client.sendall(b"x" * 5000)
        until(lambda: sockopt.received_length(server) == 5000)
        local, remote = name.split(",")
        (line,) = scene.run("list", name, "--json").stdout.splitlines()
        said = json.loads(line)
        owner = {"pid": os.getpid(), "fd": server.fileno(), "comm": said["owners"][0]["comm"]}
        assert said == {
            "v": 1,
            "local": local,
            "remote": remote,
            "state": "ESTABLISHED",
            "recv_queue": 5000,
            "send_queue": 0,
            "unsent": 0,
            "owners": [owner],
            "migratable": True,
            "reason": None,
        }
        table = scene.run("list", "--remote", remote).stdout.splitlines()
        assert table[0].split() == [
            "LOCAL",
            "REMOTE",
            "STATE",
            "RECV-Q",
            "SEND-Q",
            "OWNERS",
            "(comm/pid/fd)",
            "MIGRATABLE",
        ]
        row = [local, remote, "ESTABLISHED", "4.9K", "0", f"{owner['comm']}/{owner['pid']}/{owner['fd']}", "yes"]
        assert table[1].split() == row
        for selector in (["--local", local], ["--pid", str(os.getpid()), "--fd", str(server.fileno())]):
            assert scene.run("list", "--json", *selector).stdout.splitlines() == [line]
        for nothing in (["--remote", "10.9.9.9"], ["--local", local, "--state", "CLOSE_WAIT"]):
            assert scene.run("list", "--json", *nothing).stdout == ""


def test_show_says_everything_but_what_users_said(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        client, server, name = scene.connection(stack)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.sendall(b"secret" * 1000)
        until(lambda: sockopt.received_length(server) == 6000)
        file, record = scene.dump(name, "--leave-running")
        text = scene.run("show", file).stdout
        assert text.startswith(f"record 1: {name} ESTABLISHED\n")
        for field, meaning in FIELDS.items():
            if field not in ("local", "local_port", "remote", "remote_port", "state"):
                assert f"\n  {field}" in text and meaning.meaning in text, field
        assert "6000 bytes (5.9K)" in text and "\n    SO_KEEPALIVE                   1\n" in text
        assert "secret" not in text and "secret" not in repr(record)
        (line,) = scene.run("show", "--json", "--queues", file).stdout.splitlines()
        said = json.loads(line)
        assert said["received_bytes"] == 6000 and said["received"].startswith("c2VjcmV0")
        assert (said["v"], said["record"], said["epoch"], said["id"]) == (1, 1, record.epoch, record.id.hex())
        client.close()


def test_a_record_can_go_through_a_pipe(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        client, _, name = scene.connection(stack)
        tcpmig, a = f"{sys.executable} -m migrate.cli", scene.net.host("a").netns
        command = f"{tcpmig} dump {name} -o - --netns {a} | {tcpmig} restore - --detach --netns {a} -- cat"
        done = subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=60, check=False)
        assert done.returncode == 0
        assert says(client, b"through")


def test_many_failures_are_a_partial_success(scene: Scene) -> None:
    """Exit code 3, each connection with its own result."""
    with contextlib.ExitStack() as stack:
        one, _, first = scene.connection(stack)
        _, _, second = scene.connection(stack)
        both = scene.directory / "both.ici"
        both.write_bytes(scene.dump(first)[0].read_bytes() + scene.dump(second, "--leave-running")[0].read_bytes())
        run = scene.run("restore", "--json", both, "--detach", "--", "cat", code=3)
        said = {each["connection"]: each for each in map(json.loads, run.stdout.splitlines())}
        assert said[first] == {"v": 1, "connection": first, "ok": True}
        assert not said[second]["ok"] and "this connection exists here already" in said[second]["reason"]
        assert says(one, b"lives")
