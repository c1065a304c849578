"""tcpmig show: what a file of records says."""

from __future__ import annotations

import argparse
import base64
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from migrate.cli.output import Output
from migrate.errors import NotFound, PrivilegeError, from_oserror
from migrate.ici import FIELDS, Ici, read_records
from migrate.tcpstate import TcpState

__all__ = ["add_arguments", "opened", "run"]

_QUEUES = ("sent", "unsent", "received")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, and whether user data may be shown."""
    parser.add_argument("file", metavar="FILE", help="a file of records, or - for standard input")
    parser.add_argument("--queues", action="store_true", help="also print the queues' contents: they are user data")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print every record, every field with its meaning."""
    with opened(arguments.file) as file:
        for number, record in enumerate(read_records(file), 1):
            values = _values(record, queues=arguments.queues)
            output.data(_text(number, record, values), {"record": number, **values})
    return 0


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file of that name, ``-`` for standard input. Raises NotFound, PrivilegeError, KernelError."""
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, its errors are not the caller's
    except FileNotFoundError:
        raise NotFound(f"there is no file {path!r}") from None
    except PermissionError:
        raise PrivilegeError(f"{path!r} may not be read", hint="records belong to whoever dumped them (0600)") from None
    except OSError as error:
        raise from_oserror(f"opening {path!r}", error) from None
    with file:
        yield file


def _values(record: Ici, *, queues: bool) -> dict[str, object]:
    """The fields as JSON can say them: addresses as text, bytes in base64, queues and application state as lengths."""
    local, _, remote = str(record.four_tuple).partition(",")
    values: dict[str, object] = {"local": local, "remote": remote, "state": TcpState(record.state).name}
    for name in msgspec.structs.fields(record):
        value = getattr(record, name.name)
        if name.name in ("local", "remote", "local_port", "remote_port", "state"):
            continue
        if name.name in (*_QUEUES, "app"):
            values[f"{name.name}_bytes"] = len(value)
            if queues:
                values[name.name] = base64.b64encode(value).decode()
        else:
            values[name.name] = _plain(value)
    return values


def _plain(value: object) -> object:
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _text(number: int, record: Ici, values: dict[str, object]) -> str:
    lines = [f"record {number}: {record.four_tuple} {values['state']}"]
    for name, value in values.items():
        if name in ("local", "remote", "state"):
            continue
        meaning = FIELDS.get(name.removesuffix("_bytes"), "")
        shown = _time(record.origin_time) if name == "origin_time" else value
        lines.append(f"  {name:16} {shown!s:34} {meaning}".rstrip())
    return "\n".join(lines)


def _time(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(nanoseconds / 1e9)) if nanoseconds else "unknown"
