"""The words of --key."""

from __future__ import annotations

import argparse

from migrate.sealed import Key

__all__ = ["add_arguments", "key"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the key is."""
    parser.add_argument("--key", metavar="FILE", help="the records are encrypted under the key in that file (0600)")


def key(path: str | None) -> Key | None:
    """The key, if there shall be one. Raises as `Key.read` does."""
    return None if path is None else Key.read(path)
