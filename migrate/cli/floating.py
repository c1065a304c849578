"""A floating address that keepalived gives to one of two hosts, seen from one of them.

Whether the address is here is asked of the kernel, not of keepalived: what a notification says may be over by the time
it is read. An address on lo does not count: the agent puts it there for connections that came alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from migrate.cli import moving
from migrate.cli.output import Output
from migrate.errors import NotFound, UsageError, from_oserror
from migrate.kernel.link import Links
from migrate.kernel.nft import GuardTable
from migrate.selection import Selector, find
from migrate.steer.forward import Forward
from migrate.tcpstate import TcpState

if TYPE_CHECKING:
    from migrate.agent.client import Client

__all__ = ["RUN_DIR", "Floating"]

RUN_DIR = "/run/tcpmig-failover"

# What has no owner that could be asked: nothing of it can move, and the peer repeats what matters.
_PASSING = {TcpState.LISTEN, TcpState.SYN_RECEIVED, TcpState.TIME_WAIT, TcpState.CLOSED}


class Floating:
    """``address`` in text; ``peer`` is the other host's agent; ``agent`` this host's. A context manager.

    ``quiet`` is the time in seconds to wait for quiet points, or None.
    """

    def __init__(self, address: str, peer: str, agent: Client, run_dir: Path, *, quiet: float | None = None) -> None:
        """Raises UsageError for what is no address, PrivilegeError, HostError."""
        self._address = _packed(address)
        self.text = address
        self.peer = peer
        self._agent = agent
        self._quiet = quiet
        self._selector = Selector(local=(self._address, None), states=frozenset(TcpState) - _PASSING)
        self._word = run_dir / f"{address}.yield"
        self._lock = run_dir / f"{address}.sweep"
        try:
            run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise from_oserror(f"mkdir {run_dir}", error) from None
        self._links = Links()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._links.close()

    def here(self) -> bool:
        """Whether a device of this host has the address."""
        return any(each.address == self._address and each.device != "lo" for each in self._links.addresses())

    def guard(self) -> None:
        """No RST leaves from the address; again makes sure of it."""
        GuardTable(self._address).close()

    def unguard(self) -> None:
        """RSTs may leave."""
        GuardTable(self._address).delete()

    def give_way(self) -> None:
        """Have the check program fail, so that keepalived gives up the address."""
        self._word.touch()

    def stay(self) -> None:
        """Take that back."""
        self._word.unlink(missing_ok=True)

    def named_in(self, told: bytes) -> bool:
        """Whether what an `AddressWatch` told is about this address, or may be."""
        return self._address in told

    def left(self, *, handshakes: bool = False) -> int:
        """How many connections of the address live in processes here; with those on their way to a listener, if asked.

        What waits for its owner to accept it is not among them: it soon will be.
        """
        if not handshakes:
            return sum(bool(each.owners) for each in find(self._selector))
        under_way = Selector(local=self._selector.local, states=frozenset({TcpState.SYN_RECEIVED}))
        return self.left() + len(find(under_way, owners=False))

    def sweep(self, output: Output, *, behind: bool) -> None:
        """Move the connections of the address to the other host. Raises Error if that cannot even begin.

        ``behind``: the address is there already, or will be; that host forwards to here what has not come.
        """
        # The planned switch and the notify program may want it at the same time.
        with self._locked(), contextlib.suppress(NotFound):
            if self.left(handshakes=behind):
                # Forwarded in any case: an entry from an earlier move the other way goes with it.
                steer = "follow" if behind else "forward"
                reports = self._agent.migrate(self._selector, self.peer, steer=steer, when_quiet=self._quiet)
                moving.follow(reports, output, dry_run=False)

    def tidy(self) -> None:
        """Forward nothing of the address any more: nobody sends it here."""
        with Forward() as forward:
            forward.take([each for each in forward.given() if each.local == self._address])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _packed(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.inet_pton(family, address)
    except OSError:
        raise UsageError(f"{address!r} is no address", hint="write it alone, as in 10.0.0.100 or fd00::100") from None
