"""tcpmig failover: a floating address of keepalived's and its connections move to the standby."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from migrate.cli import moving
from migrate.cli.floating import RUN_DIR, Floating
from migrate.cli.following import follow
from migrate.cli.main import PARTIAL
from migrate.cli.output import Output
from migrate.errors import HostError

__all__ = ["add_arguments", "run"]

GRACE = 10.0  # seconds
_LOOK = 0.02  # seconds between two looks whether the address is still here
_AGAIN = 0.5  # seconds between two attempts to move what is left


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which address, where to, and what goes first; or what keepalived says."""
    parser.add_argument("--address", metavar="ADDR", required=True, help="the floating address")
    parser.add_argument("--to", metavar="AGENT", required=True, help="the other host's agent, HOST:PORT")
    parser.add_argument(
        "--first",
        choices=("connections", "address"),
        default="connections",
        help="what moves first; with connections (the default) nothing moves if one of them cannot",
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=30.0, help="for keepalived to act (30)")
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
        help=f"with --follow: how long after it took the address this host sends no RST from it ({GRACE:g})",
    )
    parser.add_argument("--run-dir", metavar="DIR", default=RUN_DIR, help=f"shared with the check program ({RUN_DIR})")
    moving.add_agent(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Switch, or follow."""
    from migrate.agent.client import Client

    with (
        Client(f"unix:{arguments.socket}") as agent,
        Floating(arguments.address, arguments.to, agent, Path(arguments.run_dir)) as floating,
    ):
        if arguments.follow:
            return follow(floating, arguments.follow, output, grace=arguments.grace)
        return _switch(floating, output, first=arguments.first, timeout=arguments.timeout)


def _switch(floating: Floating, output: Output, *, first: str, timeout: float) -> int:
    began = time.monotonic()
    if not floating.here():
        # What came without the address, or did not go with it.
        floating.sweep(output)
        left = floating.left()
        text = f"{floating.text} is not on this host: nothing to switch"
        output.data(text, {"address": floating.text, "switched": False, "left": left})
        return 1 if left else 0
    if first == "connections":
        floating.sweep(output)
        if left := floating.left():
            output.warn(f"{left} connections of {floating.text} stay here, and the address with them")
            return PARTIAL
    deadline = time.monotonic() + timeout
    floating.give_way()
    try:
        while floating.here():
            if time.monotonic() > deadline:
                raise HostError(
                    f"keepalived kept {floating.text} for {timeout:g} s; the address stays",
                    hint="does its instance track the check program, and is the standby's keepalived running?",
                )
            time.sleep(_LOOK)
    finally:
        floating.stay()
    # What was accepted in between, or everything.
    while floating.left() and time.monotonic() < deadline:
        floating.sweep(output)
        if floating.left():
            time.sleep(_AGAIN)
    left, seconds = floating.left(), time.monotonic() - began
    output.data(
        f"{floating.text} moved to {floating.peer}'s host in {seconds:.1f} s"
        + (f"; {left} connections could not follow" if left else ""),
        {"address": floating.text, "switched": True, "left": left, "seconds": round(seconds, 3)},
    )
    return PARTIAL if left else 0
