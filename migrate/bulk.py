"""Many sockets to records: `checkpoint.dump` and `checkpoint.release` for a batch, for less.

What dump() asks with thirteen calls is read for all by `kernel.snapshot`, once before anything is touched, to judge,
and once when all are in repair mode. The first connection that this process reads so is also read by dump()'s calls;
if the two records differ, or where the host or the process cannot take snapshots, those calls do the work.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from migrate import checkpoint
from migrate.errors import Error
from migrate.fourtuple import MAPPED
from migrate.ici import Ici, Queue
from migrate.kernel import batch, heap, options, uapi
from migrate.kernel.snapshot import Numbers, Snapshot
from migrate.tcpstate import TcpState

__all__ = ["dump_many", "prepare", "release_many"]

_AT_ONCE = batch.MOST  # what was read of so many stays in the processor's caches until it is a record
_ESTABLISHED = int(TcpState.ESTABLISHED)
_INET, _INET6, _TCP = int(socket.AF_INET), int(socket.AF_INET6), int(socket.IPPROTO_TCP)
_PORT = struct.Struct("!H").unpack
_STATE = Numbers._fields.index("state")
_SND_UNA, _SND_NXT, _URG_DATA, _PEEK_OFF = map(Numbers._fields.index, ("snd_una", "snd_nxt", "urg_data", "peek_off"))
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_QUEUED = slice(Numbers._fields.index("rmem_alloc"), Numbers._fields.index("copied_seq") + 1)
_Carried = dict[tuple[int, int, int], dict[str, options.Value]]  # by `id` of what was found, advmss and SO_RCVBUF
_Queues = tuple[Queue, Queue, int, int, bytes]  # sent, unsent, rcv_nxt, urgent and received of a record


class _Bulk:
    """Snapshots, once they are ready; ``trusted`` when they were compared."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.able = True
        self.trusted = False

    def prepare(self) -> bool:
        if self.snapshot is None and self.able:
            self.able = options.prepare()
            try:
                self.snapshot = Snapshot() if self.able else None
            except (OSError, LookupError, ValueError, struct.error):
                self.able = False
        return self.snapshot is not None

    def give_up(self) -> None:
        self.able = False
        self.forget()

    def forget(self) -> None:
        """In a forked child: the memory is the parent's, too."""
        if self.snapshot is not None:
            self.snapshot.close()
            self.snapshot = None


_bulk = _Bulk()
os.register_at_fork(after_in_child=_bulk.forget)


def prepare() -> bool:
    """Get ready now, some 100 ms, rather than amidst a move. False where this process may not.

    From then on the process keeps the memory of queues for the next ones (`kernel.heap`).
    """
    heap.keep()
    batch.shared()
    return _bulk.prepare()


@heap.uncollected()
def dump_many(socks: Sequence[socket.socket]) -> list[Ici | Error]:
    """Of each socket the record, and the socket frozen as `checkpoint.dump` leaves it; or why not, and it is as before.

    Hold the connections first: snapshots take no lock.
    """
    results: list[Ici | Error] = []
    for start in range(0, len(socks), _AT_ONCE):
        some = socks[start : start + _AT_ONCE]
        if _bulk.snapshot or (len(socks) >= batch.FEW and _bulk.prepare()):
            results += _dump_some(some)
        else:
            results += [_one(sock) for sock in some]
    return results


def _dump_some(socks: Sequence[socket.socket]) -> list[Ici | Error]:
    assert _bulk.snapshot
    snapshot, descriptors = _bulk.snapshot, [sock.fileno() for sock in socks]
    try:
        before = options.look_many(descriptors)
        good = [
            place
            for place, (_, _, _, _, state, protocol, ulp) in enumerate(before)
            if protocol == _TCP and not ulp and state in checkpoint.MOVABLE
        ]
        alike = options.recognise_many([socks[place] for place in good], [before[place] for place in good])
    except (Error, OSError):  # nothing was touched: each says for itself what is wrong with it
        return [_one(sock) for sock in socks]
    found = dict(zip(good, alike, strict=True))
    results: list[Ici | Error | None] = [None] * len(socks)
    frozen = _freeze(socks, good, results)
    if not _bulk.trusted:
        sent, frozen = _sent(socks, frozen, found, results)
    after = snapshot.take_many([descriptors[place] for place in frozen])
    now, clock = time.time_ns(), time.monotonic_ns()
    queues = _queues(socks, frozen, after)
    carried: _Carried = {}
    for place, numbers in zip(frozen, after, strict=True):
        try:
            full = queues.get(place)
            if isinstance(full, checkpoint.Changed):
                results[place] = checkpoint.read_frozen(socks[place], found[place].copy(), _in_flight(numbers))
                continue
            if isinstance(full, Exception):
                raise full
            results[place] = _record(snapshot, numbers, found[place], full, carried, now=now, clock=clock)
        except (Error, OSError) as error:
            results[place] = _given_up(socks[place], found[place], error)
    if not _bulk.trusted:
        _compare(socks, sent, found, results)
    return [_one(socks[place]) if result is None else result for place, result in enumerate(results)]


def _given_up(sock: socket.socket, found: dict[str, options.Value], error: Error | OSError) -> Error:
    checkpoint.leave(sock, found)
    return error if isinstance(error, Error) else checkpoint.explained(error)


def _sent(
    socks: Sequence[socket.socket],
    frozen: list[int],
    found: dict[int, dict[str, options.Value]],
    results: list[Ici | Error | None],
) -> tuple[dict[int, int], list[int]]:
    """By place what is in flight, by the documented calls, and the places where that could be read."""
    sent = {}
    for place in frozen:
        try:
            sent[place] = checkpoint.in_flight(socks[place])
        except (Error, OSError) as error:
            results[place] = _given_up(socks[place], found[place], error)
    return sent, list(sent)


def _queues(
    socks: Sequence[socket.socket], places: list[int], after: list[tuple[Any, ...]]
) -> dict[int, _Queues | Exception]:
    """The queues of those that have any, by place, or why they cannot be read."""
    copied: dict[int, _Queues | Exception] = {}
    sending: list[tuple[int, int, int, int]] = []
    receiving: list[tuple[int, int, int]] = []
    for place, numbers in zip(places, after, strict=True):
        rmem_alloc, wmem_queued, _, write_seq, snd_una, snd_nxt, rcv_nxt, copied_seq = numbers[_QUEUED]
        outstanding, unread = write_seq - snd_una & 0xFFFFFFFF, rcv_nxt - copied_seq & 0xFFFFFFFF
        if not (rmem_alloc or wmem_queued) or not (outstanding or unread):
            continue  # more may be bookkeeping, or segments out of order
        # In other states a FIN may count.
        alone = numbers[_STATE] == _ESTABLISHED and not (outstanding and unread)
        if alone and outstanding:
            sending.append((place, outstanding, snd_nxt - snd_una & 0xFFFFFFFF, rcv_nxt))
        elif alone and not numbers[_URG_DATA] and numbers[_PEEK_OFF] < 0:
            receiving.append((place, unread, rcv_nxt))
        else:
            try:
                copied[place] = _both(socks[place], numbers)
            except (Error, OSError) as error:
                copied[place] = error
    for (place, _, rcv_nxt), data in zip(receiving, _peeked(socks, receiving, uapi.TCP_RECV_QUEUE), strict=True):
        copied[place] = data if isinstance(data, Exception) else (b"", b"", rcv_nxt, -1, data)
    for (place, _, sent, rcv_nxt), data in zip(sending, _peeked(socks, sending, uapi.TCP_SEND_QUEUE), strict=True):
        copied[place] = data if isinstance(data, Exception) else (*checkpoint.divided(data, sent), rcv_nxt, -1, b"")
    return copied


def _peeked(
    socks: Sequence[socket.socket], queues: Sequence[tuple[int, ...]], which: int
) -> list[bytes | Exception] | list[bytes]:
    """Of sockets that only have this queue, by place and with its length first, the queue or what is wrong.

    Copied one after the other, with nothing in between: a copy throws out of the processor's nearest cache what an
    interpreter has there, and it costs less to fetch little of it again.
    """
    chosen, lengths = [socks[queue[0]] for queue in queues], [queue[1] for queue in queues]
    copies: list[bytes] = []
    if chosen and _select(chosen, which):
        with suppress(OSError):  # one by one they say which, and why
            # A byte more than there should be tells of growth.
            copies = [sock.recv(length + 1, _PEEK) for sock, length in zip(chosen, lengths, strict=True)]
        _select(chosen, uapi.TCP_NO_QUEUE)
    if list(map(len, copies)) == lengths:
        return copies
    copies = copies or [b""] * len(chosen)  # no queue here is empty: each is read by itself then
    return [
        data if len(data) == length else _plain(sock, which, length)
        for sock, length, data in zip(chosen, lengths, copies, strict=True)
    ]


def _plain(sock: socket.socket, which: int, length: int) -> bytes | Exception:
    try:
        return checkpoint.plain_queue(sock, which, length)
    except (Error, OSError) as error:
        return error


def _select(socks: Sequence[socket.socket], queue: int) -> bool:
    """As sockopt.select_queue() on each, if all can have it together."""
    together = batch.shared()
    if together is None:
        return False
    with together.lock:
        return together.select_queue([sock.fileno() for sock in socks], queue) is None


def _in_flight(numbers: Sequence[Any]) -> int:
    """As `checkpoint.in_flight`, from a snapshot that was taken before a queue was selected."""
    sent: int = numbers[_SND_NXT] - numbers[_SND_UNA] & 0xFFFFFFFF
    return sent


def _both(sock: socket.socket, numbers: Sequence[Any]) -> _Queues:
    """The queues of a frozen socket, whatever they hold."""
    _, wmem_queued, _, write_seq, snd_una, _, rcv_nxt, copied_seq = numbers[_QUEUED]
    sent: Queue = b""
    unsent: Queue = b""
    received, urgent = b"", -1
    if wmem_queued and write_seq != snd_una:
        sent, unsent = checkpoint.send_queue(
            sock, numbers[_STATE], write_seq - snd_una & 0xFFFFFFFF, _in_flight(numbers)
        )
    if rcv_nxt != copied_seq:
        rcv_nxt, urgent, received = checkpoint.receive_queue(sock)
    return sent, unsent, rcv_nxt, urgent, received


def _freeze(socks: Sequence[socket.socket], places: list[int], results: list[Ici | Error | None]) -> list[int]:
    """Those of ``places`` that are in repair mode now; of the others the results say why."""
    together = batch.shared()
    if together is not None:
        with together.lock:
            if together.enter_repair([socks[place].fileno() for place in places]) is None:
                return places
    frozen: list[int] = []
    for place in places:
        try:
            checkpoint.freeze(socks[place])
            frozen.append(place)
        except Error as error:
            results[place] = error
    return frozen


def release_many(socks: Sequence[socket.socket]) -> list[Error | None]:
    """`checkpoint.release` for each of these frozen sockets, or why it could not be."""
    together = batch.shared() if len(socks) >= batch.FEW else None
    results: list[Error | None] = []
    for start in range(0, len(socks), batch.MOST):
        some = socks[start : start + batch.MOST]
        if together is not None:
            with together.lock:
                if together.release([sock.fileno() for sock in some]) is None:
                    results += [None] * len(some)
                    continue
        results += [_release(sock) for sock in some]
    return results


def _release(sock: socket.socket) -> Error | None:
    try:
        checkpoint.release(sock)
    except Error as error:
        return error
    return None


def _one(sock: socket.socket) -> Ici | Error:
    try:
        return checkpoint.dump(sock)
    except Error as error:
        return error


def _record(
    snapshot: Snapshot,
    numbers: Sequence[Any],
    found: dict[str, options.Value],
    queues: _Queues | None,
    carried: _Carried,
    *,
    now: int,
    clock: int,
) -> Ici:
    """The record of a frozen socket: the same as dump() makes of it."""
    (
        family, state, local, local_port, remote, remote_port,
        _, _, rcvbuf, _, snd_una, _, rcv_nxt, _,
        snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup, mss_clamp, mss, advmss,
        tsoffset, cwnd, ssthresh, srtt, mdev, _, _, addresses6, bits,
    ) = numbers  # fmt: skip
    timestamps, sack, snd_wscale, rcv_wscale, ecn, congestion = snapshot.negotiated(bits)
    sent, unsent, rcv_nxt, urgent, received = queues or (b"", b"", rcv_nxt, -1, b"")
    chosen: dict[str, options.Value] = {}
    if found:
        key = id(found), advmss, rcvbuf
        if key not in carried:
            carried[key] = found.copy()
            checkpoint.leave_out_what_comes_by_itself(carried[key], advmss, rcvbuf)
        chosen = carried[key].copy()
    if family == _INET6 and not addresses6.startswith(MAPPED):
        local, remote = addresses6[:16], addresses6[16:]
    return Ici(
        4 if family == _INET else 6,
        local,
        local_port,
        remote,
        _PORT(remote_port)[0],
        state,
        snd_una,
        rcv_nxt,
        snd_wl1,
        snd_wnd,
        max_window,
        rcv_wnd,
        rcv_wup,
        mss_clamp,
        mss,
        snd_wscale,
        rcv_wscale,
        sack,
        timestamps,
        _ts_value(timestamps, clock, tsoffset) if timestamps else 0,
        ecn,
        congestion,
        cwnd,
        ssthresh,
        srtt >> 3,
        mdev >> 2,
        b"",
        0,
        chosen,
        urgent,
        b"",
        checkpoint.HOST,
        now,
        checkpoint.KERNEL,
        sent,
        unsent,
        received,
    )


def _ts_value(timestamps: int, clock: int, tsoffset: int) -> int:
    """As getsockopt(TCP_TIMESTAMP): the clock in the connection's unit and its offset; the low bit tells the unit."""
    if timestamps == 2:
        return clock // 1000 + tsoffset & 0xFFFFFFFF | 1
    return clock // 1_000_000 + tsoffset & 0xFFFFFFFE


def _compare(
    socks: Sequence[socket.socket],
    sent: dict[int, int],
    found: dict[int, dict[str, options.Value]],
    results: list[Ici | Error | None],
) -> None:
    """Ask one connection the documented way as well. Where the two differ, ask all so, now and from now on.

    ``sent`` is what was in flight by place.
    """
    good = [place for place in sent if isinstance(results[place], Ici)]
    for first in good[:1]:
        with suppress(Error, OSError):  # it just changes: others are compared next time
            if _alike(results[first], checkpoint.read_frozen(socks[first], found[first].copy(), sent[first])):
                _bulk.trusted = True
                return
            _bulk.give_up()
    for place in good:
        try:
            results[place] = checkpoint.read_frozen(socks[place], found[place].copy(), sent[place])
        except (Error, OSError) as error:
            results[place] = _given_up(socks[place], found[place], error)


def _alike(ours: Ici | Error | None, theirs: Ici) -> bool:
    assert isinstance(ours, Ici)
    late = (theirs.ts_value - ours.ts_value & 0xFFFFFFFF) < (4_000_000 if ours.timestamps == 2 else 4_000)
    theirs.ts_value, theirs.origin_time = ours.ts_value, ours.origin_time
    return late and ours == theirs
