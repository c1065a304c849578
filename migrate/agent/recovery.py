"""After a restart: the journal's rows become machines again, and what no row claims is removed."""

from __future__ import annotations

from migrate.agent.arrival import Arrivals
from migrate.agent.departure import Departures
from migrate.agent.driver import Host, tuples_of
from migrate.agent.logging import get_logger
from migrate.errors import Error
from migrate.handoff.source import SourceHandoff
from migrate.kernel.diag import SockDiag

__all__ = ["MEMORY", "forget_old", "recover"]

MEMORY = 30 * 86400.0
"""Seconds for which a host remembers the epochs of connections that it no longer has, and claims that nobody needs."""

_log = get_logger(__name__)


def recover(host: Host, departures: Departures, arrivals: Arrivals) -> None:
    """In the engine's thread, before the first stream."""
    rows = host.journal.rows()
    claimed = [each for row in rows for each in tuples_of(row.connections)]
    try:
        host.holds.sweep(claimed)
        host.carrier.drop_unused({each.local for each in claimed})
    except Error as error:
        _log.warning("an earlier agent's leavings could not be removed", why=str(error))
    forget_old(host)
    for row in rows:
        _log.info("handoff recovered", batch=row.batch.hex(), role=row.role, state=row.state, peer=row.peer)
        driver = departures if row.role == SourceHandoff.role else arrivals
        driver.recover(row)


def forget_old(host: Host) -> None:
    """Forget what is too old to matter, of the journal and of the registry. In the engine's thread, when it is idle."""
    try:
        with SockDiag() as diag:
            host.journal.prune({each.cookie for each in diag.list_connections()}, MEMORY)
        if host.registry is not None:
            host.registry.prune([each for row in host.journal.rows() for each in row.connections], MEMORY)
    except Error as error:
        _log.warning("what is too old could not be forgotten", why=str(error))
