"""tcpmig agent: the daemon; `tcpmig agent init-tls DIR` makes certificates for trying out."""

from __future__ import annotations

import argparse
from pathlib import Path

from migrate.adopt.spawner import Spawner
from migrate.cli.output import Output
from migrate.errors import UsageError

__all__ = ["KEY_DIR", "SOCKET", "STATE_DIR", "add_arguments", "run"]

SOCKET = "/run/tcpmig/agent.sock"
STATE_DIR = "/var/lib/tcpmig"
KEY_DIR = "/run/tcpmig"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The daemon's options, and the words of init-tls."""
    parser.add_argument("words", metavar="init-tls DIR", nargs="*", help="make a private authority and certificates")
    parser.add_argument("--name", action="append", help="with init-tls: a name or address the agents are called by")
    parser.add_argument("--listen", metavar="ADDR:PORT", help="where other agents and remote callers reach this one")
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"for this host's commands ({SOCKET})")
    parser.add_argument("--tls", metavar="DIR", help="the directory with the certificates")
    parser.add_argument("--insecure", action="store_true", help="no TLS: everybody who reaches it may do everything")
    parser.add_argument("--force", action="store_true", help="with --insecure: on any address, not only on loopback")
    parser.add_argument("--state-dir", metavar="DIR", default=STATE_DIR, help=f"where the journal is ({STATE_DIR})")
    parser.add_argument(
        "--key-dir", metavar="DIR", default=KEY_DIR, help=f"in memory: the key of the journal's records ({KEY_DIR})"
    )
    parser.add_argument(
        "--adopt",
        metavar="LOCAL=HOW",
        action="append",
        default=[],
        help="who takes what arrives; LOCAL is ADDR:PORT or *, "
        "HOW child:CMD, systemd:CMD, unix:PATH, relay:HOST:PORT or hold",
    )
    parser.add_argument(
        "--adopt-user",
        metavar="USER",
        action="append",
        default=[],
        help="an application at unix:PATH may run as USER, name or number; root and the agent's own always may",
    )
    parser.add_argument("--registry", metavar="FILE", help="an ownership registry that agents of this machine share")
    parser.add_argument(
        "--no-path-state",
        action="store_true",
        help="connections that arrive begin with a new congestion window, not with the one they had",
    )
    parser.add_argument("--metrics", metavar="ADDR:PORT", help="serve Prometheus metrics there")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.usage = "%(prog)s [-h] [OPTION ...] | %(prog)s init-tls DIR --name NAME ..."


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Serve until told to stop."""
    if arguments.words:
        return _init_tls(arguments, output)
    if (arguments.tls is None) is not arguments.insecure:
        raise UsageError(
            "with TLS or without?", hint="--tls DIR (`tcpmig agent init-tls DIR` makes certificates), or --insecure"
        )
    # Before gRPC is loaded, which starts threads.
    spawner = Spawner()
    try:
        from migrate.agent.adoption import parse_rule
        from migrate.agent.logging import configure
        from migrate.agent.server import Settings, serve

        configure(arguments.log_level, "json" if output.as_json else "logfmt")
        settings = Settings(
            socket=Path(arguments.socket),
            state_dir=Path(arguments.state_dir),
            key_dir=Path(arguments.key_dir),
            listen=arguments.listen,
            tls=None if arguments.tls is None else Path(arguments.tls),
            force_insecure=arguments.force,
            adopt=[parse_rule(text) for text in arguments.adopt],
            adopt_users=[_user(word) for word in arguments.adopt_user],
            registry=None if arguments.registry is None else Path(arguments.registry),
            metrics=arguments.metrics,
            path_state=not arguments.no_path_state,
        )
        serve(settings, spawner)
    finally:
        spawner.close()
    return 0


def _user(word: str) -> int:
    import pwd

    try:
        return int(word) if word.isdecimal() else pwd.getpwnam(word).pw_uid
    except KeyError:
        raise UsageError(f"there is no user {word!r}") from None


def _init_tls(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.words[0] != "init-tls" or len(arguments.words) != 2:
        raise UsageError(f"unknown words {' '.join(arguments.words)!r}", hint="tcpmig agent init-tls DIR --name NAME")
    import socket

    from migrate.agent.tls import init_tls

    directory = arguments.words[1]
    names = arguments.name or [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    init_tls(directory, names)
    output.data(f"certificates for {', '.join(names)} are in {directory}", {"directory": directory, "names": names})
    return 0
