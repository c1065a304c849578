"""Two agents, three connections, and a script of what goes wrong: the stage of tests/e2e/test_crash_matrix.py.

A script says what to do when an agent stands still at a crash point of the tables (docs/handoff.md)::

    {"destination:ACTIVE:RELEASED:Replay": "kill, until source:RELEASED:LINK_LOST, start"}

Its words are the ``_verb`` methods of `Bench`: what they do, they do to the agent that stands there, or to the other.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from migrate.agent.client import Client
from migrate.errors import Error
from migrate.kernel import sockopt
from migrate.kernel.nft import tables
from migrate.selection import Found, Selector, find
from tests import quick_agent
from tests.conversation import Conversation
from tests.fix_agents import PORT as AGENT_PORT
from tests.fix_agents import Agent, Runner
from tests.fix_netns import DEV, Lan
from tests.peers import listen
from tests.waiting import until

TAKEN, REFUSED = 8000, 8001  # ports: somebody at the destination adopts connections of the one, and not of the other
PATIENCE = 15.0  # seconds that a script waits for what another fault may have prevented
LATEST = 90.0  # seconds for a case
FATES = {
    "kill": "kill, start",
    "kill other": "kill other, start other, go",
    "kill caller": "kill caller, go",
    "drop": f"cut, go, pause {quick_agent.FOREVER}, mend",
    "delay": f"pause {quick_agent.FOREVER}, go",
}


@dataclass(frozen=True)
class Scenario:
    """How a handoff goes: what goes wrong where. ``quiet`` in seconds; ``port`` 0 means all connections."""

    name: str
    scripts: Mapping[str, str] = field(default_factory=dict)
    quiet: float | None = None
    port: int = 0
    registry: bool = False
    claims_stay: bool = False  # for a destination that may come back


@dataclass
class Case:
    """A scenario, one more fault, and what came of them."""

    scenario: Scenario
    point: str = ""
    fate: str = ""
    reached: bool = False
    passed: frozenset[str] = frozenset()  # transitions
    living: str = ""
    problem: str = ""


class Bench:
    """A LAN with two agents, used for one case after the other."""

    def __init__(self, directory: Path, tls: Path, runner: Runner) -> None:
        self.net = Lan(("client", "a", "b"))
        self.directory = directory
        directory.mkdir()
        rule = ["--adopt", f"*:{TAKEN}=child:cat"]
        self.a, self.b = (Agent(self.net.host(name), directory / name, tls, rule, runner=runner) for name in "ab")
        for agent in (self.a, self.b):
            agent.directory.mkdir()
        self.net.assign("a", self.net.vip4)
        self.listeners = [listen(self.net.host("a"), self.net.vip4, port) for port in (TAKEN, REFUSED)]

    def close(self) -> None:
        """Whatever state it is in."""
        for listener in self.listeners:
            listener.close()
        for agent in (self.a, self.b):
            if agent.process is not None:
                agent.kill()
        self.net.close()
        shutil.rmtree(self.directory)

    def play(self, case: Case) -> None:
        """Raises what was wrong in the end."""
        self.scripts = dict(case.scenario.scripts)
        if case.point:
            assert case.point not in self.scripts, "two faults at one point"
            self.scripts[case.point] = FATES[case.fate]
        self.options = ["--registry", str(self.directory / "registry.db")] if case.scenario.registry else []
        self.attended: set[Agent] = set()
        self.running: list[Iterator[None]] = []
        with contextlib.ExitStack() as self.undo:
            client = self.net.host("client")
            for agent in (self.a, self.b):
                agent.log.unlink(missing_ok=True)
            for file in self.directory.glob("registry.db*"):  # another case's claims may stay
                file.unlink()
            self.talks = [Conversation(client, self.listeners[0]), Conversation(client, self.listeners[0])]
            self.talks.append(Conversation(client, self.listeners[1]))
            for talk in self.talks:
                self.undo.callback(talk.close)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self.launch, (self.a, self.b)))
            self.call(case)
            try:
                self.conduct(case)
                self.check(case)
            finally:
                log = self.said()
                case.passed = frozenset(re.findall(r"event=step.* point=(\w+:\w+:\w+) ", log))
        self.reset()

    def said(self) -> str:
        """What both agents logged of this case."""
        return "".join(agent.log.read_text() for agent in (self.a, self.b))

    def launch(self, agent: Agent) -> None:
        """Start it with the faults that are left for it."""
        role = "source:" if agent is self.a else "destination:"
        fates = {"fail": "FAIL", "kill": "KILL"}
        begun = agent.log.exists()
        faults = {
            point: fates.get(script.partition(",")[0], "STOP")
            for point, script in self.scripts.items()
            if point.startswith(role) and not (begun and script == "fail")
        }
        agent.start(crash_at=",".join(map("=".join, faults.items())), options=self.options)

    def call(self, case: Case) -> None:
        """Have the connections moved: by a process if it will be killed."""
        local = self.net.vip4 + (f":{case.scenario.port}" if case.scenario.port else "")
        quiet = case.scenario.quiet
        if case.fate == "kill caller":
            words = ["migrate", "--local", local, "--to", self.b.address, "--steer", f"vip:{DEV}"]
            words += ["--socket", str(self.a.socket), *(["--when-quiet", str(quiet)] if quiet else [])]
            with open(self.directory / "caller", "wb") as output:
                command = [sys.executable, "-m", "migrate.cli", *words]
                caller = self.net.host("a").popen(command, stdout=output, stderr=output)
            self.kill_caller = caller.kill
            self.waiting: Callable[[], bool] = lambda: caller.poll() is None
            return

        def move() -> None:
            chosen = Selector(local=(ipaddress.ip_address(self.net.vip4).packed, case.scenario.port or None))
            with contextlib.suppress(Error), Client(f"unix:{self.a.socket}") as client:
                list(client.migrate(chosen, self.b.address, steer=f"vip:{DEV}", when_quiet=quiet))

        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        self.waiting = mover.is_alive

    def conduct(self, case: Case) -> None:
        """Carry the scripts out, until everything is over."""
        deadline = time.monotonic() + LATEST
        over = look = 0.0
        while True:
            self.attend(case)
            busy = bool(self.running)
            self.running = [script for script in self.running if next(script, self) is None]
            for talk in self.talks:
                talk.say()
            now = time.monotonic()
            assert now < deadline, f"never over; {self.rest()}"
            if busy or self.waiting():
                over, look = now, now + 0.1
            elif now > look:
                look = now + 0.1
                over = over if self.a.settled() and self.b.settled() else now
                # A destination that serves has nothing left but a timer, which may be the point.
                if now - over > (0.3 if case.reached or not case.point else 3 * quick_agent.TIMES.linger):
                    return
            time.sleep(0.01)

    def attend(self, case: Case) -> None:
        """Begin the script of each agent that has come to a point."""
        for agent in (self.a, self.b):
            assert agent.process is not None
            if agent in self.attended or not (agent.process.poll() is not None or stopped(agent.process.pid)):
                continue
            points = re.findall(r'event="a fault on purpose" point=(\S+) fate=(?:KILL|STOP)', agent.log.read_text())
            assert points and points[-1] in self.scripts, f"the agent ended: {agent.process.poll()}"
            case.reached |= points[-1] == case.point
            self.attended.add(agent)
            self.running.append(self.script(agent, self.scripts.pop(points[-1])))

    def script(self, agent: Agent, words: str) -> Iterator[None]:
        """Step by step; yields while it waits."""
        for line in words.split(", "):
            verb, *rest = line.split()
            do: Callable[..., Iterator[None] | None] = getattr(self, f"_{verb}")
            yield from do(agent, *rest) or ()

    def _chosen(self, agent: Agent, who: str) -> Agent:
        return agent if not who else self.b if agent is self.a else self.a

    def _until(self, agent: Agent, point: str) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        while f" point={point} " not in self.said() and time.monotonic() < deadline:
            yield

    def _pause(self, agent: Agent, seconds: str) -> Iterator[None]:
        deadline = time.monotonic() + float(seconds)
        while time.monotonic() < deadline:
            yield

    def _go(self, agent: Agent) -> None:
        assert agent.process is not None
        if agent.process.poll() is None:
            agent.process.send_signal(18)  # SIGCONT
            until(lambda: agent.process and not stopped(agent.process.pid))
        self.attended.discard(agent)

    def _kill(self, agent: Agent, who: str = "") -> None:
        if who == "caller":
            self.kill_caller()
        else:
            self.attended.add(self._chosen(agent, who))
            self._chosen(agent, who).kill()

    def _start(self, agent: Agent, who: str = "") -> None:
        chosen = self._chosen(agent, who)
        assert chosen.process is not None
        if chosen.process.poll() is not None:  # else another script was quicker
            self.launch(chosen)
        self.attended.discard(chosen)

    def _abort(self, agent: Agent) -> None:
        (move,) = re.findall(r'event="move started" move=(\w+)', self.said())[-1:]
        self.ask(self.a, lambda client: client.abort(move))

    def _settle(self, agent: Agent, verdict: str, who: str = "source") -> None:
        (batch,) = re.findall(r"event=step batch=(\w+)", self.said())[-1:]
        asked = self.a if who == "source" else self.b
        self.ask(asked, lambda client: client.settle(batch, committed=verdict == "there"))

    def ask(self, agent: Agent, call: Callable[[Client], object]) -> None:
        """Call the agent and do not wait: it may stand still."""

        def work() -> None:
            with contextlib.suppress(Error), Client(f"unix:{agent.socket}") as client:
                call(client)

        threading.Thread(target=work, daemon=True).start()

    def _lock(self, agent: Agent, what: str) -> None:
        file = self.directory / "registry.db" if what == "registry" else agent.directory / "state" / "journal.db"
        self.lock = self.undo.enter_context(contextlib.closing(sqlite3.connect(file, isolation_level=None)))
        self.lock.execute("BEGIN IMMEDIATE")

    def _unlock(self, agent: Agent) -> None:
        self.lock.close()

    def _occupy(self, agent: Agent, which: str) -> None:
        self.squatters = contextlib.ExitStack()
        self.undo.push(self.squatters)
        with self.net.host("b").entered():
            for talk in self.talks[:1] if which == "one" else self.talks[:2]:
                four_tuple = talk.four_tuple
                sock = self.squatters.enter_context(socket.socket())
                sockopt.enter_repair(sock)  # no packet, neither now nor when it is closed
                sock.bind((str(ipaddress.ip_address(four_tuple.local)), four_tuple.local_port))
                sock.connect((str(ipaddress.ip_address(four_tuple.remote)), four_tuple.remote_port))

    def _vacate(self, agent: Agent) -> None:
        self.squatters.close()

    def _pin(self, agent: Agent) -> None:
        # A neighbour that goes on sending where it always has.
        words = ["lladdr", self.net.host("a").mac, "nud", "permanent", "dev", DEV]
        self.net.host("client").run(["ip", "neigh", "replace", self.net.vip4, *words])
        self.undo.callback(self._unpin, agent)

    def _unpin(self, agent: Agent) -> None:
        self.net.host("client").run(["ip", "neigh", "del", self.net.vip4, "dev", DEV], check=False)

    def _cut(self, agent: Agent) -> None:
        # Nothing that the agents say to each other arrives; the client is not concerned.
        rules = ["add table inet cut"]
        for hook in ("input", "output"):
            rules.append(f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}")
            rules += [f"add rule inet cut {hook} tcp {end} {AGENT_PORT} drop" for end in ("sport", "dport")]
        self.net.host("a").run(["nft", "; ".join(rules)])
        self.undo.callback(self._mend, agent)

    def _mend(self, agent: Agent) -> None:
        self.net.host("a").run(["nft", "delete table inet cut"], check=False)

    def living(self) -> dict[str, list[Found]]:
        """The connections of the address on each host."""
        chosen = Selector(local=(ipaddress.ip_address(self.net.vip4).packed, None))
        found = {}
        for name in "ab":
            with self.net.host(name).entered():
                found[name] = find(chosen)
        return found

    def check(self, case: Case) -> None:
        """Each connection is alive on one host and reachable there, and nothing is left."""
        living = self.living()
        places = {each.connection.four_tuple: name for name in "ab" for each in living[name]}
        assert sorted(places) == sorted(talk.four_tuple for talk in self.talks), living
        assert sum(map(len, living.values())) == len(places), f"on both hosts: {living}"
        assert all(each.owners for found in living.values() for each in found), f"nobody's: {living}"
        case.living = " ".join(places[talk.four_tuple] for talk in self.talks)
        until(lambda: self.forwarding() == self.needed(living), what=f"{self.forwarding()} forwarded")
        if not living["b"] and "occupy" not in "".join(case.scenario.scripts.values()):  # by which it was used
            until(lambda: self.net.vip4 not in self.addresses("b", "lo"), what="b carries the address no longer")
        for talk in self.talks:
            talk.finish(moved=places[talk.four_tuple] == "b")
        until(lambda: not any(self.living().values()), within=30, what="no socket is left")
        if case.scenario.registry and not case.scenario.claims_stay:
            with contextlib.closing(sqlite3.connect(self.directory / "registry.db")) as registry:
                assert not registry.execute("SELECT * FROM owner").fetchall(), "a claim is left"
        for agent in (self.a, self.b):
            agent.close()
            with agent.host.entered():
                assert not [name for name in tables() if name.startswith("tcpmig-hold-")]

    def forwarding(self) -> list[int]:
        """How many flows each host forwards."""
        return [self.a.forwarded(), self.b.forwarded()]

    def needed(self, living: Mapping[str, list[Found]]) -> list[int]:
        """One for each connection that is not where its address is."""
        holders = [name for name in "ab" if self.net.vip4 in self.addresses(name, DEV)]
        return [len(living["b"]) if holders == ["a"] else 0, len(living["a"]) if holders == ["b"] else 0]

    def addresses(self, name: str, device: str) -> str:
        """Those of a device of a host."""
        return self.net.host(name).run(["ip", "-4", "-br", "address", "show", "dev", device]).stdout

    def rest(self) -> str:
        """What keeps it from being over."""
        return "; ".join(
            f"{agent.host.name} has {agent.rows()}, {agent.held()} held{', attended' * (agent in self.attended)}"
            for agent in (self.a, self.b)
        )

    def reset(self) -> None:
        """The address is at a again, and the client knows."""
        for name in "ab":
            host = self.net.host(name)
            with host.entered():
                forwarding = [table for table in tables() if table.startswith("tcpmig-forward-")]
            for table in forwarding:
                host.run(["nft", f"delete table netdev {table}"])
        self.net.host("b").run(["ip", "address", "del", f"{self.net.vip4}/32", "dev", DEV], check=False)
        self.net.host("a").run(["ip", "address", "replace", f"{self.net.vip4}/24", "dev", DEV])
        self.net.host("client").run(["ip", "neigh", "flush", "all"])


def stopped(pid: int) -> bool:
    """SIGSTOP has reached it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may just have died
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False
