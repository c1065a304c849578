"""The network side of a freeze: segments of held connections reach no socket and do not leave; what arrives is kept.

::

    held = Hold(tuples)                        # isolated from here on
    ...                                        # dump here, or restore here
    held.replay()                              # what arrived goes to the sockets, which may answer
    held.lift()                                # and the network is as it was; the end of `with` does it too

A connection is held from both sides, or with ``outgoing=False`` only what arrives: then its owner may still finish an
answer. `replay` leaves it like that, since a socket that is given data must acknowledge it. What a socket sends while
its departing segments are dropped counts for its TCP as lost, and is repeated after a timeout only: so open that side,
by `replay` or ``add(tuples, outgoing=False)``, before a socket leaves repair mode.

What the host itself would send is not kept. The socket learns that new data was dropped at output and counts it as not
sent; sent on behind its back, the data would be acknowledged before it was sent, and the connection would hang.

What was kept is injected only where its connection exists, so that no RST goes to the peer of one that moved away.
What is not replayed is not lost: the peer repeats it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Self

from migrate.errors import Error, HostError, NotFound
from migrate.fourtuple import FourTuple
from migrate.kernel import netns as namespaces
from migrate.kernel.diag import SockDiag
from migrate.kernel.nflog import Listener
from migrate.kernel.nft import MARK, HoldTable
from migrate.kernel.segment import Injector, fix_checksums, four_tuple

__all__ = ["Hold"]

MOST_KEPT = 64 << 20  # bytes
_ROUNDS = 8  # of emptying what comes in while it is emptied
_FEW = 8  # connections that are looked up one by one; more are listed


class Hold:
    """Holds connections of one network namespace. Making it takes a millisecond or two, `add` far less.

    ``tuples`` are held at once, for ``timeout`` seconds unless `refresh` is called: so long a hold survives its owner.
    ``outgoing`` False holds only what arrives. ``netns`` is a network namespace as `kernel.netns` names it. Under its
    ``name`` a hold can be adopted. Segments are kept up to ``limit`` bytes.

    A forked child shares the hold: one of the two goes on with it, the other calls `disown`. Not for several threads.
    Raises PrivilegeError, HostError, NotFound, Conflict if there is one of that name, UsageError.
    """

    kept: dict[FourTuple, list[bytes]]  # IP packets as they came, in their order, by *our* four-tuple
    dropped: int  # packets neither kept nor replayed: beyond the limit, damaged, or of a connection that is not here

    def __init__(
        self,
        tuples: Iterable[FourTuple] = (),
        *,
        netns: str | None = None,
        timeout: float = 60.0,
        outgoing: bool = True,
        name: str | None = None,
        limit: int = MOST_KEPT,
    ) -> None:
        self.name = name or f"{os.getpid()}-{secrets.token_hex(4)}"
        with contextlib.ExitStack() as stack, namespaces.entered(netns):
            self._listener = stack.enter_context(Listener())
            self._begin(stack, timeout, limit)
            self._table = stack.enter_context(HoldTable.create(self.name, self._listener.group))
            self._resources = stack.pop_all()
        try:
            self.add(tuples, outgoing=outgoing)
        except BaseException:
            self.lift()
            raise

    @classmethod
    def adopt(cls, name: str, *, netns: str | None = None, timeout: float = 60.0, limit: int = MOST_KEPT) -> Self:
        """Go on with the hold of that name whose owner died, and with what it still holds.

        What arrived in between is lost, and the peer repeats it. Raises NotFound, Conflict if the owner lives,
        PrivilegeError, HostError.
        """
        hold = cls.__new__(cls)
        hold.name = name
        with contextlib.ExitStack() as stack, namespaces.entered(netns):
            hold._table = stack.enter_context(HoldTable.adopt(name))
            hold._listener = stack.enter_context(Listener(hold._table.group))
            hold._begin(stack, timeout, limit)
            hold._resources = stack.pop_all()
        return hold

    def _begin(self, stack: contextlib.ExitStack, timeout: float, limit: int) -> None:
        self._injector = stack.enter_context(Injector(MARK))
        self._diag = stack.enter_context(SockDiag())
        self._timeout = timeout
        self._limit, self._size = limit, 0
        self._process = os.getpid()
        self._over = False
        self.kept = {}
        self.dropped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lift()

    def fileno(self) -> int:
        """For poll: readable when segments wait to be collected. -1 once it is lifted or disowned."""
        return self._listener.fileno()

    @property
    def lost(self) -> int:
        """Segments that came quicker than `collect` was called."""
        return self._listener.lost

    @property
    def tuples(self) -> Mapping[FourTuple, bool]:
        """What was added and not removed, and whether it is held from both sides."""
        if os.getpid() != self._process:  # in a forked child: what the parent did since
            self._process = os.getpid()
            with contextlib.suppress(NotFound):
                self._table.reload()
        return self._table.members

    def add(self, tuples: Iterable[FourTuple], *, outgoing: bool = True, timeout: float | None = None) -> None:
        """Hold these from both sides, or only what arrives; those that are held already change to that.

        For ``timeout`` seconds, by default the hold's own. All or none of them. Raises UsageError, NotFound if somebody
        removed the table.
        """
        self._table.add(tuples, self._timeout if timeout is None else timeout, outgoing=outgoing)

    def left(self) -> dict[FourTuple, float]:
        """What the kernel holds at this moment, and the seconds until each hold ends by itself. Raises NotFound."""
        return {each: held.left for each, held in self._table.elements().items()}

    def refresh(self, timeout: float | None = None) -> None:
        """Hold all of ``tuples`` for ``timeout`` seconds from now, by default the hold's own. Raises NotFound."""
        if self.tuples:
            self._table.refresh(self._timeout if timeout is None else timeout)

    def remove(self, tuples: Iterable[FourTuple]) -> None:
        """Let these go, and replay what was kept for them. Raises as `replay`; they stay held then."""
        gone = list(tuples)
        self.replay(gone)
        self._let_go(gone)
        self._inject(self.take(gone))

    def drop(self, tuples: Iterable[FourTuple]) -> None:
        """Let these go that live elsewhere: what was kept for them is forgotten, and the peer repeats it there."""
        gone = list(tuples)
        self._let_go(gone)
        self.take(gone)

    def collect(self) -> int:
        """Move what has arrived into ``kept``; the number of segments. Never waits."""
        return self._keep(self._listener.read(), self.kept)

    def keep(self, packets: Iterable[bytes]) -> None:
        """Keep these IP packets too, which another host held before: they come first."""
        older: dict[FourTuple, list[bytes]] = {}
        self._keep(packets, older)
        self._put_first(older)

    def take(self, tuples: Iterable[FourTuple] | None = None) -> dict[FourTuple, list[bytes]]:
        """What has arrived for these, or for all: from now on the caller's."""
        self.collect()
        chosen = list(self.kept) if tuples is None else tuples
        taken = {each: self.kept.pop(each) for each in chosen if each in self.kept}
        self._size -= _size(taken)
        return taken

    def discard(self) -> None:
        """Forget all that has arrived."""
        self.take()

    def replay(self, tuples: Iterable[FourTuple] | None = None) -> int:
        """Give what was kept for these connections, or for all, to their sockets; the number of segments.

        What arrives is held further on; what leaves no longer, so that the sockets can acknowledge. Raises HostError
        if segments cannot reach sockets here (the address is elsewhere, lo is down); all stay kept then.
        """
        chosen = None if tuples is None else list(tuples)
        held = self.tuples
        silent = [each for each in (held if chosen is None else chosen) if held.get(each)]
        if silent:
            with contextlib.suppress(NotFound):
                self._table.add(silent, self._timeout, outgoing=False)
        count = 0
        for _ in range(_ROUNDS):
            packets = self.take(chosen)
            if not packets:
                break
            count += self._inject(packets)
        return count

    def lift(self) -> None:
        """Replay, hold nothing any more, replay what came in the last moment, and close; again does nothing.

        What cannot be replayed is left to the peer to repeat. After the last replay this takes the kernel 10 to 20 ms
        (closing a netlink socket waits until a removed table is disposed of): who moves many uses one hold for all.
        """
        if self._over:
            return
        self._over = True
        with self._resources, contextlib.suppress(HostError):
            try:
                self.replay()
                self._let_go(list(self.tuples))
                self._inject(self.take())
            finally:
                self._table.delete()
            self._inject(self.take())

    def disown(self) -> None:
        """Close what this process has of the hold; it stands on, for a forked child or until its time is over."""
        self._over = True
        self._resources.close()

    def _let_go(self, tuples: Collection[FourTuple]) -> None:
        with contextlib.suppress(NotFound):
            self._table.remove(tuples)

    def _keep(self, packets: Iterable[bytes], where: dict[FourTuple, list[bytes]]) -> int:
        count = 0
        for packet in packets:
            try:
                key = four_tuple(packet)
            except Error:
                self.dropped += 1
                continue
            if self._size + len(packet) > self._limit:
                self.dropped += 1
                continue
            self._size += len(packet)
            where.setdefault(key, []).append(packet)
            count += 1
        return count

    def _put_first(self, older: dict[FourTuple, list[bytes]]) -> None:
        for each, those in older.items():
            self.kept[each] = those + self.kept.get(each, [])

    def _inject(self, packets: dict[FourTuple, list[bytes]]) -> int:
        count = 0
        here = self._connections(packets)
        for each, those in packets.items():
            for packet in those if each in here else ():
                try:
                    self._injector.inject(fix_checksums(packet))
                    count += 1
                except HostError:
                    # All of them again: what a socket has had already it throws away.
                    self._put_first(packets)
                    self._size += _size(packets)
                    raise
                except Error:
                    pass
        self.dropped += sum(map(len, packets.values())) - count
        return count

    def _connections(self, tuples: Collection[FourTuple]) -> Collection[FourTuple]:
        """Those that have a socket here, or are in TIME_WAIT; perhaps others too."""
        if len(tuples) <= _FEW:
            return {each for each in tuples if self._diag.find(each)}
        return {each.four_tuple for each in self._diag.list_connections()}


def _size(packets: dict[FourTuple, list[bytes]]) -> int:
    return sum(len(packet) for those in packets.values() for packet in those)
