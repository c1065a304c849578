"""Random histories of one connection whose two ends may both move, and what their applications see of them."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import strategies as st

import migrate
from migrate.kernel.option_table import Value
from tests.fix_netns import Host, Lan
from tests.lives import FAMILIES, option_values_of
from tests.moving import Mover, four_tuple
from tests.peers import noise
from tests.waiting import until

__all__ = ["History", "Outcome", "Stage", "histories"]

OTHER4, OTHER6 = "10.0.0.101", "fd00::101"  # the client's floating addresses
RTO_MIN_US, TCP_RTO_MIN_US = 20_000, 45  # microseconds; include/uapi/linux/tcp.h: losses shall not take long
EPIPE = "EPIPE"


class Write(NamedTuple):
    """``end`` (0 the client, 1 the server) writes, now or as soon as it can."""

    end: int
    length: int


class Read(NamedTuple):
    """It reads what is there, at most that many bytes."""

    end: int
    length: int


class Close(NamedTuple):
    """It is done with writing."""

    end: int


class Set(NamedTuple):
    """It sets an option."""

    end: int
    option: tuple[int, int, int]


class Lose(NamedTuple):
    """Of what comes to its host every so many-th segment is lost, from now on; 0 ends that."""

    end: int
    every: int


class Move(NamedTuple):
    """It moves to its other host."""

    end: int


Step = Write | Read | Close | Set | Lose | Move


class History(NamedTuple):
    """What happens, in order."""

    family: str
    steps: tuple[Step, ...]


_TCP, _SOL, _IP = socket.IPPROTO_TCP, socket.SOL_SOCKET, socket.IPPROTO_IP
_OPTIONS = (
    st.tuples(st.just(_TCP), st.sampled_from([socket.TCP_NODELAY, socket.TCP_CORK]), st.integers(0, 1))
    | st.tuples(st.just(_TCP), st.sampled_from([socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL]), st.integers(1, 1000))
    | st.tuples(st.just(_SOL), st.sampled_from([socket.SO_KEEPALIVE, socket.SO_OOBINLINE]), st.integers(0, 1))
    | st.tuples(st.just(_SOL), st.sampled_from([socket.SO_SNDBUF, socket.SO_RCVBUF]), st.integers(3000, 300_000))
    | st.tuples(st.just(_SOL), st.just(socket.SO_PRIORITY), st.integers(0, 6))
    | st.tuples(st.just(_SOL), st.just(socket.SO_REUSEADDR), st.integers(0, 1))
    | st.tuples(st.just(_IP), st.just(socket.IP_TOS), st.sampled_from([0, 0x10, 0x20, 0xB8]))
    | st.tuples(st.just(_TCP), st.just(socket.TCP_NOTSENT_LOWAT), st.integers(1000, 100_000))
)
_END = st.integers(0, 1)
_LENGTH = st.sampled_from([1, 100, 1448, 5000, 20_000, 70_000, 300_000])
_STEP: st.SearchStrategy[Step] = st.one_of(
    st.builds(Write, _END, _LENGTH),
    st.builds(Write, _END, _LENGTH),
    st.builds(Read, _END, _LENGTH),
    st.builds(Move, _END),
    st.builds(Move, _END),
    st.builds(Close, _END),
    st.builds(Set, _END, _OPTIONS),
    st.builds(Lose, _END, st.sampled_from([0, 1, 2, 3])),
)


def _unheard(end: int) -> list[tuple[Step, ...]]:
    """The states that last only while the peer does not hear our FIN: FIN_WAIT_1, CLOSING, LAST_ACK."""
    peer = 1 - end
    return [
        (Lose(peer, 1), Close(end), Move(end)),
        (Lose(peer, 1), Close(end), Close(peer), Move(end)),
        (Close(peer), Lose(peer, 1), Close(end), Move(end)),
    ]


_STEPS = _STEP.map(lambda step: (step,)) | st.sampled_from(_unheard(0) + _unheard(1))
histories: st.SearchStrategy[History] = st.builds(
    History, st.sampled_from(FAMILIES), st.lists(_STEPS, min_size=1, max_size=10).map(lambda some: sum(some, ()))
)


@dataclass
class Outcome:
    """What one application can tell of its connection: compare two with ==."""

    received: str = ""  # SHA-256
    length: int = 0
    ended: bool = False
    errors: list[str] = field(default_factory=list)
    options: dict[str, Value] = field(default_factory=dict)


class _End:
    """An application: what it still has to write, what it has read."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sock = sock
        self.outcome = Outcome()
        self._hash = hashlib.sha256()
        self._noise = noise(seed)
        self._pending = bytearray()
        self._closing = self._closed = False
        sock.setblocking(False)

    def write(self, length: int) -> None:
        if self._closing:
            self.outcome.errors.append(EPIPE)
            return
        while length > 0:
            block = next(self._noise)[:length]
            self._pending += block
            length -= len(block)
        self.flush()

    def close(self) -> None:
        self._closing = True
        self.flush()

    def flush(self) -> bool:
        """Write what can be written; whether that was all."""
        with contextlib.suppress(BlockingIOError):
            while self._pending:
                del self._pending[: self.sock.send(self._pending)]
            if self._closing and not self._closed:
                self.sock.shutdown(socket.SHUT_WR)
                self._closed = True
        return not self._pending

    def read(self, length: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while length > 0 and not self.outcome.ended:
                data = self.sock.recv(length)
                self.outcome.ended = not data
                self._hash.update(data)
                self.outcome.length += len(data)
                length -= len(data)

    def finish(self) -> Outcome:
        self.outcome.received = self._hash.hexdigest()
        self.outcome.options = option_values_of(self.sock)
        error = self.sock.getsockopt(_SOL, socket.SO_ERROR)
        if error:
            self.outcome.errors.append(f"errno {error}")
        return self.outcome


class Stage:
    """Four hosts, two for each end, on which histories are played one after the other."""

    def __init__(self, net: Lan, stack: contextlib.ExitStack) -> None:
        hosts = [net.host(name) for name in ("c", "d", "a", "b")]
        self.four = [
            stack.enter_context(Mover(hosts[0], hosts[1], OTHER4)),
            stack.enter_context(Mover(hosts[2], hosts[3], net.vip4)),
        ]
        self.six = [
            stack.enter_context(Mover(hosts[0], hosts[1], OTHER6)),
            stack.enter_context(Mover(hosts[2], hosts[3], net.vip6)),
        ]
        self._lossy: set[str] = set()
        self._hosts = {host.name: host for host in hosts}

    def play(self, history: History, *, moving: bool = True) -> tuple[Outcome, Outcome]:
        """What client and server saw; without ``moving`` nobody moves and all else is the same."""
        movers = self.six if history.family == "ipv6" else self.four
        for mover in movers:
            mover.settle()
        ends = [_End(sock, seed) for seed, sock in enumerate(_connected(movers, history.family))]
        ours = four_tuple(ends[1].sock)
        names = [ours.reversed(), ours]
        try:
            for step in history.steps:
                self._happen(step, ends, movers, names, moving=moving)
                for end in ends:
                    end.flush()
            self._heal()
            for end in ends:
                end.close()
            until(lambda: sum(map(_over, ends)) == 2, within=30, what=f"{history} comes to its end")
            return ends[0].finish(), ends[1].finish()
        finally:
            self._heal()
            for end in ends:
                end.sock.close()

    def _happen(
        self, step: Step, ends: list[_End], movers: list[Mover], names: list[migrate.FourTuple], *, moving: bool
    ) -> None:
        end, mover = ends[step.end], movers[step.end]
        match step:
            case Write(_, length):
                end.write(length)
            case Read(_, length):
                end.read(length)
            case Close():
                end.close()
            case Set(_, option):
                end.sock.setsockopt(*option)
            case Lose(_, every):
                self._lose(mover.here, every)
            case Move() if moving:
                end.sock = mover.move(end.sock, names[step.end])
                end.sock.setblocking(False)

    def _lose(self, host: Host, every: int) -> None:
        if host.name in self._lossy:
            host.run(["nft", "delete", "table", "inet", "loss"])
            self._lossy.discard(host.name)
        if every:
            rule = f'iifname "{host.dev}" meta l4proto tcp numgen inc mod {every} 0 drop'
            chain = "type filter hook prerouting priority -250; policy accept;"
            host.run(["nft", f"table inet loss {{ chain loss {{ {chain} {rule}; }}; }}"])
            self._lossy.add(host.name)

    def _heal(self) -> None:
        for name in list(self._lossy):
            self._lose(self._hosts[name], 0)


def _over(end: _End) -> bool:
    end.read(1 << 22)
    return end.flush() and end.outcome.ended


def _connected(movers: list[Mover], family: str) -> list[socket.socket]:
    client, server = (mover.address for mover in movers)
    with movers[1].here.entered():
        listener = socket.socket(socket.AF_INET if family == "ipv4" else socket.AF_INET6)
    with listener:
        if family == "mapped":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(_TCP, TCP_RTO_MIN_US, RTO_MIN_US)
        listener.bind((f"::ffff:{server}" if family == "mapped" else server, 0))
        listener.listen()
        with movers[0].here.entered():
            here = socket.socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET)
        here.setsockopt(_TCP, TCP_RTO_MIN_US, RTO_MIN_US)
        here.bind((client, 0))
        here.settimeout(10)
        here.connect((server, listener.getsockname()[1]))
        return [here, listener.accept()[0]]
