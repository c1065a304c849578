"""Structured log lines on standard error: one event a line, logfmt or JSON, never payload.

``get_logger(__name__).info("batch committed", move="m1", connections=64)`` gives
``time=2026-11-22T16:23:03.001Z level=info event="batch committed" move=m1 connections=64 logger=migrate.agent.server``.
Values that hold bytes are written as their length: queue contents are user data and must never reach a log.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import IO, Any, Literal

__all__ = ["LEVELS", "Logger", "configure", "get_logger"]

LEVELS = ("debug", "info", "warning", "error")

# sd-daemon(3): what systemd takes from the beginning of a line as its priority.
_PRIORITIES = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}


class Logger:
    """A logger whose methods take an event and its fields."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        """For whoever looks for a fault: every step of a handoff."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """What an operator wants to find afterwards: moves, arrivals, start and stop."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something is off, and the agent copes."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Something failed that somebody asked for."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """A fault of the program: with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of the module ``name``."""
    return Logger(logging.getLogger(name))


def configure(
    level: str = "info", form: Literal["logfmt", "json"] = "logfmt", stream: IO[str] | None = None
) -> logging.Handler:
    """Send events of at least ``level`` to ``stream`` (standard error). Called once, by the agent's main program."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(form, journal=stream is None and "JOURNAL_STREAM" in os.environ))
    logger = logging.getLogger("migrate")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler


class _Formatter(logging.Formatter):
    def __init__(self, form: Literal["logfmt", "json"], *, journal: bool) -> None:
        super().__init__()
        self._form = form
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {}
        if not self._journal:  # which has a clock and a priority of its own
            time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
            fields["time"] = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields |= {"level": record.levelname.lower(), "event": record.getMessage()}
        fields |= getattr(record, "fields", {}) | {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        plain = {key: _plain(value) for key, value in fields.items()}
        line = json.dumps(plain) if self._form == "json" else " ".join(f"{k}={_quoted(v)}" for k, v in plain.items())
        return _PRIORITIES.get(record.levelno, "") + line if self._journal else line


def _plain(value: object) -> Any:
    """What JSON can say, without a byte of payload."""
    match value:
        case None | bool() | int() | float():
            return value
        case bytes() | bytearray() | memoryview():
            return f"<{memoryview(value).nbytes} bytes>"
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | set() | frozenset():
            return [_plain(item) for item in value]
        case tuple() if type(value) is tuple:
            return [_plain(item) for item in value]
    return str(value)


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    # A line feed inside a value would begin a line that somebody else wrote.
    return text if text and text.isprintable() and not set(' "=\\\\') & set(text) else json.dumps(text)
