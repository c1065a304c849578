"""Steering: making the network deliver a connection's segments to the host that owns it now.

One rule covers every topology: whoever receives a connection's segments and is not its owner forwards them to the
owner. Each module here is one way to do so, and all have the same face, `Steering`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from migrate.fourtuple import FourTuple

__all__ = ["Steering"]


class Steering(Protocol):
    """One way to steer, seen from one host. Making it checks what can be checked, and opens what steering needs.

    Each call says who owns some connections, and the network is made to agree. It may be repeated, before as after a
    crash; `take` undoes `give` on the same host and `give` undoes `take`. ``local`` is the end that moves. All raise
    HostError, PrivilegeError, NotFound or KernelError; after that the same call again may finish the work.
    """

    def take(self, tuples: Collection[FourTuple]) -> None:
        """This host owns these connections: their segments are to come here."""

    def give(self, tuples: Collection[FourTuple], owner: bytes) -> None:
        """The host with that packed address on this network owns them: their segments are to go there."""

    def close(self) -> None:
        """Close what is open; how the network is steered stays as it is."""
