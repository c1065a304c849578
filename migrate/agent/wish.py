"""What somebody wants moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from migrate.agent.steering import check_words
from migrate.errors import UsageError
from migrate.relocate import LocalMaps
from migrate.selection import Selector

__all__ = ["Wish"]


@dataclass(frozen=True)
class Wish:
    """What somebody wants moved. ``when_quiet`` in seconds; ``destinations`` are tried in their order.

    Raises UsageError for what does not go together, NotFound for a device that is not here.
    """

    selector: Selector
    destinations: Sequence[str]
    steer: str = ""
    when_quiet: float | None = None
    maps: LocalMaps = field(default_factory=LocalMaps)

    def __post_init__(self) -> None:
        check_words(self.steer)
        if self.steer == "follow" and not (self.selector.local and self.selector.local[0]):
            raise UsageError("which address has moved?", hint="select by it: --local ADDR")
        if self.maps and self.steer:
            raise UsageError(
                "steering brings the old local ends to the destination, and a map gives them up",
                hint="with a map, point whatever translates addresses to the new ones; leave steering out",
            )
        if self.maps and len(self.destinations) > 1:
            raise UsageError(
                "a map names an address of one host, and there are several destinations", hint="name one destination"
            )
