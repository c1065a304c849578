"""tcpmig completion: print a shell's completion script."""

from __future__ import annotations

import argparse

from migrate.cli.output import Output
from migrate.errors import HostError

__all__ = ["add_arguments", "completes_files", "run"]

_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab.FILE, which need not be loaded


def completes_files(argument: argparse.Action) -> None:
    """The shell completes this argument with names of files."""
    argument.complete = _FILES  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell to complete in")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Drawn from the parser itself, so it knows every verb and option."""
    from migrate.cli.main import build_parser

    try:
        import shtab
    except ImportError:
        raise HostError("completion scripts need the package shtab", hint="pip install shtab") from None
    print(shtab.complete(build_parser(), shell=arguments.shell), file=output.stdout)
    return 0
