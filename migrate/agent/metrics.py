"""What an agent counts, for Prometheus; served over HTTP on an address of its own.

Nothing has a label for a connection or a peer: the number of time series does not grow with what is moved.
prometheus_client is an ordinary dependency: it is small, pure Python, imported by the agent only, and figures that turn
out not to be installed on the day when somebody wants them are of no use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from migrate import __version__, errors

__all__ = ["Metrics", "Outcome", "Phase", "Side"]

Side = Literal["source", "destination"]
Outcome = Literal["moved", "stayed", "gone", "doubt"]
Phase = Literal["prepare", "freeze", "transfer", "restore", "commit", "release", "activate", "steer"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)


class Metrics:
    """One agent's figures. Each method is one event; call it once a batch, never once a connection."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._connections = Counter(
            "tcpmig_connections",
            "Connections by what became of them in a handoff.",
            ["side", "outcome"],
            registry=registry,
        )
        self._phases = Histogram(
            "tcpmig_phase_seconds",
            "Length of a phase of a batch.",
            ["side", "phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._frozen = Histogram(
            "tcpmig_frozen_seconds",
            "Longest time that a connection of a batch stood still.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._records = Counter(
            "tcpmig_record_bytes", "Bytes of ICI records sent or received.", ["side"], registry=registry
        )
        self._kept = Counter("tcpmig_kept_packets", "Packets that a hold kept for replay.", ["side"], registry=registry)
        self._batches = Gauge("tcpmig_batches", "Batches between prepare and their end.", ["side"], registry=registry)
        self._held = Gauge("tcpmig_held_connections", "Connections under a hold now.", registry=registry)
        self._doubt = Gauge(
            "tcpmig_doubt_connections", "Connections frozen here whose owner is not known.", registry=registry
        )
        self._expiry = Gauge(
            "tcpmig_certificate_expiry_timestamp_seconds", "When agent.crt expires.", registry=registry
        )
        self._refused = Counter(
            "tcpmig_calls_refused", "Calls that the caller's name does not allow.", registry=registry
        )
        Gauge("tcpmig_build_info", "Always 1.", ["version"], registry=registry).labels(__version__).set(1)

    def connections(self, side: Side, outcome: Outcome, count: int) -> None:
        """``count`` connections had this outcome."""
        self._connections.labels(side, outcome).inc(count)

    def phase(self, side: Side, phase: Phase, seconds: float) -> None:
        """A batch has been through this phase."""
        self._phases.labels(side, phase).observe(seconds)

    def frozen(self, seconds: float) -> None:
        """A batch is through; its slowest connection stood still for this long."""
        self._frozen.observe(seconds)

    def record_bytes(self, side: Side, count: int) -> None:
        """Records of ``count`` bytes left (source) or came (destination)."""
        self._records.labels(side).inc(count)

    def kept_packets(self, side: Side, count: int) -> None:
        """A hold has kept ``count`` packets."""
        self._kept.labels(side).inc(count)

    def batches(self, side: Side, change: int) -> None:
        """A batch began (1) or ended (-1)."""
        self._batches.labels(side).inc(change)

    def call_refused(self) -> None:
        """A caller lacked the role for a call."""
        self._refused.inc()

    def watch(self, *, held: Callable[[], int], doubt: Callable[[], int], expiry: Callable[[], float] | None) -> None:
        """Ask these at each scrape: connections held, connections in doubt, the certificate's end (unix time)."""
        self._held.set_function(held)
        self._doubt.set_function(doubt)
        if expiry is not None:
            self._expiry.set_function(expiry)

    @contextlib.contextmanager
    def served(self, address: str) -> Iterator[int]:
        """Serve ``http://ADDRESS/metrics`` meanwhile; gives the port. Everybody may read: listen where that is right.

        Raises UsageError for an address that is none, HostError if it cannot be bound.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise errors.UsageError(
                f"{address!r} is no address to listen on", hint="HOST:PORT, or [HOST]:PORT for IPv6"
            )
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise errors.HostError(f"cannot serve metrics on {address}: {error}") from None
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
