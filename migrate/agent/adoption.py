"""Who takes the connections that arrive: the words of --adopt, LOCAL=HOW."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import socket
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from migrate.adopt.relay import RelayAdopter
from migrate.adopt.sockets import MAX_PATH, listener_at
from migrate.adopt.spawner import Gate, Spawner
from migrate.agent.engine import Engine
from migrate.agent.logging import get_logger
from migrate.errors import Error, HostError, UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.kernel import sockopt
from migrate.selection import Selector, Takers, find

__all__ = ["Adopters", "Rule", "open_gate", "parse_rule", "speaks"]

_log = get_logger(__name__)

_OFFERS = 16  # batches that are offered to applications side by side
_HINT = "write LOCAL=HOW, LOCAL an ADDR:PORT or *, HOW child:CMD, systemd:CMD, unix:PATH, relay:HOST:PORT or hold"


class Rule(NamedTuple):
    """Connections of one local end, or of all, and who gets them: a ``command``, or the application at ``path``."""

    local: tuple[bytes, int | None] | None
    how: str
    command: tuple[str, ...] = ()
    path: str = ""


def parse_rule(text: str) -> Rule:
    """One --adopt. Raises UsageError."""
    where, equals, how = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} names no adopter", hint=_HINT)
    local = None if where == "*" else parse_endpoint(where)
    kind, _, rest = how.partition(":")
    if kind == "hold" and not rest:
        return Rule(local, kind)
    if kind == "relay" and rest:
        return Rule(local, kind, tuple(RelayAdopter(rest).command))
    if kind == "unix" and 0 < len(os.fsencode(rest)) <= MAX_PATH:
        return Rule(local, kind, path=rest)
    if kind in ("child", "systemd") and (command := tuple(shlex.split(rest))):
        return Rule(local, kind, command)
    raise UsageError(f"{how!r} is no way to adopt connections", hint=_HINT)


class Adopters:
    """The rules, the most exact first. ``users`` are numbers: whose applications take part, besides root's and ours."""

    def __init__(self, rules: Sequence[Rule], spawner: Spawner, users: Collection[int] = ()) -> None:
        self.users = users
        # A thread that is there is quicker than one that must be made.
        self.offering = ThreadPoolExecutor(_OFFERS, thread_name_prefix="offer")
        self._rules = sorted(rules, key=lambda rule: (rule.local is None, bool(rule.local and rule.local[1] is None)))
        self._spawner = spawner
        self._rule = functools.lru_cache(maxsize=1024)(self._find)

    def rule_for(self, four_tuple: FourTuple) -> Rule | None:
        """Who gets this connection, or None: nobody."""
        return self._rule(four_tuple.local, four_tuple.local_port)

    def _find(self, local: bytes, local_port: int) -> Rule | None:
        for rule in self._rules:
            if rule.local is None:
                return rule
            address, port = rule.local
            if address in (b"", local) and port in (None, local_port):
                return rule
        return None

    def application(self, four_tuple: FourTuple) -> str | None:
        """Where the application listens that gets this connection, and gives it; None: none does."""
        rule = self.rule_for(four_tuple)
        return rule.path if rule is not None and rule.how == "unix" else None

    def refusals(self, connections: Iterable[FourTuple]) -> dict[FourTuple, str]:
        """Why nobody here would take these; the others are left out."""
        rules = {each: self.rule_for(each) for each in connections}
        why = {rule: self._missing(rule) for rule in set(rules.values())}
        return {each: reason for each, rule in rules.items() if (reason := why[rule]) is not None}

    def _missing(self, rule: Rule | None) -> str | None:
        if rule is None:
            return "nobody at the destination adopts it (--adopt)"
        if rule.command and shutil.which(rule.command[0]) is None:
            return f"its adopter at the destination, {rule.command[0]!r}, does not exist"
        if rule.how == "unix":
            try:
                if listener_at(rule.path, self.users) is None:
                    return f"no application at {rule.path} at the destination"
            except Error as error:
                return f"at the destination, {error.what}"
        return None

    def adopt(self, rule: Rule, sockets: Sequence[socket.socket]) -> Gate:
        """Hand silent sockets to the owner that the rule names; it waits at the gate. Raises HostError."""
        match rule.how:
            case "hold":
                return self._spawner.keep(sockets)
            case "child":
                return self._spawner.inetd(rule.command, sockets)
            case "systemd" | "relay":
                return self._spawner.systemd(rule.command, sockets)
        raise HostError(f"no adopter {rule.how!r}")


def open_gate(engine: Engine, gate: Gate) -> None:
    """The connections are active: let their owners run, and log it if they cannot. In the engine's thread."""

    def started() -> None:
        said = os.read(gate.status, 1024)
        if said:
            _log.error("an adopter could not be started", why=said.decode(errors="replace"))
        else:
            engine.unwatch(gate.status)
            os.close(gate.status)

    engine.watch(gate.status, started)
    try:
        gate.go()
    except HostError as error:
        _log.error("adoption failed", why=str(error))


def speaks(each: FourTuple) -> bool:
    """Whether the socket of that connection, at whatever owner, has left repair mode."""
    found = next(iter(find(Selector(connection=each))), None)
    if found is None or not found.owners:
        return False
    with Takers() as takers:
        sockets, _failures = takers.take({each: found.owners})
    for sock in sockets.values():
        with sock, contextlib.suppress(OSError):
            return not sockopt.in_repair(sock)
    return False
