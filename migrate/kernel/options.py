"""The socket options of a connection: read what is not as in a fresh socket, and set it on another one.

    found = options.read(sock)                     before repair mode, which changes SO_REUSEADDR
    left = options.apply(new, found, Phase.IN_REPAIR)      at each moment of a restore: the names that could not be set

`kernel.option_table` says what there is. Fresh is a socket just made in the same network namespace: what comes from
the host's settings stays the host's. An option that a kernel lacks is no failure, neither here nor there.

A connection has a hundred options and each getsockopt costs 0.3 to 0.5 µs: all of them would cost more than the rest
of a move, even in C. Therefore a socket is asked for all of them only if none like it was seen within a second:
`kernel.fingerprint` tells, for 1 µs, that all bytes which hold options are as in one already asked. To get that ready
takes some 40 ms, and privileges that an ordinary user lacks; it happens once it has paid off, or by `prepare`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from migrate.errors import from_oserror
from migrate.kernel import netns, option_values
from migrate.kernel.fingerprint import Fingerprint
from migrate.kernel.option_table import BY_NAME, OPTIONS, Kind, Option, Phase, Value

__all__ = ["Kind", "Phase", "Value", "apply", "calls", "flowinfo", "look_many", "prepare", "read", "recognise_many"]

PAYS_OFF = 1000  # sockets asked the long way cost as much as getting fingerprints ready
MEMORY = 1.0  # seconds: as long a host's changed settings may go unnoticed

_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_SIOCGSKNS = 0x894C  # include/uapi/linux/sockios.h
_COOKIE_BYTES = 8

# An int for getsockopt, for setsockopt, and nothing to add.
_PLAIN = frozenset({Kind.INT, Kind.HOPS, Kind.SIZE, Kind.CLAMP})
_SET_PLAINLY = frozenset({Kind.INT, Kind.HOPS, Kind.DSCP, Kind.CLAMP})
# Part of the value lies outside of the socket: equal fingerprints tell that there is one, not that it is the same.
_ELSEWHERE = frozenset({Kind.HOPS, Kind.DEVICE, Kind.BYTES})
_CHARGED = frozenset({Kind.STICKY, Kind.FILTER})
_SIZES = frozenset({"SO_SNDBUF", "SO_RCVBUF", "TCP_WINDOW_CLAMP"})
_ORDER = {option.name: place for place, option in enumerate(OPTIONS)}


class _Fresh(NamedTuple):
    """What a fresh socket of one namespace and family answers: the options that this kernel has, and their defaults."""

    plain: list[tuple[str, int, int, Value]]  # name, level, number, default
    others: list[tuple[Option, Value]]
    charged: list[tuple[Option, Value]]  # there only if the socket is charged for option memory
    defaults: dict[str, Value]


class _Known(NamedTuple):
    """What a fingerprint stands for."""

    options: dict[str, Value]
    send: Value
    receive: Value
    ask: list[tuple[Option, Value]]  # to be asked of each socket like it, with the default
    charged: list[tuple[Option, Value]]  # the same, but a filter may be one that cannot be read


class _Memory:
    """What was learnt lately. It is thrown away as a whole, so that no change of the host's settings lasts."""

    def __init__(self) -> None:
        self.until = time.monotonic() + MEMORY
        self.fresh: dict[tuple[bytes, int, bool], _Fresh] = {}
        self.known: dict[bytes, _Known] = {}
        self.same: dict[tuple[Any, ...], dict[str, Value]] = {}  # of those that need not be asked, by key and sizes


class _Reader:
    """Asks sockets, the long way or by their fingerprints."""

    def __init__(self) -> None:
        self.memory = _Memory()
        self.fingerprint: Fingerprint | None = None
        self.able = True  # to get fingerprints ready, as far as is known
        self.asked = 0  # sockets asked the long way

    def prepare(self) -> bool:
        if self.fingerprint is None and self.able:
            try:
                self.fingerprint = Fingerprint(_settle)
            except (OSError, LookupError, ValueError, struct.error):
                self.able = False
        return self.fingerprint is not None

    def read(self, sock: socket.socket, connected: bool) -> dict[str, Value]:
        fingerprint = self.ready(1)
        if fingerprint and connected:
            return self.recognise(fingerprint, sock, fingerprint.take(sock.fileno())).copy()
        return self.ask(sock, connected)

    def ready(self, count: int) -> Fingerprint | None:
        """Before that many sockets are read: nothing stale is known, and fingerprints are there if they pay off."""
        if time.monotonic() > self.memory.until:
            self.memory = _Memory()
        if self.asked + count > PAYS_OFF:
            self.prepare()
        return self.fingerprint

    def recognise(self, fingerprint: Fingerprint, sock: socket.socket, taken: tuple[Any, ...]) -> dict[str, Value]:
        sizes = taken[:4]
        if (same := self.memory.same.get(sizes)) is not None:
            return same
        key, send, receive, clamp = sizes
        like = self.memory.known.get(key)
        if like is None:
            like = self.learn(fingerprint, sock)
            if fingerprint.take(sock.fileno())[0] == key:  # else somebody is just changing it
                self.memory.known[key] = like
        options = like.options.copy()
        if send != like.send:
            options["SO_SNDBUF"] = send
        if receive != like.receive:
            options["SO_RCVBUF"] = receive
        if clamp != receive // 2:
            options["TCP_WINDOW_CLAMP"] = clamp
        if key in self.memory.known and not like.ask and not like.charged:
            self.memory.same[sizes] = options
        for option, default in like.ask:
            if (value := option_values.get(sock, option)) != default:
                options[option.name] = value
        if like.charged:
            options |= _charged(sock, like.charged)
        return options

    def learn(self, fingerprint: Fingerprint, sock: socket.socket) -> _Known:
        """Ask one socket for what its fingerprint says, and find what is to be asked of each that looks like it."""
        fresh, options = self.fresh(sock, True), self.ask(sock, True)
        charged = {option.name for option, _default in fresh.charged} | {"SO_ATTACH_BPF"}
        doubtful = fingerprint.unproven | {name for name in options if BY_NAME[name].kind in _ELSEWHERE}
        again = fresh.charged if charged & (options.keys() | doubtful) else []
        ask = [(BY_NAME[name], fresh.defaults[name]) for name in fresh.defaults if name in doubtful - charged]
        sure = {name: value for name, value in options.items() if name not in doubtful | charged | _SIZES}
        return _Known(sure, fresh.defaults["SO_SNDBUF"], fresh.defaults["SO_RCVBUF"], ask, again)

    def ask(self, sock: socket.socket, connected: bool) -> dict[str, Value]:
        """The long way: one call an option."""
        self.asked += 1
        fresh, get = self.fresh(sock, connected), sock.getsockopt
        found: dict[str, Value] = {}
        for name, level, number, default in fresh.plain:
            if (value := get(level, number)) != default:
                found[name] = value
        for option, default in fresh.others:
            if option.kind is Kind.LABEL and "IPV6_FLOWINFO_SEND" not in found:
                continue  # the kernel does not tell
            if (other := option_values.get(sock, option)) != default:
                found[option.name] = other
        if connected and found.get("TCP_WINDOW_CLAMP") == sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2:
            del found["TCP_WINDOW_CLAMP"]
        if option_values.option_memory(sock):
            found |= _charged(sock, fresh.charged)
        return found

    def fresh(self, sock: socket.socket, connected: bool) -> _Fresh:
        """The defaults for a socket like this one."""
        namespace = _namespace(sock)
        place = namespace, sock.family, connected
        if place not in self.memory.fresh:
            with _made_beside(sock, namespace) as fresh:
                self.memory.fresh[place] = _defaults(fresh, connected)
        return self.memory.fresh[place]

    def forget(self) -> None:
        """In a forked child: the memory that the fingerprints are in is the parent's, too."""
        if self.fingerprint:
            self.fingerprint.close()
            self.fingerprint = None


_reader = _Reader()
os.register_at_fork(after_in_child=_reader.forget)


def prepare() -> bool:
    """Get fingerprints ready now, some 40 ms, rather than amidst a move. False where this process may not."""
    return _reader.prepare()


def read(sock: socket.socket, *, connected: bool = True) -> dict[str, Value]:
    """The options that are not as in a fresh socket, by name, in the form that `Kind` describes.

    ``connected`` is False for a socket in CLOSE or LISTEN, which has a few more. Buffer sizes stand there as soon as
    autotuning moved them, with or without SO_BUF_LOCK. An eBPF filter is reported as SO_ATTACH_BPF: there is one, and
    it cannot be carried. Raises KernelError.
    """
    try:
        return _reader.read(sock, connected)
    except OSError as error:
        raise from_oserror("reading socket options", error) from None


def look_many(descriptors: Sequence[int]) -> list[tuple[Any, ...]]:
    """Of each of these TCP sockets what `fingerprint.Print` names. After `prepare` said True. Raises KernelError."""
    fingerprint = _reader.ready(len(descriptors))
    assert fingerprint
    try:
        return fingerprint.take_many(descriptors)
    except OSError as error:
        raise from_oserror("reading socket options", error) from None


def recognise_many(socks: Iterable[socket.socket], looks: Iterable[tuple[Any, ...]]) -> list[dict[str, Value]]:
    """`read` of connected sockets that were just looked at. Raises KernelError.

    Those that are alike share one dictionary: it is not to be changed.
    """
    fingerprint = _reader.fingerprint
    assert fingerprint
    try:
        return [_reader.recognise(fingerprint, sock, look) for sock, look in zip(socks, looks, strict=True)]
    except OSError as error:
        raise from_oserror("reading socket options", error) from None


def apply(sock: socket.socket, options: Mapping[str, Value], phase: Phase) -> list[str]:
    """Set those of ``options`` whose moment is ``phase``; the names of those that could not be set.

    `Phase.UNCONNECTED` sets all at once. Names that this version does not know count as such before bind, and so do
    those that a connection has no use for. Raises KernelError if the socket is closed.
    """
    if not options:
        return []
    steps, unknown = _schedule(tuple(options))[phase]
    left = unknown.copy()
    put = sock.setsockopt
    for name, level, number, other in steps:
        value = options.get(name, 0)
        try:
            if other:
                option_values.put(sock, other, value)
            elif value.__class__ is int:
                put(level, number, value)
            else:
                left.append(name)
        except OSError as error:
            if sock.fileno() < 0:
                raise from_oserror(f"setting {name}", error) from None
            left.append(name)
        except (TypeError, ValueError, OverflowError, struct.error):  # a value of another form than this option's
            left.append(name)
    return left


def calls(options: Mapping[str, Value], phase: Phase) -> tuple[tuple[tuple[int, int, bytes], ...], dict[str, Value]]:
    """What `apply` does at that moment by setsockopt alone (level, number, value), and the options that need more."""
    steps, unknown = _schedule(tuple(options))[phase]
    made: list[tuple[int, int, bytes]] = []
    rest = {name: options[name] for name in unknown}
    for name, *_ in steps:
        value = options.get(name, 0)
        try:
            call = option_values.call(BY_NAME[name], value)
        except (TypeError, ValueError, OverflowError, struct.error):
            call = None
        if call is None:
            rest[name] = value
        else:
            made.append(call)
    return tuple(made), rest


class _Step(NamedTuple):
    """One setsockopt; ``other`` is the option if its value is not a plain int in the kernel."""

    name: str
    level: int
    number: int
    other: Option | None


@functools.lru_cache(maxsize=1024)
def _schedule(names: tuple[str, ...]) -> list[tuple[list[_Step], list[str]]]:
    """For each phase, what of these is set in it, in order, and what cannot be. Few sets of names are ever seen."""
    return [_due(names, phase) for phase in Phase]


def _due(names: tuple[str, ...], phase: Phase) -> tuple[list[_Step], list[str]]:
    chosen, unknown = [], []
    for name in names:
        option = BY_NAME.get(name)
        if option and phase in (option.phase, Phase.UNCONNECTED):
            chosen.append(option)
        elif phase in (Phase.BEFORE_BIND, Phase.UNCONNECTED) and (not option or option.phase is Phase.UNCONNECTED):
            unknown.append(name)
    if any(option.kind is Kind.SIZE for option in chosen) and "SO_BUF_LOCK" not in names:
        chosen.append(BY_NAME["SO_BUF_LOCK"])  # setting a size locks it: its value is 0
    if BY_NAME["IP_TOS"] in chosen and "SO_PRIORITY" not in names:
        chosen.append(BY_NAME["SO_PRIORITY"])  # setting IP_TOS sets it, but an accepted socket begins with 0
    chosen.sort(key=_place)
    return [_Step(*option[:3], None if option.kind in _SET_PLAINLY else option) for option in chosen], unknown


def flowinfo(options: Mapping[str, Value]) -> int:
    """The sin6_flowinfo with which an AF_INET6 socket has to connect to use the flow label that it had."""
    label = options.get("IPV6_FLOWLABEL_MGR", 0)
    return label if isinstance(label, int) else 0


def _place(option: Option) -> int:
    return _ORDER[option.name]


def _settle(sock: socket.socket, option: Option) -> None:
    option_values.put(sock, option, option.sample)


def _charged(sock: socket.socket, charged: list[tuple[Option, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for option, default in charged:
        try:
            if (value := option_values.get(sock, option)) != default:
                found[option.name] = value
        except PermissionError:  # an eBPF filter
            found["SO_ATTACH_BPF"] = 1
    return found


def _namespace(sock: socket.socket) -> bytes:
    """What tells its network namespace from all others, SO_NETNS_COOKIE (Linux 5.14)."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, _COOKIE_BYTES)


@contextlib.contextmanager
def _made_beside(sock: socket.socket, namespace: bytes) -> Iterator[socket.socket]:
    """A fresh socket of the same family and network namespace, which need not be this thread's."""
    with socket.socket(sock.family) as fresh:
        if _namespace(fresh) == namespace:
            yield fresh
            return
    descriptor = fcntl.ioctl(sock, _SIOCGSKNS)
    try:
        with netns.entered(f"/proc/self/fd/{descriptor}"):
            fresh = socket.socket(sock.family)
    finally:
        os.close(descriptor)
    with fresh:
        yield fresh


def _defaults(fresh: socket.socket, connected: bool) -> _Fresh:
    version = 6 if fresh.family == socket.AF_INET6 else 4
    asked = _Fresh([], [], [], {})
    for option in OPTIONS:
        if not option.readable or option.family not in (0, version):
            continue
        if connected and option.phase is Phase.UNCONNECTED:
            continue
        try:
            default = asked.defaults[option.name] = option_values.get(fresh, option)
        except OSError:  # this kernel has no such option
            continue
        if option.kind in _PLAIN:
            asked.plain.append((option.name, option.level, option.number, default))
        elif option.kind in _CHARGED:
            asked.charged.append((option, default))
        else:
            asked.others.append((option, default))
    return asked
