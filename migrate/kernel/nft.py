"""The nftables tables of tcpmig: hold connections, forward single flows, keep a standby or a port from answering RST.

But for `RefusalTable` a table outlives the process that made it: a hold must stand while an agent restarts. It belongs
to the network namespace in which the object was made. `nft list ruleset` prints all of it readably.

Sources: include/uapi/linux/netfilter/nf_tables.h, and nft(8) for what the rules mean.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

from migrate.errors import Conflict, KernelError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.kernel import nf_tables as nf
from migrate.kernel.nflog import Listener
from migrate.kernel.nft_table import PREFIX, PRIORITY_RAW, VERSIONS, Ip, Table, keys, load_key, only_tcp, tables

__all__ = ["MARK", "ForwardTable", "GuardTable", "Held", "HoldTable", "RefusalTable", "sweep", "tables"]

MARK = 0x7463706D  # "tcpm": SO_MARK of what tcpmig itself injects; every hold lets it pass

HOLD, FORWARD, GUARD, REFUSAL = (PREFIX + kind for kind in ("hold-", "forward-", "guard-", "refusal-"))
PRIORITY_INGRESS = -500  # of several rules at a device: before a load balancer's own

_COMMENT = "tcpmig: hold, NFLOG group "  # and the number: how an adopter finds it
_FLAGS_OFFSET, _FIN, _SYN, _RST, _ACK = 13, 1, 2, 4, 16  # in a TCP header
_IDLE, _LINGER = 5 * 86400.0, 600.0  # seconds: what conntrack gives an established connection; and a half-closed one
_SETS = {True: "held", False: "arriving"}  # by whether departing segments are dropped as well


class Held(NamedTuple):
    """How a connection is held."""

    outgoing: bool  # what the host sends for it is dropped as well
    left: float  # seconds until the hold ends by itself


class HoldTable(Table):
    """Segments of some connections reach no socket: those that arrive go to an NFLOG group, those that leave nowhere.

    Per connection the departing side may be left open. Each hold ends by itself after its timeout, in the kernel.
    Where two tables hold a connection, one of the two groups gets its segments.
    """

    family = nf.NFPROTO_INET

    def __init__(self, name: str, group: int) -> None:
        """Talks about a table; `create` and `adopt` give one that is there."""
        super().__init__(HOLD + name)
        self.group = group
        self.members: dict[FourTuple, bool] = {}  # what was added, and whether its departing side is dropped

    @classmethod
    def create(cls, name: str, group: int) -> Self:
        """A new, empty table ``tcpmig-hold-NAME`` that copies what it holds to NFLOG group ``group``.

        Raises Conflict if there is one of that name, PrivilegeError, HostError where nftables cannot do it, UsageError.
        """
        table = cls(name, group)
        try:
            table._build(table._rules())
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            raise Conflict(
                f"there is a table {table.name} already", hint="adopt it, or sweep what a killed process left"
            ) from None
        return table

    @classmethod
    def adopt(cls, name: str) -> Self:
        """The table that another process left behind, with what it holds. Raises NotFound, PrivilegeError."""
        group = _group(tables(cls.family).get(HOLD + name, ""))
        if group is None:
            raise NotFound(f"there is no table {HOLD + name} here")
        table = cls(name, group)
        table.reload()
        return table

    def reload(self) -> None:
        """Take ``members`` from the kernel: somebody else may have changed the table. Raises NotFound if it is gone."""
        self.members = {each: held.outgoing for each, held in self.elements().items()}

    def add(self, tuples: Iterable[FourTuple], timeout: float, *, outgoing: bool = True) -> None:
        """Hold these connections, from both sides or only what arrives, until ``timeout`` seconds from now.

        Those that are held already change to that. Raises UsageError, NotFound if the table is gone; then as before.
        """
        come = dict.fromkeys(tuples, outgoing)
        additions: list[bytes] = []
        for ip, packed in keys(come):
            place = self._place(_SETS[outgoing], ip)
            additions += nf.add_elements(place, packed, timeout=max(1, round(timeout * 1000)))
        self._change("holding", come, additions)
        self.members |= come

    def remove(self, tuples: Iterable[FourTuple]) -> None:
        """Hold these no longer; those that are not held, or no more, are passed over. Raises as add()."""
        gone = list(tuples)
        self._change("letting go", gone)
        for each in gone:
            self.members.pop(each, None)

    def refresh(self, timeout: float) -> None:
        """All that was added is held until ``timeout`` seconds from now, also what has expired meanwhile."""
        for outgoing in _SETS:
            self.add([each for each, way in self.members.items() if way is outgoing], timeout, outgoing=outgoing)

    def elements(self) -> dict[FourTuple, Held]:
        """What the kernel holds at this moment."""
        return {
            four_tuple: Held(outgoing, left / 1000)
            for outgoing, ip in itertools.product(_SETS, VERSIONS)
            for four_tuple, _, left in self._elements(_SETS[outgoing], ip)
        }

    def _rules(self) -> list[bytes]:
        family, name = self.family, self.name
        requests = [nf.new_table(family, name, f"{_COMMENT}{self.group}", exclusive=True)]
        for number, (each, ip) in enumerate(itertools.product(_SETS.values(), VERSIONS), 1):
            requests.append(nf.new_set(self._place(each, ip), number, key=ip.key_type, timeouts=True))
        ours = nf.meta(nf.META_MARK, nf.register(0)), nf.compare(nf.register(0), MARK.to_bytes(4, sys.byteorder))
        for chain, hook in (("arriving", nf.NF_INET_PRE_ROUTING), ("departing", nf.NF_INET_LOCAL_OUT)):
            requests.append(nf.new_chain(family, name, chain, hook=hook, priority=PRIORITY_RAW))
            requests.append(nf.new_rule(family, name, chain, *ours, nf.verdict(nf.NF_ACCEPT)))
        for each, ip in itertools.product(_SETS.values(), VERSIONS):
            action = nf.log(self.group), nf.verdict(nf.NF_DROP)
            requests.append(nf.new_rule(family, name, "arriving", *self._match(each, ip, arriving=True), *action))
        for ip in VERSIONS:
            match = self._match(_SETS[True], ip, arriving=False)
            requests.append(nf.new_rule(family, name, "departing", *match, nf.verdict(nf.NF_DROP)))
        return requests

    def _match(self, name: str, ip: Ip, *, arriving: bool) -> list[bytes]:
        found = nf.lookup(self._place(name, ip).set, nf.register(0))
        return [*only_tcp(self.family, ip), *load_key(ip, arriving=arriving), found]

    def _removals(self, tuples: Iterable[FourTuple], *, expired: bool) -> list[bytes]:
        # An element that has expired cannot be deleted, but one that is there can be added again. So where some may
        # have expired: add and delete. Within one transaction no segment sees it. (DESTROYSETELEM, since Linux 6.3.)
        requests: list[bytes] = []
        known = [each for each in tuples if each in self.members]
        for outgoing, name in _SETS.items():
            for ip, packed in keys([each for each in known if self.members[each] is outgoing]):
                place = self._place(name, ip)
                requests += (nf.add_elements(place, packed) if expired else []) + nf.delete_elements(place, packed)
        return requests

    def _change(self, what: str, tuples: Collection[FourTuple], additions: Sequence[bytes] = ()) -> None:
        """Remove those that are there, then ``additions``."""
        for expired in (False, True):  # they seldom are, and to add each first doubles the work
            requests = [*self._removals(tuples, expired=expired), *additions]
            if not requests:
                return
            try:
                self._netfilter.commit(f"{what} in table {self.name}", requests)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
            else:
                return
        raise self._gone()


class ForwardTable(Table):
    """Single flows that arrive on a device go on to another host, at layer 2, before the IP stack sees them.

    The packet keeps its addresses; its TTL goes down by one. The next host must carry the flow's local address and
    answers the client itself. On a load balancer the table takes single flows out of what its own rules do.

    This host sees one direction only and no socket, so that a connection has ended shows as it does to a load balancer:
    by the client's FIN or RST, or by nothing for days. Two sets remember it: when a flow's last segment came
    (``active``, by its elements' timeouts), and whether it was heard to end (``ended``).
    """

    family = nf.NFPROTO_NETDEV

    def __init__(self, device: str, via: str | None = None) -> None:
        """The table of ``device``, made if it is not there; it sends through ``via``, by default the same device.

        Raises NotFound for a device, PrivilegeError, HostError where nftables cannot do it.
        """
        via = via or device
        _index(device)
        index = _index(via)
        super().__init__(FORWARD + (device if via == device else f"{device}-{via}"))
        self._build(self._rules(device, index))
        self._known = self.entries()

    def add(self, entries: Mapping[FourTuple, bytes]) -> None:
        """Forward these flows, ``local`` being this host's side, to the neighbours with those packed addresses.

        One that is forwarded already changes its neighbour. Raises UsageError; then as before.
        """
        if any(len(each.local) != len(hop) for each, hop in entries.items()):
            raise UsageError("a flow's next hop has an address of the flow's own IP version")
        self._change(entries, ())

    def remove(self, tuples: Iterable[FourTuple]) -> None:
        """Forward these no longer; those that are not forwarded are passed over."""
        self._change({}, list(tuples))

    def entries(self) -> dict[FourTuple, bytes]:
        """What is forwarded: flow, packed address of the neighbour. Raises NotFound if the table is gone."""
        return {four_tuple: hop for ip in VERSIONS for four_tuple, hop, _ in self._elements("flows", ip)}

    @property
    def known(self) -> Mapping[FourTuple, bytes]:
        """`entries` as they were listed last, with what was changed here since; it costs nothing."""
        return self._known

    def over(self, *, idle: float = _IDLE, linger: float = _LINGER) -> list[FourTuple]:
        """Flows that have ended: no segment came for ``linger`` seconds and a FIN or RST before, or none for ``idle``.

        Raises NotFound if the table is gone.
        """
        self._known = self.entries()
        ages = {each: _IDLE - left / 1000 for ip in VERSIONS for each, _, left in self._elements("active", ip)}
        ended = {each for ip in VERSIONS for each, _, _ in self._elements("ended", ip)}
        return [each for each in self._known if ages.get(each, _IDLE) >= (linger if each in ended else idle)]

    def _change(self, come: Mapping[FourTuple, bytes], gone: Collection[FourTuple]) -> None:
        try:
            self._commit(come, gone)
        except KernelError as error:
            if error.errno not in (errno.EEXIST, errno.ENOENT):
                raise
            self._known = self.entries()  # somebody else changed the table too
            self._commit(come, gone)

    def _commit(self, come: Mapping[FourTuple, bytes], gone: Collection[FourTuple]) -> None:
        # An entry cannot be given another neighbour, nor one deleted that is not there: hence what is known.
        known = self._known
        leaving = {each for each in gone if each in known}
        leaving |= {each for each, hop in come.items() if known.get(each, hop) != hop}
        requests: list[bytes] = []
        for ip, packed in keys(leaving):
            requests += nf.delete_elements(self._place("flows", ip), packed)
            for name in ("active", "ended"):  # first added, because what is not there cannot be deleted
                requests += nf.add_elements(self._place(name, ip), packed)
                requests += nf.delete_elements(self._place(name, ip), packed)
        for ip, packed in keys(come):
            hops = [hop for hop in come.values() if len(hop) == ip.size]
            requests += nf.add_elements(self._place("flows", ip), packed, data=hops)
            requests += nf.add_elements(self._place("active", ip), packed, timeout=_milliseconds(_IDLE))
        if requests:
            self._netfilter.commit(f"forwarding in table {self.name}", requests)
        for each in leaving:
            del known[each]
        known.update(come)

    def _rules(self, device: str, via: int) -> list[bytes]:
        family, name, chain = self.family, self.name, "ingress"
        requests = [nf.new_table(family, name, f"tcpmig: forwards flows that arrive on {device}", exclusive=False)]
        for number, ip in enumerate(VERSIONS, 1):
            place = self._place("flows", ip)
            requests.append(nf.new_set(place, number, key=ip.key_type, data=(ip.type, ip.size)))
        for number, (each, ip) in enumerate(itertools.product(("active", "ended"), VERSIONS), 1 + len(VERSIONS)):
            requests.append(nf.new_set(self._place(each, ip), number, key=ip.key_type, timeouts=True, dynamic=True))
        # The rules are made anew each time: a device that went and came back has another index, or no chain any more.
        hook = nf.new_chain(family, name, chain, hook=nf.NF_NETDEV_INGRESS, priority=PRIORITY_INGRESS, device=device)
        requests += hook, nf.del_rules(family, name, chain)
        for ip in VERSIONS:
            requests += [nf.new_rule(family, name, chain, *only_tcp(family, ip), *each) for each in self._marks(ip)]
            expressions = (
                *only_tcp(family, ip),
                *load_key(ip, arriving=True),
                nf.lookup(self._place("flows", ip).set, nf.register(0), nf.register(0)),
                nf.immediate(nf.register(12), via.to_bytes(4, sys.byteorder)),
                nf.forward(nf.register(12), nf.register(0), ip.protocol),
            )
            requests.append(nf.new_rule(family, name, chain, *expressions))
        return requests

    def _marks(self, ip: Ip) -> Iterator[list[bytes]]:
        # What is remembered of a forwarded segment. A SYN begins another connection with the same numbers.
        key, rest = nf.register(0), nf.register(12)
        active, ended = self._place("active", ip).set, self._place("ended", ip).set
        flow = [*load_key(ip, arriving=True), nf.lookup(self._place("flows", ip).set, key, rest)]
        age = _milliseconds(_IDLE)
        yield [*flow, nf.change_set(active, nf.DYNSET_UPDATE, key, age)]
        ends = nf.compare(key, bytes(1), nf.CMP_NEQ)
        yield [*_flags(_FIN | _RST), ends, *flow, nf.change_set(ended, nf.DYNSET_UPDATE, key, age)]
        begins = nf.compare(key, bytes((_SYN,)))
        again = *load_key(ip, arriving=True), nf.lookup(ended, key)
        yield [*_flags(_SYN | _ACK), begins, *again, nf.change_set(ended, nf.DYNSET_DELETE, key)]


class GuardTable(Table):
    """No RST leaves from an address: a standby stays silent about connections that are still on their way to it."""

    family = nf.NFPROTO_INET

    def __init__(self, address: bytes, port: int | None = None) -> None:
        """The guard of a packed local address, and of one port or all; made if it is not there, outlives the process.

        Raises PrivilegeError, HostError where nftables cannot do it.
        """
        ip = next((ip for ip in VERSIONS if ip.size == len(address)), None)
        if ip is None or not (port is None or 0 < port < 0x10000):
            raise UsageError("a guard is for an address of 4 or 16 bytes and for a port from 1 to 65535, or all")
        super().__init__(f"{GUARD}{address.hex()}" + ("" if port is None else f"-{port}"))
        family, name, chain = self.family, self.name, "departing"
        match = [*only_tcp(family, ip), nf.payload(nf.NETWORK_HEADER, ip.source, ip.size, nf.register(0))]
        match.append(nf.compare(nf.register(0), address))
        if port is not None:
            match.append(nf.payload(nf.TRANSPORT_HEADER, 0, 2, nf.register(0)))
            match.append(nf.compare(nf.register(0), port.to_bytes(2)))
        match += _flags(_RST)
        match.append(nf.compare(nf.register(0), bytes(1), nf.CMP_NEQ))
        shown = socket.inet_ntop(socket.AF_INET if ip.version == 4 else socket.AF_INET6, address)
        self._build(
            [
                nf.new_table(family, name, f"tcpmig: no RST from {shown}", exclusive=False),
                nf.new_chain(family, name, chain, hook=nf.NF_INET_LOCAL_OUT, priority=PRIORITY_RAW),
                nf.del_rules(family, name, chain),
                nf.new_rule(family, name, chain, *match, nf.verdict(nf.NF_DROP)),
            ]
        )


class RefusalTable(Table):
    """No SYN to these ends (a packed address, zeros for any, and a port) is answered by RST, so the peer repeats it.

    The kernel removes the table when the last process that has it closes it or dies.
    """

    family = nf.NFPROTO_INET

    def __init__(self, ends: Collection[tuple[bytes, int]]) -> None:
        """Raises PrivilegeError, HostError where nftables cannot do it."""
        super().__init__(f"{REFUSAL}{os.getpid()}")
        family, name, chain = self.family, self.name, "departing"
        requests = [
            nf.new_table(family, name, "tcpmig: listeners that are on their way", exclusive=True, owned=True),
            nf.new_chain(family, name, chain, hook=nf.NF_INET_LOCAL_OUT, priority=PRIORITY_RAW),
        ]
        where = nf.register(0)
        for address, port in ends:
            ip = next(ip for ip in VERSIONS if ip.size == len(address))
            match = only_tcp(family, ip)
            if any(address):
                match += nf.payload(nf.NETWORK_HEADER, ip.source, ip.size, where), nf.compare(where, address)
            match += nf.payload(nf.TRANSPORT_HEADER, 0, 2, where), nf.compare(where, port.to_bytes(2))
            # What answers a SYN has the sequence number 0 (RFC 9293, section 3.10.7.1).
            match += nf.payload(nf.TRANSPORT_HEADER, 4, 4, where), nf.compare(where, bytes(4))
            match += *_flags(_RST), nf.compare(where, bytes((_RST,)))
            requests.append(nf.new_rule(family, name, chain, *match, nf.verdict(nf.NF_DROP)))
        self._build(requests)

    def fileno(self) -> int:
        """What keeps it."""
        return self._netfilter.fileno()


def sweep() -> list[str]:
    """Remove the hold tables here that hold nothing any more and that nobody listens to; their names."""
    removed = []
    for name, comment in tables(HoldTable.family).items():
        group = _group(comment)
        if group is None:
            continue
        # Whose owner lives has the group; and while we have it, nobody adopts the table.
        with contextlib.suppress(Conflict, NotFound), Listener(group), HoldTable(name[len(HOLD) :], group) as table:
            if not table.elements():
                table.delete()
                removed.append(name)
    return removed


def _group(comment: str) -> int | None:
    found = re.fullmatch(re.escape(_COMMENT) + r"(\d{1,5})", comment)
    return int(found[1]) if found else None


def _flags(chosen: int) -> list[bytes]:
    """Expressions: those of the TCP header's flags into register 0."""
    where = nf.register(0)
    return [nf.payload(nf.TRANSPORT_HEADER, _FLAGS_OFFSET, 1, where), nf.mask(where, bytes((chosen,)))]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError:
        raise NotFound(f"there is no device {device!r} here") from None
