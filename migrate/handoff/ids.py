"""Names that outlive a host: a connection's id, its epoch, the id of a batch.

An id is 16 random bytes, given once, by the first host that hands the connection off; it stays with it through all
moves. The epoch counts the attempts to hand that connection off, on whatever host. Every attempt takes a new one, and
a host that has seen an epoch refuses it and all before it: a record can be used once.
"""

from __future__ import annotations

import os

import msgspec

from migrate.fourtuple import FourTuple

__all__ = ["ID_BYTES", "Connection", "new_id"]

ID_BYTES = 16


class Connection(msgspec.Struct, frozen=True, array_like=True):
    """One connection at one point of its life: id (16 bytes), epoch (from 1), four-tuple as its owner names it.

    ``there`` is its four-tuple at the destination, if that is another one. Only the source has it: what it tells the
    destination, records and packets included, is in the destination's words.
    """

    id: bytes
    epoch: int
    four_tuple: FourTuple
    there: FourTuple | None = None

    def at_destination(self) -> Connection:
        """The same connection as the destination names it."""
        return self if self.there is None else Connection(self.id, self.epoch, self.there)


def new_id() -> bytes:
    """16 random bytes, for a connection or for a batch."""
    return os.urandom(ID_BYTES)
