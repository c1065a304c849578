"""Sockets that repair mode alone does not rebuild: LISTEN, CLOSED, SYN_SENT. `checkpoint` and `restore` come here.

LISTEN. While one is frozen a filter lets no SYN in (the peer repeats it), but handshakes that have begun may end.
`settle` waits for those; what stands in the accept queue is `accepted`, and moves as connections do.

CLOSED. A socket that never had a connection is a fresh one, bound if it was bound. One whose connection has ended may
hold bytes to be read, then an end or an error: it is made a connection again, which is then ended in the same way,
by segments as the peer would send them. If TIME_WAIT goes on without the socket it is made anew by the same means, from
the numbers that the socket still has. All of this is silent. An error is restored as ECONNRESET: to see which one it
was would take it away from the application.

SYN_SENT. The same SYN is sent again. An answer to one sent before the move echoes its timestamp, and Linux refuses (by
RST) what is older than the connect(): therefore the clock goes on from the last SYN, not from the moment of the dump.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator

from migrate.errors import Gone, HostError, Refused, from_oserror
from migrate.fourtuple import MAPPED, unmapped
from migrate.ici import ENDED_BY_FIN, ENDED_BY_RST, Ici
from migrate.kernel import diag, netns, options, sockopt, tcpinfo, uapi
from migrate.kernel.nft import MARK
from migrate.kernel.segment import ACK, ARRIVES, FIN, RST, Injector, Segment
from migrate.tcpstate import TcpState

__all__ = ["accepted", "activate", "dump", "frozen_listener", "rebuild", "settle", "thaw_listener", "waiting"]

HANDSHAKES = 3.0  # seconds to wait for handshakes that have begun: a segment lost in one is repeated after one second

_SO_PEERNAME = 28  # include/uapi/asm-generic/socket.h: unlike getpeername(2) it tells the peer in every state
_SO_DETACH_FILTER = 27
_NO_SYN = b"".join(  # ldb [13]; jset #SYN; ret #0; ret #-1 - in the form of a record (kernel.options)
    struct.pack(">HBBI", *step)
    for step in ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
)
_SLACK = 0.02  # seconds; the time of the last SYN is known to some milliseconds
_WINDOW = 0xFFFF

_syn = tcpinfo.reader("rto", "unacked", "sacked")


def dump(sock: socket.socket, state: TcpState) -> Ici:
    """The record of a socket in that state; it is frozen afterwards. Raises OSError, Gone."""
    local, local_port = _endpoint(sock.getsockname())
    record = Ici(
        4 if sock.family == socket.AF_INET else 6,
        local,
        local_port,
        bytes(len(local)),
        0,
        state,
        0,
        0,
        options=options.read(sock, connected=state is TcpState.SYN_SENT),
        origin_host=os.uname().nodename,
        origin_time=time.time_ns(),
        origin_kernel=os.uname().release,
    )
    if state is TcpState.LISTEN:
        record.backlog = _syn(sockopt.tcp_info(sock))[2]
        if record.options.get("SO_ATTACH_FILTER") == _NO_SYN:  # of `settle`
            del record.options["SO_ATTACH_FILTER"]
        freeze_listener(sock)
        return record
    sockopt.enter_repair(sock)
    try:
        if state is TcpState.SYN_SENT:
            _read_syn_sent(sock, record)
        else:
            _read_closed(sock, record)
    except BaseException:
        sockopt.leave_repair(sock, probe=False)
        raise
    return record


def _read_syn_sent(sock: socket.socket, record: Ici) -> None:
    record.remote, record.remote_port = _peer(sock)
    record.snd_una = (sockopt.queue_ends(sock)[0] - 1) & 0xFFFFFFFF
    record.timestamps, record.ts_value = 1, sockopt.timestamp(sock)
    with netns.entered_with(sock):
        found = diag.find(record.four_tuple)
    if found is None or found.state is not TcpState.SYN_SENT:
        raise Gone("the connection came to be, or ended, while it was being dumped")
    since = _syn(sockopt.tcp_info(sock))[0] // 1000 - found.expires  # milliseconds
    record.ts_value = (record.ts_value - max(since, 0)) & 0xFFFFFFFF


def _read_closed(sock: socket.socket, record: Ici) -> None:
    try:
        record.remote, record.remote_port = _peer(sock)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return  # never connected
    record.ended = _ended(sock)
    record.snd_una, record.rcv_nxt = sockopt.queue_ends(sock)
    record.snd_wl1 = record.rcv_wup = record.rcv_nxt
    with netns.entered_with(sock):
        after = diag.find(record.four_tuple)
    if after is not None and after.state is TcpState.TIME_WAIT:
        record.time_left = after.expires
    if length := sockopt.received_length(sock):
        sockopt.select_queue(sock, uapi.TCP_RECV_QUEUE)
        offset = sock.getsockopt(socket.SOL_SOCKET, uapi.SO_PEEK_OFF)
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_PEEK_OFF, -1)
        record.received = sockopt.peek(sock, length)
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_PEEK_OFF, offset)
        sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)


def _ended(sock: socket.socket) -> int:
    """What the application will see after the last byte; looking does not change it."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    seen = dict(poll.poll(0)).get(sock.fileno(), 0)
    if seen & select.POLLERR:
        return ENDED_BY_RST
    return ENDED_BY_FIN if seen & select.POLLRDHUP else 0


def _peer(sock: socket.socket) -> tuple[bytes, int]:
    size = 16 if sock.family == socket.AF_INET else 28  # struct sockaddr_in, sockaddr_in6; more gives EINVAL
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, size)
    return unmapped(raw[8:24]) if size == 28 else raw[4:8], int.from_bytes(raw[2:4])


def _endpoint(name: tuple[str, int]) -> tuple[bytes, int]:
    address = name[0].partition("%")[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return unmapped(socket.inet_pton(family, address)), name[1]


# Listeners


def freeze_listener(sock: socket.socket) -> None:
    """No handshake begins any more. A listener that has a filter of its own stays as it is."""
    if not _filter_of(sock):
        options.apply(sock, {"SO_ATTACH_FILTER": _NO_SYN}, options.Phase.UNCONNECTED)


def thaw_listener(sock: socket.socket) -> None:
    """Let handshakes begin again. Raises OSError."""
    if _filter_of(sock) == _NO_SYN:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def frozen_listener(sock: socket.socket) -> bool:
    """Whether it is a listener that lets no handshake begin."""
    return sockopt.state(sock) == TcpState.LISTEN and _filter_of(sock) == _NO_SYN


def _filter_of(sock: socket.socket) -> options.Value:
    return options.read(sock, connected=False).get("SO_ATTACH_FILTER", b"")


def waiting(listener: socket.socket) -> int:
    """How many connections its owner has not accepted yet."""
    return int(_syn(sockopt.tcp_info(listener))[1])


def settle(listener: socket.socket, *, seconds: float = HANDSHAKES, owner_accepts: bool = False) -> None:
    """Freeze a listener and wait until no handshake is under way; ``owner_accepts``: and none that is not accepted.

    Raises Refused if the time does not suffice, and the listener goes on as before.
    """
    try:
        freeze_listener(listener)
        try:
            _await_handshakes(listener, seconds, owner_accepts=owner_accepts)
        except BaseException:
            thaw_listener(listener)
            raise
    except OSError as error:
        raise from_oserror("emptying a listener's queue", error) from None


def _await_handshakes(listener: socket.socket, seconds: float, *, owner_accepts: bool) -> None:
    local, port = _endpoint(listener.getsockname())
    end = diag.Endpoint(local if any(local) else b"", port)
    limit = time.monotonic() + seconds
    with netns.entered_with(listener), diag.SockDiag() as asked:
        while True:
            begun = len(asked.list_connections(states={TcpState.SYN_RECEIVED}, local=end))
            unaccepted = waiting(listener) if owner_accepts else 0
            if not begun + unaccepted:
                return
            if time.monotonic() > limit:
                raise Refused(
                    f"after {seconds:g} s {begun} handshakes are unfinished and {unaccepted} connections not accepted",
                    hint="give --wait-handshakes more seconds",
                )
            time.sleep(0.005)


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """All that a settled listener's queue holds, which cannot be put back. Raises OSError.

    The owner's own accept() may be quicker, so ours must not wait.
    """
    blocking = os.get_blocking(listener.fileno())
    os.set_blocking(listener.fileno(), False)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # accept() minds Python's own time-out
                sock = socket.socket(fileno=descriptor)
                with contextlib.suppress(OSError):  # inherited if its handshake ended after the freeze
                    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
                yield sock
    finally:
        os.set_blocking(listener.fileno(), blocking)


# Rebuilding


def rebuild(sock: socket.socket, ici: Ici) -> list[str]:
    """Make a fresh socket what the record says, silently (SYN_SENT: behind a hold); the options that were not set.

    Raises OSError, and what `kernel.segment` raises.
    """
    match ici.state:
        case TcpState.SYN_SENT:
            return _rebuild_syn_sent(sock, ici)
        case TcpState.CLOSED if ici.ended:
            return _rebuild_ended(sock, ici)
        case _:
            unset = options.apply(sock, ici.options, options.Phase.UNCONNECTED)
            if ici.local_port or any(ici.local):
                sock.bind((_text(ici, ici.local), ici.local_port))
            return unset


def activate(sock: socket.socket, ici: Ici) -> list[str]:
    """From here it speaks; the options that were not set."""
    if ici.state == TcpState.LISTEN:
        sock.listen(ici.backlog)
        return []
    if ici.state == TcpState.CLOSED and not ici.ended:
        return []
    sockopt.leave_repair(sock, probe=False)
    return options.apply(sock, ici.options, options.Phase.AFTER_REPAIR)


def _rebuild_syn_sent(sock: socket.socket, ici: Ici) -> list[str]:
    unset = options.apply(sock, ici.options, options.Phase.BEFORE_BIND)
    sockopt.begin_queues(sock, ici.snd_una, 0)
    sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)
    sock.bind((_text(ici, ici.local), ici.local_port))
    unset += options.apply(sock, ici.options, options.Phase.BEFORE_CONNECT)
    sockopt.leave_repair(sock, probe=False)
    blocking = sock.getblocking()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect((_text(ici, ici.remote), ici.remote_port))
    sock.setblocking(blocking)
    time.sleep(_SLACK)
    sockopt.enter_repair(sock)
    sockopt.set_timestamp(sock, ici.ts_value + int(_SLACK * 500) & ~1)
    return unset + options.apply(sock, ici.options, options.Phase.IN_REPAIR)


def _rebuild_ended(sock: socket.socket, ici: Ici) -> list[str]:
    with diag.SockDiag() as here:
        here.forget_time_wait(ici.four_tuple)  # what the socket left here when it moved away
    fin = ici.ended == ENDED_BY_FIN  # of both sides: they count
    end = (ici.rcv_nxt - fin) & 0xFFFFFFFF
    unset = options.apply(sock, ici.options, options.Phase.BEFORE_BIND)
    sockopt.begin_queues(sock, ici.snd_una - fin, end - len(ici.received))
    sock.bind((_text(ici, ici.local), ici.local_port))
    unset += options.apply(sock, ici.options, options.Phase.BEFORE_CONNECT)
    sock.connect((_text(ici, ici.remote), ici.remote_port))
    data = memoryview(ici.received)
    while data:
        data = data[sock.send(data, socket.MSG_DONTWAIT) :]
    sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)
    unset += options.apply(sock, ici.options, options.Phase.IN_REPAIR)
    sockopt.set_window(sock, (end, _WINDOW, _WINDOW, _WINDOW, end))
    with Injector(MARK) as injector:

        def arrives(flags: int, seq: int, ack: int, leads_to: TcpState) -> None:
            segment = Segment(ici.four_tuple, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, flags, _WINDOW)
            _inject(injector, sock, segment, leads_to)

        # A connection tracker takes up what begins with this, but not with a FIN or RST.
        arrives(ACK, end, ici.snd_una - fin, TcpState.ESTABLISHED)
        if not fin:
            arrives(RST, end, 0, TcpState.CLOSED)
        elif ici.time_left:
            _shut(sock)
            arrives(ACK, end, ici.snd_una, TcpState.FIN_WAIT_2)
            arrives(ACK | FIN, end, ici.snd_una, TcpState.CLOSED)
        else:
            arrives(ACK | FIN, end, ici.snd_una - 1, TcpState.CLOSE_WAIT)
            _shut(sock)
            arrives(ACK, end + 1, ici.snd_una, TcpState.CLOSED)
    return unset


def _shut(sock: socket.socket) -> None:
    sockopt.select_queue(sock, uapi.TCP_SEND_QUEUE)  # so that our FIN counts as sent, and is not
    sock.shutdown(socket.SHUT_WR)
    sockopt.select_queue(sock, uapi.TCP_NO_QUEUE)


def _inject(injector: Injector, sock: socket.socket, arriving: Segment, leads_to: TcpState) -> None:
    injector.inject(arriving.build())
    limit = time.monotonic() + ARRIVES
    while sockopt.state(sock) != leads_to:
        if time.monotonic() > limit:
            raise HostError(
                f"restoring {arriving.four_tuple}: an injected segment did not lead to {leads_to.name}",
                hint="is a firewall rule on lo in the way?",
            )
        time.sleep(0)


def _text(ici: Ici, address: bytes) -> str:
    if ici.family == 4:
        return socket.inet_ntoa(address)
    return socket.inet_ntop(socket.AF_INET6, MAPPED + address if len(address) == 4 else address)
