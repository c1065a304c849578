"""An agent is killed at every step of a handoff, found by walking the tables: the connection lives on, on one host.

The points of the usual run are those that both machines pass when nothing goes wrong; each lies between two effects.
A client talks over the connection all the while; it moves at a quiet point, since its owner takes no part.
``pytest -s`` shows the matrix.
"""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from migrate.agent.client import Client
from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.handoff.destination import DestinationHandoff
from migrate.handoff.machine import crash_points
from migrate.handoff.source import SourceHandoff
from migrate.selection import Selector, find
from tests.fix_agents import PORT as AGENT_PORT
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Lan, LanFactory
from tests.peers import echo_server
from tests.waiting import until

WORKERS = 4
PORT = 8000
CUT = 7.0  # seconds: longer than the agents wait for each other's answers
# Passed only when segments were kept after the first Released: the usual run may or may not.
AT_TIMES = ("source:LINGERING:ACTIVATED", "destination:SERVING:RELEASED")
MACHINES = {"source": SourceHandoff, "destination": DestinationHandoff}


class Talk(threading.Thread):
    """A client that says a number, hears it, and says the next."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.heard = 0
        self.error: BaseException | None = None
        self.over = False
        sock.settimeout(30)
        self.start()

    def run(self) -> None:
        try:
            while not self.over:
                word = b"%012d" % self.heard
                self.sock.sendall(word)
                got = b""
                while len(got) < len(word):
                    part = self.sock.recv(len(word) - len(got))
                    assert part, "the connection was closed"
                    got += part
                assert got == word, (got, word)
                self.heard += 1
                time.sleep(0.001)
        except BaseException as error:
            self.error = error

    def goes_on(self) -> bool:
        """It heard something since it was asked."""
        before = self.heard
        until(lambda: self.heard > before + 1 or self.error, within=15, what="the client hears its words")
        if self.error:
            raise self.error
        return True


@dataclass
class Case:
    """A point, and what came of it."""

    point: str
    fate: str = "kill"  # of the agent, or of the link: delay, drop
    outcome: str = "not reached"
    seconds: float = 0.0
    problem: str = ""


@dataclass
class Bench:
    """Two agents on a LAN of their own, used for one case after the other."""

    net: Lan
    a: Agent
    b: Agent

    def run(self, todo: queue.SimpleQueue[Case]) -> None:
        with echo_server(self.net.host("a"), "0.0.0.0", PORT):
            while True:
                try:
                    case = todo.get_nowait()
                except queue.Empty:
                    return
                began = time.monotonic()
                begun = [agent.log.stat().st_size for agent in (self.a, self.b)]
                try:
                    self.one(case)
                except BaseException as error:
                    case.problem = f"{type(error).__name__}: {error}; {self.rest()}\n{self.said(begun)}"
                    self.reset()
                case.seconds = time.monotonic() - began

    def one(self, case: Case) -> None:
        dying = self.a if case.point.startswith("source") else self.b
        dying.stop()
        dying.start(crash_at=case.point if case.fate == "kill" else f"{case.point}=STOP")
        process = dying.process
        assert process is not None
        with self.talking() as talk:
            four_tuple = self.name(talk.sock)
            mover = threading.Thread(target=self.move, args=(four_tuple,), daemon=True)
            mover.start()
            if self.reached(process, mover):
                case.outcome = case.fate
            if case.outcome == "kill":
                dying.start()
            elif case.outcome == "delay":
                time.sleep(CUT)
                process.send_signal(signal.SIGCONT)
            elif case.outcome == "drop":
                with self.cut():
                    process.send_signal(signal.SIGCONT)
                    time.sleep(CUT)
            else:  # or it would stop there in another case
                mover.join(40)
                dying.stop()
                dying.start()
            mover.join(40)
            until(lambda: self.a.settled() and self.b.settled(), within=30, what="both settled")
            talk.goes_on()
            alive = self.alive(four_tuple)
            assert len(alive) == 1, f"alive on {alive}"
            case.outcome = f"{case.outcome}, lives on {alive[0]}"
        self.reset()

    def reached(self, process: subprocess.Popen[Any], mover: threading.Thread) -> bool:
        """Whether the agent comes to its point: before the move is over, or soon after (it lingers for a second)."""

        def there() -> bool:
            return process.poll() is not None or stopped(process.pid)

        until(lambda: there() or not mover.is_alive(), within=60, what="the point, or the end of the move")
        with contextlib.suppress(AssertionError):
            until(there, within=4)
        return there()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing that the agents say to each other arrives; the client is not concerned."""
        host = self.net.host("a")
        rules = [
            "add table inet cut",
            "add chain inet cut c { type filter hook output priority 0; }",
            *(f"add rule inet cut c tcp {end} {AGENT_PORT} drop" for end in ("sport", "dport")),
        ]
        host.run(["nft", "; ".join(rules)])
        try:
            yield
        finally:
            host.run(["nft", "delete table inet cut"])

    def move(self, four_tuple: str) -> None:
        with contextlib.suppress(Error), Client(f"unix:{self.a.socket}") as client:
            chosen = Selector(connection=FourTuple.parse(four_tuple))
            for _ in client.migrate(chosen, self.b.address, steer="vip:eth0", when_quiet=30):
                pass

    @contextlib.contextmanager
    def talking(self) -> Iterator[Talk]:
        with self.net.host("client").entered():
            sock = socket.create_connection((self.net.vip4, PORT), timeout=5)
        with sock:
            talk = Talk(sock)
            try:
                talk.goes_on()
                yield talk
            finally:
                talk.over = True
                talk.join(5)

    def name(self, sock: socket.socket) -> str:
        (local, local_port), (remote, remote_port) = sock.getpeername(), sock.getsockname()
        return f"{local}:{local_port},{remote}:{remote_port}"

    def alive(self, four_tuple: str) -> list[str]:
        """The hosts on which somebody owns the connection."""
        found = []
        for name in ("a", "b"):
            with self.net.host(name).entered():
                if any(each.owners for each in find(Selector(connection=FourTuple.parse(four_tuple)))):
                    found.append(name)
        return found

    def said(self, begun: list[int]) -> str:
        """What both agents logged of this case."""
        logs = [agent.log.read_text()[size:] for agent, size in zip((self.a, self.b), begun, strict=True)]
        return "\n".join(f"{name}: {line}" for name, log in zip("ab", logs, strict=True) for line in log.splitlines())

    def rest(self) -> str:
        return f"a has {self.a.rows()}, {self.a.held()} held; b has {self.b.rows()}, {self.b.held()} held"

    def reset(self) -> None:
        """The address is at a again, and the client knows."""
        for agent in (self.a, self.b):
            assert agent.process is not None
            if agent.process.poll() is not None:
                agent.start()
        ip = ["ip", "address"]
        self.net.host("b").run([*ip, "del", f"{self.net.vip4}/32", "dev", "eth0"], check=False)
        self.net.host("a").run([*ip, "replace", f"{self.net.vip4}/32", "dev", "eth0"])
        self.net.host("client").run(["ip", "neigh", "flush", "all"])


def usual_points(log: str, role: str) -> list[str]:
    """The points of one side that a log of the usual run passed, in the order of the table."""
    passed = set(re.findall(rf"point=({role}:\w+:\w+)", log))
    return [point for point in crash_points(MACHINES[role]) if ":".join(point.split(":")[:3]) in passed]


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


class Matrix:
    """Several benches that share the cases."""

    def __init__(self, lan: LanFactory, agents: Agents, options: list[str]) -> None:
        self.benches = []
        for number in range(WORKERS):
            net = lan("client", "a", "b")
            a, b = (
                agents(net.host(name), adopt=["*=child:cat"], options=options, name=f"{name}{number}") for name in "ab"
            )
            net.assign("a", net.vip4)
            self.benches.append(Bench(net, a, b))
            self.benches[-1].reset()

    def usual_points(self) -> list[str]:
        """Every point of a run in which nothing goes wrong."""
        bench = self.benches[0]
        with echo_server(bench.net.host("a"), "0.0.0.0", PORT), bench.talking() as talk:
            bench.move(bench.name(talk.sock))
            until(lambda: bench.a.settled() and bench.b.settled(), what=bench.rest())
            assert bench.alive(bench.name(talk.sock)) == ["b"]
        bench.reset()
        return [
            *usual_points(bench.a.log.read_text(), "source"),
            *usual_points(bench.b.log.read_text(), "destination"),
        ]

    def run(self, cases: list[Case]) -> None:
        """All cases; prints what came of each."""
        todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            todo.put(case)
        threads = [threading.Thread(target=each.run, args=(todo,)) for each in self.benches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for case in cases:
            print(f"{case.point:50} {case.outcome:24} {case.seconds:5.1f} s  {case.problem}")
        assert not [case for case in cases if case.problem]


@pytest.mark.timeout(400)
def test_killed_at_every_point(lan: LanFactory, agents: Agents) -> None:
    matrix = Matrix(lan, agents, [])
    cases = [Case(point) for point in matrix.usual_points()]
    matrix.run(cases)
    # What has nothing to act on is left out of a step, and its points are not passed.
    spared = [case.point for case in cases if "kill" not in case.outcome and not case.point.startswith(AT_TIMES)]
    assert {point.rpartition(":")[2] for point in spared} <= {"Thaw", "Discard", "Rebuild", "Unclaim"}


@pytest.mark.timeout(400)
def test_link_cut_at_every_transition(lan: LanFactory, agents: Agents, tmp_path: Path) -> None:
    matrix = Matrix(lan, agents, ["--registry", str(tmp_path / "registry.db")])
    transitions = [point for point in matrix.usual_points() if point.count(":") == 2]
    cases = [Case(point, fate) for point in transitions for fate in ("delay", "drop")]
    matrix.run(cases)
    assert all(case.fate in case.outcome or case.point in AT_TIMES for case in cases)
