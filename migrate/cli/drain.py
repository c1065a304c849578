"""tcpmig drain: everything that this host can migrate moves to other agents' hosts."""

from __future__ import annotations

import argparse

from migrate.cli import moving
from migrate.cli.output import Output

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and how."""
    parser.add_argument("--to", metavar="AGENT[,AGENT]", required=True, help="HOST:PORT or unix:PATH, in their order")
    moving.add_options(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Ask this host's agent, and follow."""
    with moving.client(arguments) as agent:
        reports = agent.drain(
            [each for each in arguments.to.split(",") if each],
            steer=arguments.steer,
            maps=moving.maps(arguments),
            when_quiet=arguments.when_quiet,
            dry_run=arguments.dry_run,
        )
        return moving.follow(reports, output, dry_run=arguments.dry_run)
