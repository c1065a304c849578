"""Move live TCP connections between Linux hosts without the peer noticing.

::

    ici = migrate.dump(sock)            # the socket is frozen now
    migrate.release(sock)               # let go without a packet, or migrate.thaw(sock)
    data = ici.encode()                 # carry it to the other host …
    sock = migrate.restore(migrate.Ici.decode(data))

    with migrate.hold([four_tuple]) as held:    # segments are kept meanwhile
        ...
        held.replay()                   # … and given to the restored socket

Importing this costs next to nothing: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrate.bulk import dump_many, release_many
    from migrate.checkpoint import check, dump, release, thaw
    from migrate.errors import Error
    from migrate.hold import Hold as hold
    from migrate.ici import FourTuple, Ici, read_records, write_records
    from migrate.kernel.netns import entered as netns
    from migrate.rebuild import activate_many, restore_many
    from migrate.restore import activate, discard, restore
    from migrate.tcpstate import TcpState

__version__ = "0.1.0"

__all__ = [
    "Error",
    "FourTuple",
    "Ici",
    "TcpState",
    "activate",
    "activate_many",
    "check",
    "discard",
    "dump",
    "dump_many",
    "hold",
    "netns",
    "read_records",
    "release",
    "release_many",
    "restore",
    "restore_many",
    "thaw",
    "write_records",
]

_HOME = {
    "Error": "migrate.errors:Error",
    "FourTuple": "migrate.ici:FourTuple",
    "Ici": "migrate.ici:Ici",
    "TcpState": "migrate.tcpstate:TcpState",
    "activate": "migrate.restore:activate",
    "activate_many": "migrate.rebuild:activate_many",
    "check": "migrate.checkpoint:check",
    "discard": "migrate.restore:discard",
    "dump": "migrate.checkpoint:dump",
    "dump_many": "migrate.bulk:dump_many",
    "hold": "migrate.hold:Hold",
    "netns": "migrate.kernel.netns:entered",
    "read_records": "migrate.ici:read_records",
    "release": "migrate.checkpoint:release",
    "release_many": "migrate.bulk:release_many",
    "restore": "migrate.restore:restore",
    "restore_many": "migrate.rebuild:restore_many",
    "thaw": "migrate.checkpoint:thaw",
    "write_records": "migrate.ici:write_records",
}


class _Package(ModuleType):
    """The import system binds a submodule to its package; but migrate.restore and migrate.hold are the functions."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'migrate' has no attribute {name!r}")
        module, _, attribute = _HOME[name].partition(":")
        value: object = getattr(importlib.import_module(module), attribute)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
