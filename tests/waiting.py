"""Waiting for a condition instead of a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["until"]

T = TypeVar("T")


def until(condition: Callable[[], T], *, within: float = 10.0, what: str = "") -> T:
    """Poll until ``condition()`` is true, and return what it gave; AssertionError after ``within`` seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or condition}")
        time.sleep(0.002)
    return value
