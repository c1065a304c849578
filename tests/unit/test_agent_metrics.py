"""The figures of an agent, read as Prometheus reads them."""

from __future__ import annotations

import re
import socket
import urllib.request
from typing import get_args

import pytest

from migrate import errors
from migrate.agent.metrics import Metrics, Outcome, Phase, Side


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_what_is_counted_is_served() -> None:
    metrics = Metrics()
    metrics.connections("source", "moved", 64)
    metrics.connections("source", "moved", 36)
    metrics.connections("source", "stayed", 1)
    metrics.phase("destination", "restore", 0.003)
    metrics.frozen(0.02)
    metrics.record_bytes("source", 12_345)
    metrics.kept_packets("destination", 3)
    metrics.batches("source", 1)
    metrics.batches("source", 1)
    metrics.batches("source", -1)
    metrics.call_refused()
    metrics.watch(held=lambda: 5, doubt=lambda: 2, expiry=lambda: 1.8e9)
    with metrics.served("127.0.0.1:0") as port:
        figures = scraped(port)
    assert figures['tcpmig_connections_total{outcome="moved",side="source"}'] == 100
    assert figures['tcpmig_connections_total{outcome="stayed",side="source"}'] == 1
    assert figures['tcpmig_phase_seconds_bucket{le="0.002",phase="restore",side="destination"}'] == 0
    assert figures['tcpmig_phase_seconds_bucket{le="0.005",phase="restore",side="destination"}'] == 1
    assert figures["tcpmig_frozen_seconds_sum"] == 0.02
    assert figures['tcpmig_record_bytes_total{side="source"}'] == 12_345
    assert figures['tcpmig_kept_packets_total{side="destination"}'] == 3
    assert figures['tcpmig_batches{side="source"}'] == 1
    assert figures["tcpmig_calls_refused_total"] == 1
    assert figures["tcpmig_held_connections"] == 5
    assert figures["tcpmig_doubt_connections"] == 2
    assert figures["tcpmig_certificate_expiry_timestamp_seconds"] == 1.8e9


def test_two_agents_in_one_process_count_for_themselves() -> None:
    one, other = Metrics(), Metrics()
    one.frozen(1)
    with one.served("127.0.0.1:0") as a, other.served("127.0.0.1:0") as b:
        assert scraped(a)["tcpmig_frozen_seconds_count"] == 1
        assert scraped(b)["tcpmig_frozen_seconds_count"] == 0


def test_it_serves_no_longer_than_asked() -> None:
    with Metrics().served("127.0.0.1:0") as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_no_label_grows_with_what_is_moved() -> None:
    """Each label takes its values from a handful of words."""
    metrics = Metrics()
    for side in get_args(Side):
        for outcome in get_args(Outcome):
            metrics.connections(side, outcome, 1)
        for phase in get_args(Phase):
            metrics.phase(side, phase, 0.1)
        metrics.record_bytes(side, 1)
        metrics.kept_packets(side, 1)
        metrics.batches(side, 1)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert {name for sample in samples for name in sample.labels} == {"side", "outcome", "phase", "le", "version"}
    assert len(samples) < 500


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("9464", errors.UsageError, "'9464' is no address to listen on"),
        ("127.0.0.1:70000", errors.UsageError, "is no address to listen on"),
        ("203.0.113.1:9464", errors.HostError, "cannot serve metrics on 203.0.113.1:9464: "),
        ("no.such.host.invalid:9464", errors.HostError, "cannot serve metrics on no.such.host.invalid:9464: "),
    ],
)
def test_where_it_cannot_listen(address: str, kind: type[errors.Error], sentence: str) -> None:
    with pytest.raises(kind, match=re.escape(sentence)), Metrics().served(address):
        pass


def test_a_port_that_is_taken() -> None:
    with (
        Metrics().served("127.0.0.1:0") as port,
        pytest.raises(errors.HostError, match="Address already in use"),
        Metrics().served(f"127.0.0.1:{port}"),
    ):
        pass
