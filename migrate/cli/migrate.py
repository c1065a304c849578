"""tcpmig migrate: connections move to another agent's host."""

from __future__ import annotations

import argparse

from migrate.cli import moving, selector
from migrate.cli.output import Output
from migrate.errors import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Selectors, where to, and how."""
    selector.add_arguments(parser)
    parser.add_argument("--to", metavar="AGENT", required=True, help="the other agent: HOST:PORT or unix:PATH")
    moving.add_options(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Ask this host's agent, and follow."""
    chosen = selector.from_arguments(arguments)
    if chosen.empty:
        raise UsageError("which connections?", hint="give CONN or one of --local, --remote, --state, --pid; or drain")
    with moving.client(arguments) as agent:
        reports = agent.migrate(
            chosen,
            arguments.to,
            steer=arguments.steer,
            maps=moving.maps(arguments),
            when_quiet=arguments.when_quiet,
            dry_run=arguments.dry_run,
        )
        return moving.follow(reports, output, dry_run=arguments.dry_run)
