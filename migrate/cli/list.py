"""tcpmig list: the connections here, their owners, whether they can migrate and why not."""

from __future__ import annotations

import argparse
import functools
import gc
import socket
from collections.abc import Sequence

from migrate.cli import selector
from migrate.cli.output import Output, bytes_text
from migrate.kernel import tcpinfo
from migrate.kernel.diag import Connection, Extension
from migrate.kernel.pidfd import Owner
from migrate.obstacle import seen_obstacle
from migrate.tcpstate import TcpState

__all__ = ["add_arguments", "run"]

_HEADINGS = ("LOCAL", "REMOTE", "STATE", "RECV-Q", "SEND-Q", "OWNERS (comm/pid/fd)", "MIGRATABLE")
_notsent = tcpinfo.reader("notsent_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the selectors."""
    selector.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print them, in a table or as JSON with the keys of the design."""
    gc.disable()  # nothing here is garbage before the end, and there may be tens of thousands
    found = selector.find(selector.from_arguments(arguments), extensions=Extension.INFO)
    if output.as_json:
        output.objects(_object(connection, owners) for connection, owners in found)
    else:
        output.table(_HEADINGS, [_row(connection, owners) for connection, owners in found])
    return 0


def _row(connection: Connection, owners: Sequence[Owner]) -> tuple[str, ...]:
    local, local_port, remote, remote_port = connection.four_tuple
    name, answer, _ = _judged(connection.state, connection.ulp, connection.signed, bool(owners), connection.inode != 0)
    receive, send = connection.recv_queue, connection.send_queue
    return (
        f"{_address(local)}:{local_port}",
        f"{_address(remote)}:{remote_port}",
        name,
        bytes_text(receive) if receive else "0",
        bytes_text(send) if send else "0",
        " ".join([f"{comm}/{pid}/{fd}" for pid, fd, comm in owners]) or "-",
        answer,
    )


def _object(connection: Connection, owners: Sequence[Owner]) -> dict[str, object]:
    local, _, remote = str(connection.four_tuple).partition(",")
    name, _, reason = _judged(connection.state, connection.ulp, connection.signed, bool(owners), connection.inode != 0)
    info = connection.info
    return {
        "local": local,
        "remote": remote,
        "state": name,
        "recv_queue": connection.recv_queue,
        "send_queue": connection.send_queue,
        "unsent": _notsent(info)[0] if len(info) >= 148 else 0,
        "owners": [owner._asdict() for owner in owners],
        "migratable": reason is None,
        "reason": reason,
    }


@functools.cache
def _judged(
    state: TcpState, upper_layer: str, signed: bool, owned: bool, referenced: bool
) -> tuple[str, str, str | None]:
    """The state's name, whether the connection can migrate, and why not, for people and for programs."""
    refused = seen_obstacle(state, upper_layer=upper_layer, signed=signed, owned=owned, referenced=referenced)
    return state.name, "yes" if refused is None else f"no: {refused.what}", None if refused is None else str(refused)


@functools.cache
def _address(packed: bytes) -> str:
    if len(packed) == 4:
        return socket.inet_ntoa(packed)
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"
