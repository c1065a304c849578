"""Real, unmodified programs in the hosts of a ``lan``: the fixtures ``programs`` and ``content``.

::

    def test_something(lan, programs, content):
        a = lan("client", "a").host("a")
        nginx = programs.nginx(a, content)           # .pid .workers() .errors()
        redis = programs.redis(a)
        cat = programs.start(a, ["socat", "TCP-LISTEN:7000,fork", "EXEC:cat"], port=7000)

Each is started in the foreground, in a process group and a directory of its own, and is ready when it listens. When the
test ends, it is asked to stop; a process of the group that outlives that is killed, and the test fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from tests.fix_netns import Host, LanFactory
from tests.waiting import until

P = TypeVar("P", bound="Program")

TCP_LISTEN = "0A"  # as /proc/net/tcp writes it

NGINX_CONF = """
user root;  # may read the test's directory
daemon off;
pid nginx.pid;
worker_processes {workers};
worker_shutdown_timeout 1s;
events {{ worker_connections 4096; }}
http {{
    access_log access.log;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    default_type application/octet-stream;
    keepalive_timeout 1h;
    keepalive_requests 1000000;
    server {{
        listen {port};
        listen [::]:{port};
        root {root};
        {server}
    }}
}}
"""


@dataclass
class Program:
    """A running program; ``pid`` is its own, ``directory`` where it runs and its ``log`` (output and errors) lies."""

    host: Host
    process: subprocess.Popen[bytes]
    directory: Path
    grace: ClassVar[float] = 10.0  # seconds to stop in

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote to its output and error streams."""
        return (self.directory / "log").read_text(errors="replace")

    def children(self) -> list[int]:
        """The processes it has forked and that still run."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def listens(self, port: int) -> bool:
        """Whether its host listens on that port; raises with its words when the program has ended."""
        if self.process.poll() is not None:
            raise AssertionError(f"{self.process.args!r} ended with {self.process.returncode}: {self.log}")
        with self.host.entered():
            tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()[1:]]
        return any(state == TCP_LISTEN and local.endswith(f":{port:04X}") for _, local, _, state, *_ in lines)

    def stop(self) -> None:
        """Ask it to stop; whoever of its group does not is killed, and that is an error."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            until(lambda: self.process.poll() is not None and not self._group(), within=self.grace)
        except AssertionError:
            raise AssertionError(f"{self.process.args!r} left {self._group()} behind: {self.log}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def _group(self) -> list[str]:
        """The living processes of its group: pid and name, as /proc/pid/stat begins."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                who, _, rest = file.read_text().rpartition(") ")
                state, _, group, *_ = rest.split()
                if int(group) == self.pid and state != "Z":
                    found.append(f"{who})")
        return found


class Nginx(Program):
    """Debian's nginx: a master (``pid``) and its workers."""

    def workers(self) -> list[int]:
        """The worker processes, which own the connections."""
        return self.children()

    def errors(self) -> list[str]:
        """The error log's lines, without the notices of starting and stopping.

        Nor with its remark that a user namespace lets nobody set groups.
        """
        lines = (self.directory / "error.log").read_text().splitlines()
        return [line for line in lines if "[notice]" not in line and "initgroups(root, 0)" not in line]


class Programs:
    """Starts programs and ends them all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running = contextlib.ExitStack()
        self._count = 0

    def start(self, host: Host, command: Sequence[str | Path], *, port: int | None = None, **more: Any) -> Program:
        """Start ``command`` in ``host``; ready when something there listens on ``port``, at once for None."""
        return self._start(Program, host, command, port, self._room(command[0]), **more)

    def nginx(
        self, host: Host, content: Content, *, port: int = 80, workers: int = 1, level: str = "notice", server: str = ""
    ) -> Nginx:
        """nginx that serves ``content``; ``level`` is the error log's, ``server`` more lines for its server block."""
        room = self._room("nginx")
        conf = NGINX_CONF.format(workers=workers, port=port, root=content.directory, server=server)
        (room / "nginx.conf").write_text(f"error_log error.log {level};\n{conf}")
        command: list[str | Path] = ["nginx", "-p", room, "-c", "nginx.conf", "-e", "error.log"]
        nginx = self._start(Nginx, host, command, port, room)
        until(lambda: len(nginx.workers()) == workers, what="nginx workers")
        return nginx

    def redis(self, host: Host, *, port: int = 6379) -> Program:
        """A redis-server without persistence, open to every client of the LAN."""
        room = self._room("redis")
        options = {"port": str(port), "bind": "* -::*", "protected-mode": "no", "save": "", "dir": str(room)}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        return self._start(Program, host, ["redis-server", *arguments], port, room)

    def close(self) -> None:
        """End all, the last first."""
        self._running.close()

    def _room(self, name: str | Path) -> Path:
        self._count += 1
        room = self._directory / f"{Path(name).name}-{self._count}"
        room.mkdir(parents=True)
        return room

    def _start(
        self, kind: type[P], host: Host, command: Sequence[str | Path], port: int | None, room: Path, **more: Any
    ) -> P:
        with (room / "log").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **more}
            process = host.popen(command, cwd=room, process_group=0, **streams)
        program = kind(host, process, room)
        self._running.callback(program.stop)
        if port is not None:
            until(lambda: program.listens(port), what=f"{command} listens on port {port}")
        return program


@dataclass
class Content:
    """Files of random bytes in ``directory``: their names and the SHA-256 (hexadecimal) of each."""

    directory: Path
    digests: Mapping[str, str]

    @classmethod
    def make(cls, directory: Path, *, files: int = 64, largest: int = 200_000, seed: int = 0) -> Content:
        """``files`` files of up to ``largest`` bytes, most of them small, one empty; alike for the same seed."""
        chance = random.Random(seed)
        sizes = [0, largest, *(int(largest ** chance.uniform(0, 1)) for _ in range(files - 2))]
        digests = {}
        directory.mkdir(parents=True)
        for number, size in enumerate(sizes):
            data = chance.randbytes(size)
            (directory / f"{number}.bin").write_bytes(data)
            digests[f"{number}.bin"] = hashlib.sha256(data).hexdigest()
        return cls(directory, digests)


@pytest.fixture
def programs(lan: LanFactory, tmp_path: Path) -> Iterator[Programs]:
    """Starts programs in hosts of ``lan``; they end before their hosts vanish."""
    running = Programs(tmp_path / "programs")
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Something for web servers to serve, the same for every one of them."""
    return Content.make(tmp_path_factory.mktemp("web") / "root")
