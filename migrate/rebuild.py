"""Many records to sockets: `restore.restore` and `restore.activate` for a batch, for less.

Established connections, which nearly all are, are rebuilt together by `kernel.batch`: the same calls in the same order,
but one system call for all. Whatever goes wrong with one is tried again by itself and says what it is.
"""

from __future__ import annotations

import itertools
import operator
import socket
from collections.abc import Collection, Iterable, Sequence

from migrate.errors import Error
from migrate.ici import Ici
from migrate.kernel import batch, heap, options, uapi
from migrate.refill import RECEIVE, SEND, fill_each
from migrate.restore import (
    MAXSEG_LIMIT,
    PUSH,
    Defaults,
    Restored,
    activate,
    choose_congestion,
    discard,
    restore_with,
    to_push,
)
from migrate.tcpstate import TcpState

__all__ = ["activate_many", "restore_many"]

_ESTABLISHED = int(TcpState.ESTABLISHED)
_INET, _INET6, _STREAM = int(socket.AF_INET), int(socket.AF_INET6), int(socket.SOCK_STREAM)
_TCP = int(socket.IPPROTO_TCP)

Results = list[Restored | Error]


@heap.uncollected()
def restore_many(records: Iterable[Ici], *, activate: bool = True) -> Results:
    """Of each record what `restore.restore` makes of it, or why that could not be."""
    records = list(records)
    defaults: Defaults = {}
    together = batch.shared() if len(records) >= batch.FEW else None
    results: Results = []
    for start in range(0, len(records), batch.MOST):
        some = records[start : start + batch.MOST]
        if together is None:
            results += [_one(defaults, record) for record in some]
        else:
            with together.lock:
                results += _some(together, defaults, some)
    if activate:
        built = [sock for sock in results if isinstance(sock, Restored)]
        why = dict(zip(built, activate_many(built), strict=True))
        results = [why.get(sock) or sock if isinstance(sock, Restored) else sock for sock in results]
    return results


def activate_many(socks: Sequence[socket.socket]) -> list[Error | None]:
    """`restore.activate` for each of these silent sockets, or why it could not be."""
    together = batch.shared() if len(socks) >= batch.FEW else None
    results: list[Error | None] = []
    for start in range(0, len(socks), batch.MOST):
        some = socks[start : start + batch.MOST]
        plain = [
            sock
            for sock in some
            if isinstance(sock, Restored) and sock.record is not None and sock.record.state == _ESTABLISHED
        ]
        if together and len(plain) == len(some):
            with together.lock:
                results += _speak(together, plain)
        else:
            results += [_activate(sock) for sock in some]
    return results


def _some(together: batch.Batch, defaults: Defaults, records: Sequence[Ici]) -> Results:
    """The plain ones together, the others one by one."""
    results: list[Restored | Error | None] = [None] * len(records)
    places: list[int] = []
    socks: list[Restored] = []
    try:
        for place, record in enumerate(records):
            if record.state != _ESTABLISHED or record.urgent >= 0:
                continue
            if record.options and options.flowinfo(record.options):  # connect() takes it
                continue
            sock = Restored(_INET if record.family == 4 else _INET6, _STREAM, _TCP)
            sock.record, sock.unset = record, []
            socks.append(sock)
            _put(together, len(places), record)
            places.append(place)
        _connect(together, defaults, places, socks, results)
    except (Error, OSError):
        results = [None] * len(records)  # one by one they say why
    if None not in results:
        return results  # type: ignore[return-value]
    for place, sock in itertools.zip_longest(places, socks):
        if place is None or results[place] is None:
            discard(sock)
    return [result or _one(defaults, record) for result, record in zip(results, records, strict=True)]


def _connect(
    together: batch.Batch,
    defaults: Defaults,
    places: Sequence[int],
    socks: Sequence[Restored],
    results: list[Restored | Error | None],
) -> None:
    """What was put becomes silent connections: ``results`` gets those that do."""
    groups = _groups(socks)
    _set_options(together, groups, options.Phase.BEFORE_BIND)
    descriptors = [sock.fileno() for sock in socks]
    if together.begin(descriptors) is not None:  # no connect(): it would begin a handshake
        return
    _set_options(together, groups, options.Phase.BEFORE_CONNECT)
    failed = together.connect(descriptors) or ()
    full: list[tuple[Restored, Ici]] = []
    for number, (place, sock) in enumerate(zip(places, socks, strict=True)):
        if failed and (number in failed or -1 in failed):
            continue
        record = sock.record
        assert record is not None
        if record.congestion and defaults.get((record.local, record.remote)) != record.congestion:
            choose_congestion(sock, record, defaults)
        if record.received or record.sent or record.unsent:
            full.append((sock, record))
        results[place] = sock
    _fill(together, full)
    _set_options(together, groups, options.Phase.IN_REPAIR)
    _queue_unsent(together, [(sock, ici) for sock, ici in full if ici.unsent])
    # Last: what comes after connect() changes them.
    _require_all(together.set_windows(descriptors), but=failed)


def _fill(together: batch.Batch, full: Sequence[tuple[Restored, Ici]]) -> None:
    fill_each([(sock, ici.received, 0) for sock, ici in full if ici.received], RECEIVE)  # still selected
    if sending := [(sock, ici.sent, 0) for sock, ici in full if ici.sent]:
        _require_all(together.select_queue([sock.fileno() for sock, _, _ in sending], uapi.TCP_SEND_QUEUE))
        fill_each(sending, SEND)


def _queue_unsent(together: batch.Batch, full: Sequence[tuple[Restored, Ici]]) -> None:
    """Behind windows that are still closed; outside repair mode for a moment, as `restore` does it with one."""
    if full:
        descriptors = [sock.fileno() for sock, _ in full]
        _require_all(together.leave_repair(descriptors, probe=False))
        fill_each([(sock, ici.unsent, len(ici.sent)) for sock, ici in full], SEND)
        _require_all(together.enter_repair(descriptors))


def _require_all(failures: batch.Failures, *, but: Collection[int] = ()) -> None:
    """Raises OSError, for all to be tried one by one, unless it failed only for those that had failed before."""
    for place, number in (failures or {}).items():
        if place not in but:
            raise OSError(number, "one of many calls")


def _put(together: batch.Batch, place: int, ici: Ici) -> None:
    rcv_nxt, mss, timestamps = ici.rcv_nxt, ici.mss_clamp, ici.timestamps
    if ici.received:  # that queue is filled later
        rcv_nxt = rcv_nxt - len(ici.received) & 0xFFFFFFFF
    if ici.family == 4:
        family, rest = _INET, ici.remote
    else:
        family, rest = _INET6, batch.rest(ici.remote)
    together.put(
        place * together.size,
        ici.snd_una,
        rcv_nxt,
        mss if mss < MAXSEG_LIMIT else MAXSEG_LIMIT,
        batch.sockaddr(family, ici.local, ici.local_port),
        family,
        ici.remote_port.to_bytes(2),
        rest,
        batch.negotiated(mss, ici.snd_wscale, ici.rcv_wscale, ici.sack, timestamps > 0),
        ici.ts_value & ~1 | (timestamps == 2),
        ici.snd_wl1,
        ici.snd_wnd,
        ici.max_window,
        ici.rcv_wnd,
        ici.rcv_wup,
    )


def _groups(socks: Sequence[Restored]) -> list[tuple[dict[str, options.Value], list[Restored]]]:
    """Those in a row that get the same options, of those that get any."""
    of = ((sock.record.options, sock) for sock in socks if sock.record is not None and sock.record.options)
    return [(chosen, [sock for _, sock in row]) for chosen, row in itertools.groupby(of, key=operator.itemgetter(0))]


def _set_options(
    together: batch.Batch, groups: Sequence[tuple[dict[str, options.Value], list[Restored]]], phase: options.Phase
) -> None:
    """As options.apply() on each."""
    for chosen, socks in groups:
        calls, rest = options.calls(chosen, phase) if len(socks) >= batch.FEW else ((), chosen)
        failed = (calls and together.set_options([sock.fileno() for sock in socks], calls)) or {}
        if not (failed or rest):
            continue
        for place, sock in enumerate(socks):
            again = chosen if place in failed or -1 in failed else rest
            sock.unset += options.apply(sock, again, phase)


def _one(defaults: Defaults, record: Ici) -> Restored | Error:
    try:
        return restore_with(defaults, record, activate=False)
    except Error as error:
        return error


def _speak(together: batch.Batch, socks: Sequence[Restored]) -> list[Error | None]:
    full = [(sock, ici) for sock in socks if (ici := sock.record) is not None and (ici.sent or ici.unsent)]
    probed = {sock.fileno() for sock, _ in full}
    others = [descriptor for sock in socks if (descriptor := sock.fileno()) not in probed]
    for descriptors, probe in ((list(probed), True), (others, False)):
        if descriptors and together.leave_repair(descriptors, probe=probe):
            return [_activate(sock) for sock in socks]
    try:
        _set_options(together, _groups(socks), options.Phase.AFTER_REPAIR)
    except Error as error:
        return [error] * len(socks)
    if pushed := [sock for sock, ici in full if to_push(ici)]:
        together.set_options([sock.fileno() for sock in pushed], (PUSH,))
    for sock in socks:
        sock.record = None
    return [None] * len(socks)


def _activate(sock: socket.socket) -> Error | None:
    try:
        activate(sock)
    except Error as error:
        return error
    return None
