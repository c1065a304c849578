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

from migrate.cli import sealing
from migrate.cli.completion import completes_files
from migrate.cli.output import Output, bytes_text
from migrate.errors import NotFound, PrivilegeError, RecordError, from_oserror
from migrate.ici import FIELDS, Field, Ici
from migrate.sealed import read_records
from migrate.tcpstate import TcpState

__all__ = ["add_arguments", "opened", "run"]

_UNITS = {"bytes": "bytes", "bits": "bits", "segments": "segments", "microseconds": "us", "milliseconds": "ms"}
_QUEUES = ("sent", "unsent", "received")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, and whether user data may be shown."""
    completes_files(parser.add_argument("file", metavar="FILE", help="a file of records, or - for standard input"))
    parser.add_argument("--queues", action="store_true", help="also print the queues' contents: they are user data")
    sealing.add_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print every record, every field with its meaning."""
    key = sealing.key(arguments.key)
    with opened(arguments.file) as file:
        for number, record in enumerate(read_records(file, key), 1):
            values = _values(record, queues=arguments.queues)
            output.data(_text(number, record, values), {"record": number, **values})
    return 0


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file of that name, ``-`` for standard input. Raises NotFound, PrivilegeError, KernelError."""
    try:
        with _opened(path) as file:
            yield file
    except RecordError as error:
        error.what = f"{'standard input' if path == '-' else repr(path)}: {error.what}"
        raise


def _opened(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise NotFound(f"there is no file {path!r}") from None
    except PermissionError:
        raise PrivilegeError(f"{path!r} may not be read", hint="records belong to whoever dumped them (0600)") from None
    except OSError as error:
        raise from_oserror(f"opening {path!r}", error) from None


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
        field = FIELDS.get(name.removesuffix("_bytes"), Field("its contents, in base64"))
        lines.append(f"  {name:15} {_shown(name, value, field.unit):33} {field.meaning}".rstrip())
        if isinstance(value, dict):
            lines += [f"    {option:30} {inner}" for option, inner in sorted(value.items())]
    return "\n".join(lines)


def _shown(name: str, value: object, unit: str) -> str:
    """A value as people read it, with its unit."""
    if name == "origin_time":
        return _time(value) if isinstance(value, int) and value else "unknown"
    if isinstance(value, dict):
        return f"{len(value)}, below" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        unit = "bytes"
    if not isinstance(value, int) or unit not in _UNITS:
        return str(value) or "none"
    if value < 0:
        return "none"
    return f"{value} {_UNITS[unit]}" + (f" ({bytes_text(value)})" if unit == "bytes" and value >= 1024 else "")


def _time(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(nanoseconds / 1e9))
