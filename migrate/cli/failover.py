"""tcpmig failover: floating addresses of keepalived's and their connections move to the standby."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrate.cli import moving
from migrate.cli.floating import RUN_DIR, Floating
from migrate.cli.following import follow
from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.cli.resident import Resident
from migrate.errors import HostError, NotFound, UsageError
from migrate.kernel import pidfd

__all__ = ["add_arguments", "run"]

GRACE = 10.0  # seconds
QUIET = 5.0  # seconds
_LOOK = 0.02  # seconds between two looks whether an address is still here
_STATES = ("MASTER", "BACKUP", "FAULT", "STOP")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which addresses, where to, and what goes first; or what keepalived says."""
    parser.add_argument(
        "--address", metavar="ADDR", action="append", required=True, help="a floating address; repeatable"
    )
    parser.add_argument(
        "--to",
        metavar="AGENT",
        action="append",
        required=True,
        help="the other host's agent, HOST:PORT; again for addresses of the other IP version",
    )
    parser.add_argument(
        "--first",
        choices=("connections", "address"),
        default="connections",
        help="what moves first; with connections (the default) no address moves if one of them cannot",
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=30.0, help="for keepalived to act (30)")
    parser.add_argument(
        "--when-quiet",
        metavar="SECONDS",
        type=float,
        default=QUIET,
        help=f"how long to wait for quiet points; 0: move connections in the middle of what they do ({QUIET:g})",
    )
    parser.add_argument(
        "--follow",
        metavar="WORD",
        nargs="+",
        help="be keepalived's notify program: its FIFO, or GROUP|INSTANCE NAME STATE PRIORITY",
    )
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=float,
        default=GRACE,
        help=f"with --follow: how long after it took an address this host sends no RST from it ({GRACE:g})",
    )
    parser.add_argument("--run-dir", metavar="DIR", default=RUN_DIR, help=f"shared with the check program ({RUN_DIR})")
    moving.add_agent(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Switch, or follow."""
    if not 0 <= arguments.when_quiet <= 86400:
        raise UsageError("--when-quiet takes between 0 and 86400 seconds")
    if arguments.follow:
        return _follow(arguments, output)
    with _opened(arguments) as floatings:
        return _switch(floatings, output, first=arguments.first, timeout=arguments.timeout)


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[list[Floating]]:
    from migrate.agent.client import Client

    with contextlib.ExitStack() as opened:
        agent = opened.enter_context(Client(f"unix:{arguments.socket}"))
        yield [
            opened.enter_context(
                Floating(
                    each,
                    _towards(each, arguments.to),
                    agent,
                    Path(arguments.run_dir),
                    quiet=arguments.when_quiet or None,
                )
            )
            for each in dict.fromkeys(arguments.address)
        ]


def _towards(address: str, agents: Sequence[str]) -> str:
    """Which of the other agent's names: segments are forwarded only to an address of their own IP version."""
    version6 = ":" in address
    return next((each for each in agents if (":" in each.rpartition(":")[0]) is version6), agents[0])


def _follow(arguments: argparse.Namespace, output: Output) -> int:
    words, keepalived, ourselves = arguments.follow, os.getppid(), os.getpid()
    if len(words) != 1 and not (len(words) == 4 and words[2] in _STATES):
        raise UsageError(
            f"{' '.join(words)!r} is nothing that keepalived says",
            hint="--follow FIFO, or --follow INSTANCE NAME MASTER|BACKUP|FAULT|STOP PRIORITY",
        )
    # When keepalived ends it kills the process groups of its programs, at first softly and a second later not. What has
    # been begun takes longer: it is done in a session of its own. Forked before there are threads.
    if os.fork():
        if len(words) == 1:  # keepalived would start a FIFO's program again
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with _ended(keepalived) as ended:
                select.select([ended], [], [])
        return 0
    os.setsid()
    with _opened(arguments) as floatings:
        if len(words) == 1:
            with _ended(ourselves) as ended:
                follow(floatings, ended, output, fifo=words[0], late=False, grace=arguments.grace)
            return 0
        output.say(f"keepalived: {' '.join(words)}")
        resident = Resident(Path(arguments.run_dir), floatings[0].text)
        if words[2] != "STOP":
            resident.serve(keepalived)
        served = None
        while True:
            with resident.taken() as ours:
                # Another one may have been started before the place was free.
                if not ours or served == resident.served():
                    return 0
                served = resident.served()
                with _ended(served) as ended:
                    # A busy host takes seconds to begin this process.
                    follow(floatings, ended, output, fifo=None, late=True, grace=arguments.grace)


@contextlib.contextmanager
def _ended(pid: int) -> Iterator[int]:
    """A descriptor that is readable once that process has ended."""
    try:
        descriptor = pidfd.open_process(pid)
    except NotFound:
        descriptor = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _switch(floatings: Sequence[Floating], output: Output, *, first: str, timeout: float) -> int:
    began = time.monotonic()
    here = [each for each in floatings if each.here()]
    for floating in floatings:
        if floating in here and first == "address":
            continue
        # With the address elsewhere: what came without it, or did not go with it.
        floating.sweep(output, behind=floating not in here)
    left = {each.text: each.left() for each in floatings}
    for floating in floatings:
        if floating not in here:
            text = f"{floating.text} is not on this host: nothing to switch"
            output.data(text, {"address": floating.text, "switched": False, "left": left[floating.text]})
    if not here:
        return 1 if any(left.values()) else 0
    if first == "connections" and any(left.values()):
        for text, count in left.items():
            output.warn(f"{count} connections of {text} stay here, and the addresses with them")
        return PARTIAL
    deadline = time.monotonic() + timeout
    _give_way(here, deadline, timeout)
    # What was accepted in between, or everything: as long as it gets fewer.
    before = 0
    while (staying := sum(each.left() for each in here)) not in (0, before) and time.monotonic() < deadline:
        before = staying
        for floating in here:
            floating.sweep(output, behind=True)
    seconds = time.monotonic() - began
    for floating in here:
        count = floating.left()
        output.data(
            f"{floating.text} moved to {floating.peer}'s host in {seconds:.1f} s"
            + (f"; {count} connections could not follow and are forwarded to here" if count else ""),
            {"address": floating.text, "switched": True, "left": count, "seconds": round(seconds, 3)},
        )
    return PARTIAL if any(each.left() for each in here) else 0


def _give_way(floatings: Sequence[Floating], deadline: float, timeout: float) -> None:
    for floating in floatings:
        floating.give_way()
    try:
        while kept := [each.text for each in floatings if each.here()]:
            if time.monotonic() > deadline:
                raise HostError(
                    f"keepalived kept {' '.join(kept)} for {timeout:g} s; what is here stays",
                    hint="does its instance track the check program, and is the standby's keepalived running?",
                )
            time.sleep(_LOOK)
    finally:
        for floating in floatings:
            floating.stay()
