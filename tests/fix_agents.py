"""Real agents in the hosts of a ``lan``: the fixture ``agents``.

::

    def test_something(lan, agents):
        net = lan("client", "a", "b")
        a, b = agents(net.host("a")), agents(net.host("b"), adopt=["*=child:cat"])
        done = a.tcpmig("migrate", "--local", ":80", "--to", b.address)      # exit code, JSON objects, narration
        a.kill(); a.start()                                                  # the same agent again

They speak mutual TLS with one authority. When the test ends each is asked to stop; one that does not, or that leaves a
hold, an open batch or a record behind, fails the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import pytest

from migrate.kernel import netns
from migrate.kernel.nft import tables
from tests.fix_netns import Host
from tests.waiting import until

PORT = 7420
AGENT = [sys.executable, "-m", "migrate.cli", "agent"]


class Done(NamedTuple):
    """A command that ended: its JSON objects, without the version."""

    code: int
    objects: list[dict[str, Any]]
    said: str

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """By connection."""
        return {each["connection"]: each for each in self.objects if "connection" in each}

    @property
    def summary(self) -> dict[str, Any]:
        """The last object of a move."""
        return self.objects[-1]["summary"]  # type: ignore[no-any-return]


class Process(Protocol):
    """What is needed of a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class Runner(Protocol):
    """Starts `tcpmig agent` with these words in that host."""

    def __call__(self, host: Host, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> Process: ...


def popen(
    host: Host, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str], prefix: Sequence[str] = ()
) -> Process:
    """As a program, by the command ``prefix`` if there is one."""
    return host.popen([*prefix, *AGENT, *words], stderr=log, env=environment)


class Agent:
    """An agent of one host, and its state across restarts."""

    def __init__(
        self, host: Host, directory: Path, tls: Path, options: Sequence[str], *, runner: Runner = popen
    ) -> None:
        self.host = host
        self._runner = runner
        self.directory = directory
        self.socket = directory / "agent.sock"
        self.address = f"{host.ip4}:{PORT}"
        self.address6 = f"[{host.ip6}]:{PORT}"  # for agents that listen on [::]
        self.log = directory / "log"
        self._words = ["--listen", self.address, "--tls", str(tls), "--socket", str(self.socket)]
        self._words += ["--state-dir", str(directory / "state"), "--key-dir", str(directory / "key")]
        self._words += ["--log-level", "debug", *options]
        self.process: Process | None = None

    def start(
        self,
        *,
        crash_at: str = "",
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start it, by the command ``prefix`` if there is one, and wait until it serves or has died as it was told."""
        run = partial(popen, prefix=prefix) if prefix else self._runner
        begun = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            more = {"TCPMIG_CRASH_AT": crash_at, **(environment or {})}
            process = self.process = run(self.host, [*self._words, *options], log, {**os.environ, **more})

        def ready() -> bool:
            assert crash_at or process.poll() is None, f"the agent ended: {self.log.read_text()}"
            return process.poll() is not None or "agent started" in self.log.read_text()[begun:]

        until(ready, within=60, what=f"the agent of {self.host.name} serves")

    def kill(self) -> None:
        """Without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """In order."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(15) == 0, self.log.read_text()

    def tcpmig(self, *words: str, timeout: float = 60) -> Done:
        """A command of this host's, with JSON."""
        verb, *rest = words
        command = [sys.executable, "-m", "migrate.cli", verb, "--json", "--socket", str(self.socket), *rest]
        done = self.host.run(command, check=False, timeout=timeout)
        objects = [json.loads(line) for line in done.stdout.splitlines()]
        assert all(each.pop("v") == 1 for each in objects)
        return Done(done.returncode, objects, done.stderr)

    def rows(self) -> list[tuple[str, str]]:
        """Role and state of each open batch in the journal."""
        with contextlib.closing(sqlite3.connect(self.directory / "state" / "journal.db")) as database:
            return database.execute("SELECT role, state FROM handoff").fetchall()

    def records(self) -> int:
        """How many batches have records in the journal."""
        with contextlib.closing(sqlite3.connect(self.directory / "state" / "journal.db")) as database:
            return int(database.execute("SELECT count(*) FROM records").fetchone()[0])

    def settled(self) -> bool:
        """Whether nothing of a handoff is left: no row, no record, nothing held."""
        return not self.rows() and not self.records() and not self.held()

    def held(self) -> int:
        """How many elements the holds of the host have."""
        found = self.host.run(["nft", "-j", "list", "ruleset"]).stdout
        return sum(
            len(each["set"].get("elem", []))
            for each in json.loads(found)["nftables"]
            if "set" in each and each["set"]["table"].startswith("tcpmig-hold-")
        )

    def forwarded(self) -> int:
        """How many flows the host forwards."""
        found = self.host.run(["nft", "-j", "list", "ruleset"]).stdout
        return sum(
            len(each["map"].get("elem", []))
            for each in json.loads(found)["nftables"]
            if "map" in each and each["map"]["table"].startswith("tcpmig-forward-")
        )

    def close(self) -> None:
        """Stop it, and see that nothing is left."""
        if self.process is None or self.process.poll() is not None:
            return
        until(self.settled, what=f"{self.host.name} settled: {self.rows()}, {self.held()} held")
        self.stop()
        with netns.entered(self.host.netns):
            assert not [name for name in tables() if name.startswith("tcpmig-hold-")]
        assert "traceback" not in self.log.read_text(), self.log.read_text()


Agents = Callable[..., Agent]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One authority and one certificate, for every host of a LAN."""
    from migrate.agent.tls import init_tls

    directory = tmp_path_factory.mktemp("tls")
    init_tls(directory, [name for number in range(1, 6) for name in (f"10.0.0.{number}", f"fd00::{number}")])
    return directory


@pytest.fixture
def agents(tmp_path: Path, certificates: Path) -> Iterator[Agents]:
    """``agents(host, adopt=["*=child:cat"], options=[…])`` starts an agent in that host."""
    with contextlib.ExitStack() as started:

        def start(
            host: Host, *, adopt: Sequence[str] = ("*=hold",), options: Sequence[str] = (), name: str = ""
        ) -> Agent:
            directory = tmp_path / (name or host.name)
            directory.mkdir()
            words = [word for each in adopt for word in ("--adopt", each)]
            agent = Agent(host, directory, certificates, [*words, *options])
            agent.start()
            started.callback(agent.close)
            return agent

        yield start
