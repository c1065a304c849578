"""Who takes the connections that arrive: the words of --adopt, LOCAL=HOW."""

from __future__ import annotations

import shlex
import shutil
import socket
from collections.abc import Sequence
from typing import NamedTuple

from migrate.adopt.relay import RelayAdopter
from migrate.adopt.spawner import Gate, Spawner
from migrate.errors import HostError, UsageError
from migrate.fourtuple import FourTuple, parse_endpoint

__all__ = ["Adopters", "Rule", "parse_rule"]

_HINT = "write LOCAL=HOW, LOCAL an ADDR:PORT or *, HOW child:CMD, systemd:CMD, relay:HOST:PORT or hold"


class Rule(NamedTuple):
    """Connections of one local end, or of all, and who gets them. ``command`` is empty for hold."""

    local: tuple[bytes, int | None] | None
    how: str
    command: tuple[str, ...]


def parse_rule(text: str) -> Rule:
    """One --adopt. Raises UsageError."""
    where, equals, how = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} names no adopter", hint=_HINT)
    local = None if where == "*" else parse_endpoint(where)
    kind, _, rest = how.partition(":")
    if kind == "hold" and not rest:
        return Rule(local, kind, ())
    if kind == "relay" and rest:
        return Rule(local, kind, tuple(RelayAdopter(rest).command))
    if kind in ("child", "systemd") and (command := tuple(shlex.split(rest))):
        return Rule(local, kind, command)
    raise UsageError(f"{how!r} is no way to adopt connections", hint=_HINT)


class Adopters:
    """The rules, the most exact first."""

    def __init__(self, rules: Sequence[Rule], spawner: Spawner) -> None:
        self._rules = sorted(rules, key=lambda rule: (rule.local is None, bool(rule.local and rule.local[1] is None)))
        self._spawner = spawner

    def rule_for(self, four_tuple: FourTuple) -> Rule | None:
        """Who gets this connection, or None: nobody."""
        for rule in self._rules:
            if rule.local is None:
                return rule
            address, port = rule.local
            if address in (b"", four_tuple.local) and port in (None, four_tuple.local_port):
                return rule
        return None

    def refusal(self, four_tuple: FourTuple) -> str | None:
        """Why nobody here would take this connection, or None."""
        rule = self.rule_for(four_tuple)
        if rule is None:
            return "nobody at the destination adopts it (--adopt)"
        if rule.command and shutil.which(rule.command[0]) is None:
            return f"its adopter at the destination, {rule.command[0]!r}, does not exist"
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
