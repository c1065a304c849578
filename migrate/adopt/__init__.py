"""Adoption: a restored socket gets an owner.

An adopter takes the socket while it is silent, so that the socket survives the death of whoever restored it; the
owner starts to run only when the connection has been activated.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Adopter", "Adoption"]


class Adoption(Protocol):
    """Sockets that have an owner which does not run yet."""

    def go(self) -> None:
        """The connections are active: let the owner run. Raises HostError if it could not."""

    def abort(self) -> None:
        """They will not be: the owner closes them, silently, and ends."""


class Adopter(Protocol):
    """Somebody who can own connections."""

    def check(self) -> None:
        """Raise HostError if adoption would fail. Called before anything is touched."""

    def adopt(self, sockets: Sequence[socket.socket]) -> Sequence[Adoption]:
        """Take these silent sockets. The caller keeps its own descriptors and closes them when it is done."""
