"""One batch of connections on its way out of this host, as the source's side carries it out."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from migrate.agent.applications import Loan
from migrate.agent.driver import Driver, Handoff
from migrate.agent.kept import SentOn
from migrate.agent.metrics import Phase
from migrate.fourtuple import FourTuple
from migrate.handoff.source import SourceHandoff
from migrate.ici import Ici

if TYPE_CHECKING:
    from migrate.agent.turns import Turns

__all__ = ["BUSY", "GIVEN", "NOT_QUIET", "Departure"]

NOT_QUIET = "it was not quiet"
"""Why a connection is refused that may be tried again."""

BUSY = "another caller moves it at this moment"
"""Why a connection is left to that caller."""

GIVEN = ("RELEASED", "LINGERING", "MOVED")
"""States in which the destination has a batch, but for what is refused."""

Results = Callable[["Departure", str, Mapping[bytes, str]], None]


class Departure(Handoff):
    """One batch on its way out, at once, or as one of these says.

    ``when_quiet``: the time in seconds to wait for the first quiet ones; ``thorough`` of those that quick attempts have
    not found quiet. ``loan``: they are an application's. ``turns``: when they are prepared, they wait there. ``last``:
    with them their address leaves, so they go when all others have gone, and only if nobody else has it.
    """

    def __init__(
        self,
        machine: SourceHandoff,
        driver: Driver,
        sockets: Mapping[FourTuple, socket.socket] | None = None,
        *,
        when_quiet: float | None = None,
        thorough: bool = False,
        loan: Loan | None = None,
        report: Results = lambda *_: None,
        turns: Turns | None = None,
        last: bool = False,
    ) -> None:
        super().__init__(machine, driver)
        self.sockets.update(sockets or {})
        self.when_quiet = when_quiet
        self.thorough = thorough
        self.loan = loan
        self.report = report
        self.turns = turns
        self.last = last
        self.withdrawn = False  # before its turn came, or instead of it
        self.turn_at = 0.0  # seconds, time.monotonic()
        self.frozen: dict[FourTuple, Ici] = {}
        self.left_out: dict[bytes, str] = {}  # refused by this side, and why: the other only sees that they are missing
        self.gone: set[bytes] = set()  # ended by themselves
        self.frozen_at = self.active_at = 0  # CLOCK_MONOTONIC, nanoseconds
        self.phases: list[tuple[Phase, int, int]] = []  # begin and length of each, on the same clock
        self._since = time.monotonic_ns()
        self.record_bytes = 0
        self.sending = False  # what the hold keeps goes to the destination as it comes
        self.sent = SentOn()

    def passed(self, phase: Phase) -> None:
        """That phase ends now; it began when the one before it ended."""
        now = time.monotonic_ns()
        self.phases.append((phase, self._since, now - self._since))
        self._since = now

    def close(self) -> None:
        """The sockets, and what is said to the application."""
        super().close()
        if self.loan is not None:
            self.loan.close()
