"""tcpmig list: the connections here, their owners, whether they can migrate and why not."""

from __future__ import annotations

import argparse

from migrate.checkpoint import obstacle
from migrate.cli import selector
from migrate.cli.output import Output, bytes_text
from migrate.errors import Refused
from migrate.kernel import tcpinfo
from migrate.kernel.diag import Extension

__all__ = ["add_arguments", "run"]

_notsent = tcpinfo.reader("notsent_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the selectors."""
    selector.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print them, in a table or as JSON with the keys of the design."""
    rows = []
    for connection, owners in selector.find(selector.from_arguments(arguments), extensions=Extension.INFO):
        refused = obstacle(connection.state, upper_layer=connection.ulp)
        if refused is None and not owners:
            refused = Refused("no process has it open")
        local, _, remote = str(connection.four_tuple).partition(",")
        info = connection.info
        unsent = _notsent(info)[0] if len(info) >= 148 else 0
        if output.as_json:
            output.data(
                "",
                {
                    "local": local,
                    "remote": remote,
                    "state": connection.state.name,
                    "recv_queue": connection.recv_queue,
                    "send_queue": connection.send_queue,
                    "unsent": unsent,
                    "owners": [{"pid": o.pid, "fd": o.fd, "comm": o.comm} for o in owners],
                    "migratable": refused is None,
                    "reason": None if refused is None else str(refused),
                },
            )
            continue
        rows.append(
            [
                local,
                remote,
                connection.state.name,
                bytes_text(connection.recv_queue),
                bytes_text(connection.send_queue),
                " ".join(f"{o.comm}/{o.pid}/{o.fd}" for o in owners) or "-",
                "yes" if refused is None else f"no: {refused.what}",
            ]
        )
    if not output.as_json:
        output.table(["LOCAL", "REMOTE", "STATE", "RECV-Q", "SEND-Q", "OWNERS (comm/pid/fd)", "MIGRATABLE"], rows)
    return 0
