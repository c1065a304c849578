"""scripts/bench core: what the core costs, against the limits that the project set itself."""

from __future__ import annotations

from tests.bench import blackout, commands, costs, properties
from tests.bench.measure import Contest, Report


def run(*, quick: bool) -> Report:
    report = Report("core", quick=quick)
    properties.measure(report)
    commands.measure(report)
    blackout.measure(report)
    with Contest() as contest:
        costs.measure(contest, report)
    return report
