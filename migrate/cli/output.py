"""What the user sees: data on stdout, narration on stderr, one JSON object a line with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from migrate.errors import Error

__all__ = ["Output", "bytes_text", "explain"]

VERSION = 1  # of the JSON objects


class Output:
    """Where a verb writes. Streams are looked up late, so that tests and pipes see what is written."""

    def __init__(self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr

    def data(self, text: str, record: dict[str, object]) -> None:
        """One result: a line for people, or the object for programs."""
        print(json.dumps({"v": VERSION, **record}) if self.as_json else text, file=self.stdout, flush=True)

    def failure(self, name: str, error: Error) -> None:
        """One result that is none, where others may be: an object for programs, a narration for people."""
        if self.as_json:
            self.data("", {"connection": name, "ok": False, "reason": str(error)})
        else:
            self.say(explain(error, about="" if name in error.what else name))

    def objects(self, records: Iterable[dict[str, object]]) -> None:
        """Many results for programs, written at once."""
        self.stdout.write("".join([json.dumps({"v": VERSION, **record}) + "\n" for record in records]))
        self.stdout.flush()

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns, for people only."""
        lines = [tuple(headings), *map(tuple, rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        line = "  ".join([f"%-{width}s" for width in widths[:-1]] + ["%s\n"])
        self.stdout.write("".join([line % cells for cells in lines]))
        self.stdout.flush()

    def say(self, text: str) -> None:
        """Narration."""
        print(text, file=self.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Narration that the user should not miss."""
        self.say(f"tcpmig: warning: {text}")


def explain(error: Error, *, about: str = "") -> str:
    """An error as the user reads it: what, and on a line of its own what would help."""
    return f"tcpmig: {about}{': ' if about else ''}{error.what}" + (f"\n  hint: {error.hint}" if error.hint else "")


def bytes_text(count: int) -> str:
    """A length for people: 0, 512, 64K, 2.5M."""
    if count < 1024:
        return str(count)
    for unit in "KMG":
        count_scaled = count / 1024
        if count_scaled < 1024 or unit == "G":
            return f"{count_scaled:.1f}".removesuffix(".0") + unit
        count //= 1024
    raise AssertionError("unreachable")
