"""Another local end for a connection: where a NAT hides the host from the peer, the host's own address may change.

The peer must not notice: whoever translates has to send its segments to the new address from then on (docs/nat.md).
"""

from __future__ import annotations

from migrate.errors import UsageError
from migrate.ici import Ici, parse_endpoint

__all__ = ["relocate"]


def relocate(ici: Ici, end: str) -> None:
    """Give the record the local end ``ADDR`` or ``ADDR:PORT``. Raises UsageError for one of another IP version."""
    address, port = parse_endpoint(end)
    if len(address) != len(ici.local):
        raise UsageError(
            f"{ici.four_tuple} cannot get the local end {end!r}",
            hint="the new address is of the same IP version as the old one",
        )
    ici.local = address
    if port is not None:
        ici.local_port = port
