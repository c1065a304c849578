"""Where an agent listens, and on what terms: TLS on an address, file permissions on a unix socket."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path

import grpc.aio

from migrate import errors
from migrate.agent.tls import load_server_credentials

__all__ = ["listen_tcp", "listen_unix"]


def listen_tcp(server: grpc.aio.Server, address: str, *, tls: Path | None, force: bool = False) -> int:
    """Listen on ``address``, "HOST:PORT"; the port that was bound, which matters if PORT is 0.

    ``tls`` is the directory of migrate/agent/tls.py; None means no encryption and no names, and is refused with
    UsageError for anything but a loopback address unless ``force``. Raises HostError if the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise errors.UsageError(f"{address!r} is no address to listen on", hint="HOST:PORT, or [HOST]:PORT for IPv6")
    if tls is None and not force and not _is_loopback(host):
        hint = "make certificates with `tcpmig agent init-tls DIR` and pass --tls DIR"
        raise errors.UsageError(f"without TLS anybody who reaches {address} could take connections away", hint=hint)
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, load_server_credentials(tls))
    except RuntimeError:
        raise _bind_error(address, host.strip("[]"), int(port)) from None


def listen_unix(server: grpc.aio.Server, path: Path) -> None:
    """Listen on the unix socket ``path`` for callers on this host: file mode 0600, so only this user and root.

    A socket file that nobody listens on any more is replaced. Raises HostError if somebody does: gRPC itself would
    unlink it and take over, silently.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except OSError as error:
            raise errors.from_oserror(f"connect {path}", error) from None
        else:
            raise errors.HostError(f"somebody listens on {path} already", hint="is another agent running?")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise errors.from_oserror(f"mkdir {path.parent}", error) from None
    # The mode must be right from the first moment. All threads share the umask: the agent listens before it has any.
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise errors.HostError(f"cannot listen on {path}: {error}", hint="is the directory writable?") from None
    finally:
        os.umask(before)


def _bind_error(address: str, host: str, port: int) -> errors.HostError:
    """gRPC says only that it failed; an ordinary bind says why."""
    why, hint = "gRPC could not bind it", None
    try:
        for family, kind, _, _, name in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(name)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no host name"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            hint = "is another agent running?"
    return errors.HostError(f"cannot listen on {address}: {why}", hint=hint)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
