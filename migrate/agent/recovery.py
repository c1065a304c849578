"""After a restart: the journal's rows become machines again, and what no row claims is removed."""

from __future__ import annotations

from migrate.agent.arrival import Arrivals
from migrate.agent.departure import Departures
from migrate.agent.driver import Host, tuples_of
from migrate.agent.logging import get_logger
from migrate.errors import Error
from migrate.handoff.source import SourceHandoff
from migrate.kernel.diag import SockDiag

__all__ = ["recover"]

_FORGOTTEN = 30 * 86400.0  # seconds after which an epoch that nobody touched is no longer remembered

_log = get_logger(__name__)


def recover(host: Host, departures: Departures, arrivals: Arrivals) -> None:
    """In the engine's thread, before the first stream."""
    rows = host.journal.rows()
    claimed = [each for row in rows for each in tuples_of(row.connections)]
    try:
        host.holds.sweep(claimed)
        host.carrier.drop_unused({each.local for each in claimed})
        with SockDiag() as diag:
            host.journal.prune({each.cookie for each in diag.list_connections()}, _FORGOTTEN)
    except Error as error:
        _log.warning("an earlier agent's leavings could not be removed", why=str(error))
    for row in rows:
        _log.info("handoff recovered", batch=row.batch.hex(), role=row.role, state=row.state, peer=row.peer)
        driver = departures if row.role == SourceHandoff.role else arrivals
        driver.recover(row)
