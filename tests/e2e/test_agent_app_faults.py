"""Agents and applications that take part, when something is amiss: silence, refusals, and agents that are killed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.agent.client import Client
from migrate.agent.v1.types_pb2 import OUTCOME_DONE
from migrate.errors import Error
from migrate.ici import Ici
from migrate.kernel.diag import list_connections
from migrate.selection import Selector, find
from tests import taking_part, taking_part_http
from tests.capture import Capture
from tests.e2e.test_agent_app import PORT, start
from tests.e2e.test_agent_move import VIP
from tests.e2e.test_app import Lines
from tests.fix_agents import Agent, Agents, Done
from tests.fix_netns import LanFactory
from tests.taking_part_http import BLOCK, block
from tests.waiting import until

# What an application has given or taken when the agent dies, and what becomes of it.
CRASHES = (
    "source:FREEZING:FROZEN:WriteJournal",  # given, frozen, not offered
    "source:OFFERED:COMMITTED:Release",  # taken at the other side
    "source:OFFERED:COMMITTED:SendKept",  # released, Gone was said
    "destination:RESTORING:RESTORED:WriteJournal",  # taken, not committed
    "destination:COMMITTING:WON:Activate",  # taken, committed, silent
    "destination:COMMITTING:WON:WriteJournal",  # active, Go was said
)
BEFORE_COMMIT = (CRASHES[0], CRASHES[3])


LENGTH = 1 << 20  # bytes of a download


class Scene:
    """Agents and applications at a and b, one connection at a."""

    def __init__(self, lan: LanFactory, agents: Agents, directory: Path) -> None:
        self.net = lan("client", "a", "b")
        self.net.assign("a", self.net.vip4)
        self.directory = directory
        self.agents_factory = agents
        self.agents: dict[str, Agent] = {}
        self.applications: dict[str, subprocess.Popen[str]] = {}

    def begin(self, stack: contextlib.ExitStack) -> None:
        """Connect."""
        self.wire: Capture = stack.enter_context(self.net.capture("client"))
        self.client = Lines(self.net.host("client"), self.net.vip4)
        stack.callback(self.client.close)
        self.client.talk(3)

    def agent(self, name: str, how: str = "") -> Agent:
        """With the rule for its application, or another."""
        how = how or f"unix:{self.path(name)}"
        self.agents[name] = self.agents_factory(self.net.host(name), adopt=[f"{self.net.vip4}:{PORT}={how}"])
        return self.agents[name]

    def path(self, name: str) -> Path:
        return self.directory / f"app-{name}" / "socket"

    def application(self, name: str, *words: str, port: int = PORT) -> None:
        program = taking_part.__name__
        self.applications[name] = start(self.net.host(name), program, self.path(name), self.net.vip4, str(port), *words)

    def move(self, source: str = "a", destination: str = "b") -> Done:
        to = self.agents[destination].address
        return self.agents[source].tcpmig("migrate", str(self.client.server), "--to", to, "--steer", VIP)

    def killed(self, point: str, here: str, there: str) -> None:
        """Move it amidst a line; an agent dies at that point, and the next one recovers."""
        source, destination = self.agents[here], self.agents[there]
        dying = source if point.startswith("source") else destination

        def settled() -> bool:
            return source.settled() and destination.settled()

        def move() -> None:
            with contextlib.suppress(Error), Client(f"unix:{source.socket}") as client:
                for _ in client.migrate(Selector(connection=self.client.server), destination.address, steer=VIP):
                    pass

        until(settled, what=f"both settled before {point}")
        dying.stop()
        dying.start(crash_at=point)
        process = dying.process
        assert process is not None
        self.client.begin()
        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        until(lambda: process.poll() is not None, within=20, what=point)
        dying.start()
        until(settled, within=30, what=f"both settled after {point}")
        mover.join(40)

    def reason(self) -> str:
        """Why it stays at a; and it does."""
        done = self.move()
        assert (done.code, done.summary["stayed"]) == (1, 1), done
        assert self.owners() == {"a": [self.applications["a"].pid]}
        self.client.talk(3)
        return str(done.results[str(self.client.server)]["reason"])

    def unacknowledged(self, name: str) -> int:
        """Bytes that are on their way from that host's end."""
        with self.net.host(name).entered():
            return sum(each.send_queue for each in list_connections() if each.four_tuple == self.client.server)

    def owners(self) -> dict[str, list[int]]:
        """The process of each descriptor of the connection, by host."""
        found = {}
        for name in "ab":
            with self.net.host(name).entered():
                each = next(iter(find(Selector(connection=self.client.server))), None)
            if each is not None and each.owners:
                found[name] = [owner.pid for owner in each.owners]
        return found


@pytest.fixture
def scene(lan: LanFactory, agents: Agents, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(lan, agents, tmp_path)
    with contextlib.ExitStack() as stack:
        made.application("a", "listen")
        made.begin(stack)
        yield made
        assert not made.wire.rsts


def test_an_application_that_is_silent_keeps_its_connection(scene: Scene) -> None:
    scene.agent("a")
    scene.agent("b")
    scene.application("b")
    scene.applications["a"].send_signal(signal.SIGSTOP)
    try:
        done = scene.move()
    finally:
        scene.applications["a"].send_signal(signal.SIGCONT)
    assert done.code == 1
    assert "does not answer" in done.results[str(scene.client.server)]["reason"]
    scene.client.talk(3)
    assert scene.move().code == 0  # another time it speaks
    scene.client.talk(3)
    assert scene.owners() == {"b": [scene.applications["b"].pid]}


def test_it_stays_where_nobody_takes_it(scene: Scene) -> None:
    """Known before anything is touched, or from the application's answer before the commit."""
    scene.agent("a")
    scene.agent("b")
    assert "no application at" in scene.reason()
    scene.application("b", port=PORT + 1)
    assert "it is of no registered service" in scene.reason()
    scene.applications["b"].send_signal(signal.SIGSTOP)
    try:
        assert "does not answer" in scene.reason()
    finally:
        scene.applications["b"].send_signal(signal.SIGCONT)


def test_state_goes_to_applications_only(scene: Scene) -> None:
    scene.agent("a")
    scene.agent("b", how="hold")
    assert "needs an application" in scene.reason()


class Full(Exception):
    """There is no room to store it."""


def test_a_dump_asks_the_application_and_takes_its_state_along(scene: Scene) -> None:
    """As a caller's handoff does: copied or not stored it goes on, silent it stays, stored it lives elsewhere."""
    scene.agent("a")
    scene.agent("b")
    scene.application("b")
    chosen = Selector(connection=scene.client.server)

    def states(stored: list[bytes]) -> list[int]:
        record = Ici.decode(b"".join(stored))
        return [json.loads(record.app)[0]]

    def full(_: bytes) -> None:
        raise Full

    with Client(f"unix:{scene.agents['a'].socket}") as at_a, Client(f"unix:{scene.agents['b'].socket}") as at_b:
        copied: list[bytes] = []
        assert [each.outcomes for each in at_a.dump(chosen, copied.append, leave_running=True)] == [[OUTCOME_DONE]]
        assert states(copied) == [3]
        scene.client.talk(3)
        with pytest.raises(Full):
            list(at_a.dump(chosen, full))
        until(scene.agents["a"].settled, what="it is thawed")
        scene.client.talk(3)
        scene.applications["a"].send_signal(signal.SIGSTOP)
        try:
            (results,) = at_a.dump(chosen, full)
        finally:
            scene.applications["a"].send_signal(signal.SIGCONT)
        assert "does not answer" in results.failures[0].problem.what
        scene.client.talk(3)
        # Its delayed ACK would reach b when b has the address already and no socket yet.
        until(lambda: not scene.unacknowledged("a"), what="the client has acknowledged everything")
        stored: list[bytes] = []
        assert [each.outcomes for each in at_a.dump(chosen, stored.append, hold=2)] == [[OUTCOME_DONE]]
        assert states(stored) == [12]
        assert scene.owners() == {}
        scene.net.withdraw("a", scene.net.vip4)
        scene.net.assign("b", scene.net.vip4)
        scene.net.host("client").run(["ip", "neighbour", "flush", "all"])
        assert [each.outcomes for each in at_b.restore(stored)] == [[OUTCOME_DONE]]
    scene.client.talk(3)
    assert scene.owners() == {"b": [scene.applications["b"].pid]}


def test_an_unmodified_owner_is_not_asked(scene: Scene) -> None:
    """The rule is there and nobody listens, or somebody else does."""
    scene.agent("a", how=f"unix:{scene.directory / 'nobody' / 'socket'}")
    scene.agent("b", how="child:cat")
    assert scene.move().code == 0
    scene.client.sock.sendall(b"an echo\n")
    assert scene.client.answers.readline() == b"an echo\n"


@pytest.mark.timeout(120)
def test_killed_while_an_application_has_given_or_taken(scene: Scene) -> None:
    """The connection goes on, once, with its state; the next case takes it from where it is."""
    for name in "ab":
        scene.agent(name)
    scene.application("b")
    here, there = "a", "b"
    for point in CRASHES:
        scene.killed(point, here, there)
        if point not in BEFORE_COMMIT:
            here, there = there, here
        scene.client.end()
        scene.client.talk(3)
        assert scene.owners() == {here: [scene.applications[here].pid]}, point


def test_an_application_that_speaks_goes_on_when_the_agent_died(
    lan: LanFactory, agents: Agents, tmp_path: Path
) -> None:
    """Thawing wakes nobody up, and the client has nothing to say: the next agent tells the application."""
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    paths = {name: tmp_path / f"app-{name}" / "socket" for name in "ab"}
    a, b = (agents(net.host(name), adopt=[f"*:{PORT}=unix:{path}"]) for name, path in paths.items())
    gate, output = tmp_path / "gate", tmp_path / "output"
    gate.write_text("0")  # half of the answer
    for name, path in paths.items():
        listen = ["listen"] if name == "a" else []
        start(net.host(name), taking_part_http.__name__, path, net.vip4, str(PORT), gate, *listen)
    url = f"http://{net.vip4}:{PORT}/noise/{LENGTH}?after=0&moves=2"
    curl = net.host("client").popen(["curl", "-sSN", "-o", output, url])
    until(lambda: output.exists() and output.stat().st_size == LENGTH // 2, what="half of the answer")
    a.stop()
    a.start(crash_at=CRASHES[0])
    process = a.process
    assert process is not None
    chosen = ["migrate", "--local", f"{net.vip4}:{PORT}", "--state", "ESTABLISHED"]
    a.tcpmig(*chosen, "--to", b.address, "--steer", VIP)
    until(lambda: process.poll() is not None, what="the agent dies")
    a.start()
    until(lambda: a.settled() and b.settled(), what="both settled")
    gate.write_text("2")  # the rest
    assert curl.wait(20) == 0
    assert output.read_bytes() == b"".join(map(block, range(LENGTH // BLOCK)))
