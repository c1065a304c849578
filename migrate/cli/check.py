"""tcpmig check: what this host can do, each with the remedy."""

from __future__ import annotations

import argparse

from migrate.cli.output import Output
from migrate.kernel.probe import capabilities

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond what every verb has."""


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Try each capability; exit code 4 if one that is needed is missing."""
    missing = 0
    for capability in capabilities():
        missing += capability.needed and not capability.ok
        mark = "ok  " if capability.ok else "MISSING" if capability.needed else "no  "
        text = f"{mark:8}{capability.name:26}{capability.detail}"
        if not capability.ok and capability.remedy:
            text += f"\n{'':8}remedy: {capability.remedy}"
        output.data(
            text,
            {
                "name": capability.name,
                "ok": capability.ok,
                "needed": capability.needed,
                "detail": capability.detail,
                "remedy": None if capability.ok else capability.remedy,
            },
        )
    if missing:
        output.say(f"tcpmig: {missing} of what moving connections needs is missing here")
    return 4 if missing else 0
