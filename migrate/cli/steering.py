"""The words of --steer."""

from __future__ import annotations

from migrate.errors import UsageError
from migrate.steer.vip import Vip

__all__ = ["vip"]


def vip(text: str) -> Vip:
    """The steering that ``vip:DEV`` spells, for this thread's network namespace. Raises UsageError, NotFound."""
    way, colon, device = text.partition(":")
    if way != "vip" or not colon or not device:
        raise UsageError(f"{text!r} is no way to steer", hint="write vip:DEV, as in vip:eth0")
    return Vip(device)
