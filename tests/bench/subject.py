"""The Python side of the bench: the work of reference.c through the public API; same arguments, peers and report.

Run in a network namespace of its own (``unshare --net``), as it takes that namespace's loopback for itself.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import resource
import socket
import struct
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from migrate import Error, Ici, activate_many, bulk, dump_many, release_many, restore_many
from migrate.kernel import option_values
from migrate.kernel.option_table import OPTIONS, Phase

PHASES = ("save", "close", "restore", "resume")
LOOPBACK = "ip link set lo up mtu 1500 && ip route replace local 127.0.0.1 dev lo table local initcwnd 100"
Moved = TypeVar("Moved", Ici, socket.socket)
USUAL = {"TCP_NODELAY", "SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"}
USUAL |= {"SO_LINGER", "SO_PRIORITY"}
QUIET = 0.25  # seconds: longer than a delayed ACK (200 ms), which would draw a RST while nobody is there
PATIENCE = 30.0  # seconds until set-up or check give up


_BLOCKS = [bytes((i * 131 + shift) & 0xFF for i in range(256)) for shift in range(256)]


def pattern(port: int, offset: int, length: int) -> bytes:
    """Bytes of the stream that belongs to the peer's port, as ``pattern`` in reference.c gives them one by one."""
    first, last = offset >> 8, (offset + length) >> 8
    blocks = (_BLOCKS[(block * 29 + port * 7) & 0xFF] for block in range(first, last + 1))
    return b"".join(blocks)[offset & 0xFF :][:length]


class Peers:
    """The peers' process, which is the reference's: commands are letters, each is answered by itself."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [arguments.reference, "--peers"]
            for name in ("connections", "receive", "unacked", "unsent"):
                command += [f"--{name}", str(getattr(arguments, name))]
            self._process = subprocess.Popen(command, stdin=theirs.fileno())

    def begin(self, letter: bytes, data: bytes = b"") -> None:
        self._control.sendall(letter + data)

    def finish(self, letter: bytes) -> None:
        if self._control.recv(1) != letter:
            raise SystemExit(f"the peers failed at {letter!r}")

    def tell(self, letter: bytes, data: bytes = b"") -> None:
        self.begin(letter, data)
        self.finish(letter)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


class Cost:
    """Microseconds a connection: this thread's processor time for each phase, and the sum by the clock as well."""

    def __init__(self, connections: int) -> None:
        self.scale = 1e6 / connections
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.wall = self.user = self.system = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = resource.getrusage(resource.RUSAGE_THREAD)
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.phases[name] += (time.thread_time() - cpu) * self.scale
        self.wall += (time.perf_counter() - wall) * self.scale
        after = resource.getrusage(resource.RUSAGE_THREAD)
        self.user += (after.ru_utime - before.ru_utime) * self.scale
        self.system += (after.ru_stime - before.ru_stime) * self.scale

    def report(self) -> dict[str, float]:
        sums = {"cpu": sum(self.phases.values()), "wall": self.wall, "user": self.user, "system": self.system}
        return {name: round(value, 3) for name, value in {**self.phases, **sums}.items()}


class Subject:
    """N connections whose one end is here."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        bulk.prepare()  # as whoever moves many does beforehand
        self.peers = Peers(arguments)
        listener = socket.socket()  # without SO_REUSEADDR, as the reference's: an option more would be carried
        listener.bind(("127.0.0.1", 8000))
        listener.listen(1024)
        self.peers.begin(b"c")
        self.socks: list[socket.socket] = [listener.accept()[0] for _ in range(arguments.connections)]
        self.peers.finish(b"c")
        listener.close()
        self.ports: list[int] = [sock.getpeername()[1] for sock in self.socks]
        self.streamed = array("Q", bytes(8 * len(self.socks)))
        for sock in self.socks:
            _give_options(sock, arguments.options)
        self._queue_data()

    def _queue_data(self) -> None:
        receive, unacked, unsent = self.arguments.receive, self.arguments.unacked, self.arguments.unsent
        if receive:
            self.peers.tell(b"w")
            _await(lambda: all(_queued(sock, termios.FIONREAD) == receive for sock in self.socks))
        if unacked:
            self.peers.tell(b"d")
        if unacked or unsent:
            self._fill_send_queues(unacked or unsent)
        if unsent:  # a timer may probe a shut window at any moment; no hold stands: an answer would draw a RST
            self.peers.tell(b"d")
        if receive or unacked or unsent:
            time.sleep(QUIET)

    def _fill_send_queues(self, length: int) -> None:
        """Write to every peer until exactly ``length`` bytes stay queued and no window probe brings a byte across."""
        for sock in self.socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * length)
        settled, deadline = 0, time.monotonic() + PATIENCE
        while settled < 3:
            settled += 1
            for i, sock in enumerate(self.socks):
                if missing := length - _queued(sock, termios.TIOCOUTQ):
                    data = pattern(self.ports[i], self.streamed[i], missing)
                    self.streamed[i] += sock.send(data, socket.MSG_DONTWAIT)
                    settled = 0
            time.sleep(QUIET)
            if time.monotonic() > deadline:
                raise SystemExit(f"the send queues do not settle at {length} bytes")

    def run_round(self) -> dict[str, float]:
        cost = Cost(len(self.socks))
        for start in range(0, len(self.socks), self.arguments.batch):
            batch = slice(start, start + self.arguments.batch)
            self.socks[batch] = self._run_batch(self.socks[batch], cost)
        return cost.report()

    def _run_batch(self, old: list[socket.socket], cost: Cost) -> list[socket.socket]:
        with cost.phase("save"):
            records = [_done(record) for record in dump_many(old)]
        with cost.phase("close"):
            _all_done(release_many(old))
        for sock in old:  # the application's, not counted
            sock.close()
        with cost.phase("restore"):
            new = [_done(sock) for sock in restore_many(records, activate=False)]
        with cost.phase("resume"):
            _all_done(activate_many(new))
        wanted = (self.arguments.receive, self.arguments.unacked or self.arguments.unsent)
        for record in records:
            if (len(record.received), len(record.sent) + len(record.unsent)) != wanted:
                raise SystemExit(f"saved otherwise than prepared: {record}")
        return new

    def check(self) -> None:
        """Every connection delivers what was queued and one byte more, and the peer's answer arrives."""
        if self.arguments.unacked or self.arguments.unsent:
            self.peers.tell(b"h")
        for i, sock in enumerate(self.socks):
            sock.send(pattern(self.ports[i], self.streamed[i], 1))
            self.streamed[i] += 1
        self.peers.tell(b"r", self.streamed.tobytes())
        wanted = self.arguments.receive
        for sock, port in zip(self.socks, self.ports, strict=True):
            sock.settimeout(PATIENCE)
            data = sock.recv(wanted + 1, socket.MSG_WAITALL)
            if len(data) != wanted + 1 or data[:wanted] != pattern(port, 0, wanted):
                raise SystemExit(f"port {port}: what had been received is lost or damaged")

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
        self.peers.close()


def _give_options(sock: socket.socket, which: str) -> None:
    for option in OPTIONS:
        chosen = which == "all" or (which == "usual" and option.name in USUAL)
        if chosen and option.readable and option.family in (0, 4) and option.phase is not Phase.UNCONNECTED:
            with suppress(OSError):  # this kernel has none
                option_values.put(sock, option, option.sample)


def _done(result: Moved | Error) -> Moved:
    if isinstance(result, Error):
        raise SystemExit(f"not moved: {result}")
    return result


def _all_done(results: list[Error | None]) -> None:
    if any(results):
        raise SystemExit(f"not moved: {next(filter(None, results))}")


def _queued(sock: socket.socket, request: int) -> int:
    length: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), request, bytes(4)))[0]
    return length


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("what the peers wrote does not arrive")
        time.sleep(0.01)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True, help="the built reference, whose peers are used")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--paced", action="store_true", help="begin a round when a byte comes, say so when it is done")
    parser.add_argument("--warm", type=int, default=0, metavar="ROUNDS", help="rounds before each one that is timed")
    for queue in ("--receive", "--unacked", "--unsent"):
        parser.add_argument(queue, type=int, default=0, metavar="BYTES")
    parser.add_argument("--options", choices=("none", "usual", "all"), default="none", help="what our ends have set")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or arguments.connections
    return arguments


def main() -> None:
    arguments = _arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    subprocess.run(LOOPBACK, shell=True, check=True)
    subject = Subject(arguments)
    rounds = []
    for _ in range(arguments.rounds):
        if arguments.paced and not sys.stdin.buffer.read(1):
            raise SystemExit("nobody wants the next round")
        for _ in range(arguments.warm):
            subject.run_round()
        rounds.append(subject.run_round())
        if arguments.paced:
            print(flush=True)
    if arguments.options != "all":  # among them are a filter and a TTL that let nothing pass
        subject.check()
    subject.close()
    json.dump({"v": 1, "connections": arguments.connections, "rounds": rounds}, sys.stdout)


if __name__ == "__main__":
    main()
