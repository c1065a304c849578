"""Record to socket: silent restore, activate, discard.

The order of the calls in `restore` is the contract with the kernel:

1. Socket options, each at its moment (`kernel.options`); buffer sizes come first, while the socket is fresh: the
   windows that connect() computes come from them.
2. TCP_REPAIR on (it also lets bind() stand beside a listener and sister connections), where the queues begin, and
   TCP_MAXSEG: without it connect() starts from the 536 bytes of RFC 9293 and stays there for a long while.
3. bind and connect, which in repair mode send nothing and give ESTABLISHED.
4. What was negotiated, then the timestamp.
5. The receive queue, then the part of the send queue that was sent: written in repair mode it counts as sent.
6. FINs as the state asks for.
7. The rest of the send queue, for a moment outside of repair mode, in which it would count as sent: behind a closed
   window it stays where it is. So whoever has the socket has all of it, should this process die at any later moment.
8. The windows. The socket is now silent.

That the receive queue stays selected if nothing else is done does not matter: the kernel looks at it only in repair
mode, when somebody writes, and until `activate` nobody does.

`activate` leaves repair mode and has the kernel send what it may. A FIN behind what was never sent comes only then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import socket
import time

from migrate import unconnected
from migrate.checkpoint import HasFileno
from migrate.errors import Conflict, Error, HostError, Refused, from_oserror
from migrate.fourtuple import MAPPED
from migrate.ici import Ici
from migrate.kernel import netns, options, segment, sockopt, uapi
from migrate.kernel.nft import MARK
from migrate.refill import RECEIVE, SEND, fill, fill_urgent, peers_window
from migrate.tcpstate import REBUILD, Step, TcpState, Way

__all__ = [
    "MAXSEG_LIMIT",
    "Defaults",
    "Restored",
    "activate",
    "choose_congestion",
    "discard",
    "restore",
    "restore_with",
    "to_push",
]

Defaults = dict[tuple[bytes, bytes], str]  # the congestion control that a connection between two addresses begins with

_REPAIRED = (Way.REPAIR, Way.RECREATE)
_PLANS = [REBUILD[TcpState(max(number, 1))] for number in range(max(TcpState) + 1)]  # by the state's number

_INET, _INET6 = int(socket.AF_INET), int(socket.AF_INET6)  # names of this module are found quicker than others
_STREAM, _TCP, _MAXSEG = int(socket.SOCK_STREAM), int(socket.IPPROTO_TCP), socket.TCP_MAXSEG
PUSH = (_TCP, int(socket.TCP_CORK), bytes(4))  # as it is; the kernel takes it for a wish to send
MAXSEG_LIMIT = 32767  # MAX_TCP_WINDOW in include/net/tcp.h: the most TCP_MAXSEG takes


_TRANSPARENT = {4: (socket.IPPROTO_IP, uapi.IP_TRANSPARENT), 6: (socket.IPPROTO_IPV6, uapi.IPV6_TRANSPARENT)}


class Restored(socket.socket):
    """A rebuilt socket.

    ``record`` is what it was made from until it is activated, then None. ``unset`` names the socket options that it
    should have and that this host could not set.
    """

    __slots__ = ("record", "unset")

    record: Ici | None
    unset: list[str]


def restore(ici: Ici, *, activate: bool = True, before_address: bool = False) -> socket.socket:
    """The connection, rebuilt in this thread's network namespace; blocking and close-on-exec.

    With ``activate=False`` it is silent: no segment leaves, closing it tells nobody, until `activate`. With
    ``before_address`` the host need not have its address before that; states that need injected segments do.

    Raises Conflict if the four-tuple exists here, HostError if its address does not, PrivilegeError, KernelError.
    After an error nothing is left.
    """
    return restore_with({}, ici, activate=activate, before_address=before_address)


def restore_with(defaults: Defaults, ici: Ici, *, activate: bool, before_address: bool = False) -> Restored:
    """`restore` for one of many: what was learnt of this namespace with one serves the next (`migrate.bulk`)."""
    try:
        sock = Restored(_INET if ici.family == 4 else _INET6, _STREAM, _TCP)
    except OSError as error:
        raise from_oserror("making a socket", error, hint=_descriptor_hint(error)) from None
    try:
        sock.record, sock.unset = ici, []
        if before_address:
            sock.setsockopt(*_TRANSPARENT[ici.family], 1)
        _rebuild(sock, ici, defaults)
        if before_address:  # it counts for bind() and connect() only
            level, option = _TRANSPARENT[ici.family]
            sock.setsockopt(level, option, int(bool(ici.options.get(f"IP{'V6' * (ici.family == 6)}_TRANSPARENT"))))
        if activate:
            _activate(sock, ici)
    except BaseException as error:
        discard(sock)
        if isinstance(error, OSError):
            raise from_oserror(f"restoring {ici.four_tuple}", error) from None
        raise
    return sock


def activate(sock: HasFileno) -> None:
    """From here the socket speaks. It must come from ``restore(…, activate=False)``."""
    if not isinstance(sock, Restored) or sock.record is None:
        raise Refused("it is not a silent restored socket")
    try:
        _activate(sock, sock.record)
    except OSError as error:
        raise from_oserror("activating a restored connection", error) from None


def discard(sock: HasFileno) -> None:
    """Close a silent socket without a packet. Harmless for one that is closed already."""
    if isinstance(sock, socket.socket):
        if sock.fileno() >= 0:
            _silence(sock)
        sock.close()
        return
    raise Refused("only a restored socket can be discarded")


def _silence(sock: socket.socket) -> None:
    try:
        sockopt.enter_repair(sock)
    except OSError:
        # Without the privilege there is no repaired socket either: an unconnected one is silent anyway.
        return


def _rebuild(sock: Restored, ici: Ici, defaults: Defaults) -> None:
    plan = _PLANS[ici.state]
    if plan.way is not Way.REPAIR and not (plan.way is Way.RECREATE and ici.mss_clamp):
        _rebuild_unconnected(sock, ici)
        return
    chosen = ici.options
    if chosen:
        sock.unset += options.apply(sock, chosen, options.Phase.BEFORE_BIND)
    snd_una, rcv_nxt = ici.snd_una, ici.rcv_nxt
    if plan.steps or ici.received:
        snd_una = (snd_una - plan.fin_acked) & 0xFFFFFFFF
        rcv_nxt = (rcv_nxt - plan.received_fin - len(ici.received)) & 0xFFFFFFFF
    try:
        sockopt.begin_queues(sock, snd_una, rcv_nxt)
    except OSError as error:
        raise from_oserror("TCP_REPAIR", error) from None
    mss_clamp, timestamps = ici.mss_clamp, ici.timestamps
    sock.setsockopt(_TCP, _MAXSEG, mss_clamp if mss_clamp < MAXSEG_LIMIT else MAXSEG_LIMIT)
    _connect(sock, ici)
    if ici.congestion:
        choose_congestion(sock, ici, defaults)
    sockopt.set_repair_options(
        sock, sockopt.repair_options(mss_clamp, ici.snd_wscale, ici.rcv_wscale, ici.sack, timestamps > 0)
    )
    if timestamps:
        sockopt.set_timestamp(sock, ici.ts_value & ~1 | (timestamps == 2))
    if ici.received:  # that queue is still selected
        if ici.urgent >= 0:
            fill_urgent(sock, ici)
        else:
            fill(sock, ici.received, RECEIVE)
    if ici.sent:
        sockopt.select_queue(sock, uapi.TCP_SEND_QUEUE)
        fill(sock, ici.sent, SEND)
    rcv_wnd, rcv_wup = ici.rcv_wnd, ici.rcv_wup
    if plan.steps:
        if not _steps_wait(ici):
            _take_steps(sock, ici, plan.steps)
        elif plan.received_fin and rcv_wup == ici.rcv_nxt:
            rcv_wnd, rcv_wup = rcv_wnd + 1, rcv_wup - 1 & 0xFFFFFFFF  # the peer's FIN is not in yet
    if ici.sent or plan.steps:
        sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)
    if chosen:
        sock.unset += options.apply(sock, chosen, options.Phase.IN_REPAIR)
    if ici.unsent:
        sockopt.set_window(sock, (ici.snd_wl1, 0, ici.max_window, rcv_wnd, rcv_wup))
        _queue_unsent(sock, ici)
    # Last, because an injected segment changes the windows.
    sockopt.set_window(sock, (ici.snd_wl1, ici.snd_wnd, ici.max_window, rcv_wnd, rcv_wup))


def _queue_unsent(sock: Restored, ici: Ici) -> None:
    """The peer's window must be closed, so that nothing leaves; the caller sets the windows afterwards.

    A process that is killed meanwhile is heard (a FIN, or a RST if something is unread), but for a hold on what leaves.
    """
    sockopt.leave_repair(sock, probe=False)
    fill(sock, ici.unsent, SEND, before=len(ici.sent))
    sockopt.enter_repair(sock)


def to_push(ici: Ici) -> bool:
    """Whether to send what is queued: if any may leave, which else the answer to the probe lets, a round trip later.

    The kernel sends no segment of which the peer's window takes only a part (tcp_snd_wnd_test).
    """
    if not ici.unsent:
        return False
    room = ici.snd_wnd - len(ici.sent)
    return (room >= ici.mss or room >= len(ici.unsent)) and not ici.options.get("TCP_CORK")


def choose_congestion(sock: Restored, ici: Ici, defaults: Defaults) -> None:
    """Where it is not what connect() gave, which the namespace's default and the route (``congctl``) decide."""
    ends = ici.local, ici.remote
    if ends not in defaults:
        defaults[ends] = sockopt.congestion(sock)
    if ici.congestion != defaults[ends] and not sockopt.set_congestion(sock, ici.congestion):
        sock.unset.append("TCP_CONGESTION")


def _rebuild_unconnected(sock: Restored, ici: Ici) -> None:
    if not _PLANS[ici.state].dumpable:
        raise Refused(f"{ici.four_tuple} was in {TcpState(ici.state).name}: {_PLANS[ici.state].reason}")
    try:
        sock.unset += unconnected.rebuild(sock, ici)
    except OSError as error:
        raise _bind_error(ici, error) from None


def _activate(sock: Restored, ici: Ici) -> None:
    if _PLANS[ici.state].way not in _REPAIRED:
        sock.unset += unconnected.activate(sock, ici)
        sock.record = None
        return
    # The probe makes the peer repeat its window and what it has received. It is needed where segments or an
    # opening of the peer's window may have been lost, and costs most of the time of leaving repair mode.
    sockopt.leave_repair(sock, probe=bool(ici.sent or ici.unsent))
    if ici.options:
        sock.unset += options.apply(sock, ici.options, options.Phase.AFTER_REPAIR)
    if to_push(ici):
        level, option, value = PUSH
        sock.setsockopt(level, option, value)
    if _steps_wait(ici):
        with netns.entered_with(sock):  # segments are injected
            _take_steps(sock, ici, _PLANS[ici.state].steps)
    sock.record = None


def _steps_wait(ici: Ici) -> bool:
    """Our FIN comes after what was never sent, and that can be written only outside repair mode."""
    return bool(ici.unsent) and _PLANS[ici.state].sent_fin


def _take_steps(sock: socket.socket, ici: Ici, steps: tuple[Step, ...]) -> None:
    """From ESTABLISHED to the record's state, by shutdown() and by segments as the peer sent them."""
    plan = _PLANS[ici.state]
    arrived = (
        ici.rcv_nxt - plan.received_fin
    ) & 0xFFFFFFFF  # the sequence number that the peer's FIN has or would have
    with contextlib.ExitStack() as opened:
        injector: segment.Injector | None = None
        for step in steps:
            before = sockopt.state(sock)
            if step is Step.SHUTDOWN:
                if sockopt.in_repair(sock):
                    sockopt.select_queue(sock, uapi.TCP_SEND_QUEUE)  # so that the FIN counts as sent, and is not
                sock.shutdown(socket.SHUT_WR)
                continue
            bare = segment.Segment(
                ici.four_tuple,
                seq=arrived,
                ack=ici.snd_una,
                flags=segment.ACK,
                window=peers_window(ici),
                options=_peers_timestamp(ici),
            )
            if injector is None:
                injector = opened.enter_context(segment.Injector(MARK))
                injector.inject(bare.build())  # a connection tracker takes up what begins with this, but not with a FIN
            if step is Step.INJECT_FIN:
                injector.inject(dataclasses.replace(bare, flags=segment.ACK | segment.FIN).build())
            else:
                injector.inject(bare.build())
            _await_change(sock, before)
    # TIME_WAIT goes on without the socket.
    if sockopt.state(sock) != (TcpState.CLOSED if plan.way is Way.RECREATE else ici.state):
        reached = TcpState.from_kernel(sockopt.state(sock)).name
        raise HostError(
            f"restoring {ici.four_tuple}: it came to {reached} instead of {TcpState(ici.state).name}",
            hint="segments injected over lo do not arrive; is a firewall rule on lo in the way?",
        )


def _peers_timestamp(ici: Ici) -> tuple[tuple[int, bytes], ...]:
    """None but the real one: a made-up one would be remembered and the peer's next, if older, refused."""
    return ((segment.TIMESTAMP, ici.ts_recent.to_bytes(4, "big") + bytes(4)),) if ici.ts_recent else ()


def _await_change(sock: socket.socket, before: int) -> None:
    """An injected segment usually arrives before send() returns; a busy machine may defer it for a moment."""
    limit = time.monotonic() + segment.ARRIVES
    while sockopt.state(sock) == before and time.monotonic() < limit:
        time.sleep(0)


def _connect(sock: Restored, ici: Ici) -> None:
    text = _text4 if ici.family == 4 else _text6
    remote: tuple[str | int, ...] = (text(ici.remote), ici.remote_port)
    try:
        sock.bind((text(ici.local), ici.local_port))
    except OSError as error:
        raise _bind_error(ici, error) from None
    if ici.options:
        sock.unset += options.apply(sock, ici.options, options.Phase.BEFORE_CONNECT)
        if label := options.flowinfo(ici.options):
            remote = (*remote, label, 0)
    try:
        sock.connect(remote)
    except OSError as error:
        raise _connect_error(ici, error) from None


_text4 = functools.lru_cache(maxsize=4096)(socket.inet_ntoa)


@functools.lru_cache(maxsize=4096)
def _text6(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6, MAPPED + address if len(address) == 4 else address)


def _bind_error(ici: Ici, error: OSError) -> Error:
    address = str(ici.four_tuple).partition(",")[0]
    if error.errno == errno.EADDRNOTAVAIL:
        return HostError(
            f"restoring {ici.four_tuple}: this host does not have the address of {address}",
            hint="let the address move first (ip address add …, or --steer vip:DEV)",
        )
    if error.errno == errno.EADDRINUSE:
        return Conflict(f"restoring {ici.four_tuple}: {address} is in use here")
    return from_oserror(f"binding {address}", error)


def _connect_error(ici: Ici, error: OSError) -> Error:
    if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
        return Conflict(f"restoring {ici.four_tuple}: this connection exists here already")
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return HostError(
            f"restoring {ici.four_tuple}: no route to the peer",
            hint="see `ip route get` for the peer's address on this host",
        )
    return from_oserror(f"connecting {ici.four_tuple}", error)


def _descriptor_hint(error: OSError) -> str | None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n, LimitNOFILE=)"
    return None
