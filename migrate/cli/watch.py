"""tcpmig watch: what this host's agent does, as it happens."""

from __future__ import annotations

import argparse
import datetime

from migrate.cli.moving import add_agent
from migrate.cli.output import Output

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only where the agent is."""
    add_agent(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Until interrupted."""
    from migrate.agent.client import Client
    from migrate.agent.errors import from_problem
    from migrate.agent.v1.migration_pb2 import EventKind

    with Client(f"unix:{arguments.socket}") as agent:
        for event in agent.watch():
            kind = EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower().replace("_", " ")
            moment = datetime.datetime.fromtimestamp(event.time.ToNanoseconds() / 1e9, datetime.UTC)
            why = str(from_problem(event.problem)) if event.HasField("problem") else ""
            record = {
                "time": moment.isoformat(),
                "kind": kind,
                "move": event.move_id,
                "batch": event.batch,
                "agent": event.agent,
                "count": event.count,
                "missed": event.missed,
            }
            if why:
                record["reason"] = why
            words = [f"{moment:%H:%M:%S}", kind, str(event.count or ""), event.agent, event.move_id, why]
            output.data(" ".join(word for word in words if word), record)
    return 0
