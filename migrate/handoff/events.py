"""What happens on one side of a handoff, beside the other's messages: results of commands, time, the caller."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from migrate.handoff.messages import Message

__all__ = [
    "Cancel",
    "Checked",
    "Claimed",
    "Event",
    "Failed",
    "Frozen",
    "LinkLost",
    "LocalEvent",
    "RegistryFailed",
    "Resolved",
    "Restarted",
    "Restored",
    "Start",
    "Timeout",
]


class LocalEvent(msgspec.Struct, frozen=True):
    """What is common to all of them."""


Event = Message | LocalEvent


class Start(LocalEvent, frozen=True):
    """Begin. The first event of a new source."""


class Restarted(LocalEvent, frozen=True):
    """The agent was restarted. The first event of a machine that was rebuilt from its journal row."""


class Checked(LocalEvent, frozen=True):
    """Check has ended. ``refused``: id to reason."""

    refused: Mapping[bytes, str]


class Frozen(LocalEvent, frozen=True):
    """Freeze has ended. ``records``: id to encoded ICI record of the frozen; ``refused``: id to reason of the rest."""

    records: Mapping[bytes, bytes]
    refused: Mapping[bytes, str]


class Restored(LocalEvent, frozen=True):
    """RestoreSilent has ended. ``refused``: id to reason."""

    refused: Mapping[bytes, str]


class Claimed(LocalEvent, frozen=True):
    """Claim has ended: ``lost`` names those that the registry had given to the other side before."""

    lost: frozenset[bytes]


class RegistryFailed(LocalEvent, frozen=True):
    """Claim has failed: whether it was carried out is not known."""


class Failed(LocalEvent, frozen=True):
    """A command could not be carried out at all, and what followed it in its step was dropped."""

    reason: str


class Timeout(LocalEvent, frozen=True):
    """The timer that StartTimer named ``serial`` has run down. One that was replaced meanwhile is ignored."""

    serial: int


class LinkLost(LocalEvent, frozen=True):
    """The stream on which this batch's last message came or went has broken."""


class Cancel(LocalEvent, frozen=True):
    """The caller wants it stopped."""


class Resolved(LocalEvent, frozen=True):
    """An operator decides in place of the other side, which is gone for good. ``moved``: it had committed."""

    moved: bool
