"""The command `tcpmig`: find the verb, run it, turn errors into a sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 usage, 3 some connections failed, 4 this host cannot.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from migrate import __version__
from migrate.cli.output import Output, explain
from migrate.errors import Error, HostError, from_oserror

__all__ = ["PARTIAL", "build_parser", "main"]

PARTIAL = 3  # exit code: some connections failed

VERBS = {
    "check": "what this host can do, each with the remedy",
    "list": "the connections here, their owners, and whether they can migrate",
    "dump": "take connections out of running processes, into a file",
    "show": "what a file of records says",
    "restore": "bring the connections of a file back to life",
    "agent": "the daemon that moves connections between hosts",
    "migrate": "move connections to another agent's host",
    "drain": "move everything that can move to other agents' hosts",
    "failover": "a floating address and its connections move to the standby",
    "watch": "what this host's agent does, as it happens",
    "demo": "three hosts in namespaces, real traffic, a migration, a picture",
    "completion": "print a shell's completion script",
}


class _Parser(argparse.ArgumentParser):
    """Usage errors as one line and a pointer, exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\n  hint: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, or only what one verb needs: its module alone is imported then."""
    parser = _Parser(
        prog="tcpmig",
        description="Move live TCP connections between hosts without the peer noticing.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 some connections failed, 4 this host cannot.",
    )
    parser.add_argument("--version", action="version", version=f"tcpmig {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, summary in VERBS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if verb in (None, name):
            subparser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
            subparser.add_argument("--netns", metavar="NAME", help="work in that network namespace")
            import_module(f"migrate.cli.{name}").add_arguments(subparser)
    return parser


def main(words: Sequence[str] | None = None, *, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    """Run one command line; the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    # What follows "--" is a command for somebody else; argparse would lose it behind an option.
    words, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    verb = next((word for word in words if not word.startswith("-")), "")
    parser = build_parser(verb)
    arguments = parser.parse_args(words)
    if command and not hasattr(arguments, "command"):
        parser.error(f"{arguments.verb} takes no command after --")
    if command:
        arguments.command = command
    output = Output(as_json=arguments.json, stdout=stdout, stderr=stderr)
    try:
        if arguments.netns:
            from migrate.kernel import netns

            with netns.entered(arguments.netns):
                return _run(arguments, output)
        return _run(arguments, output)
    except Error as error:
        output.say(explain(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # What no module foresaw: above all that descriptors or memory ran out, which can strike at any call.
        failure = _exhausted(error) or from_oserror(error.filename or "a system call", error)
        output.say(explain(failure))
        return failure.exit_code
    except KeyboardInterrupt:
        return 130


def _exhausted(error: OSError) -> HostError | None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return HostError("no descriptor left", hint="raise the limit of open files: ulimit -n, LimitNOFILE= in systemd")
    return None


def _run(arguments: argparse.Namespace, output: Output) -> int:
    code: int = import_module(f"migrate.cli.{arguments.verb}").run(arguments, output)
    return code
