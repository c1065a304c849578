"""Cases of CRIU's test suite that test_states.py and test_features.py do not have; docs/support.md lists all."""

from __future__ import annotations

import contextlib
import socket

import pytest

import migrate
from migrate.kernel import options, sockopt
from tests.e2e.test_states import Field, field
from tests.lives import FAMILIES, judge
from tests.moving import four_tuple
from tests.peers import Peer, digest, noise
from tests.waiting import until

__all__ = ["field"]

MEBI = 1 << 20
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "::ffff:127.0.0.1"}


@pytest.mark.parametrize("unread", [0, 100_000], ids=["idle", "buffers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ends_on_one_host(field: Field, family: str, unread: int) -> None:
    """A connection over loopback moves as a whole: nobody stays behind to hold anything against."""
    a, b = field.net.host("a"), field.net.host("b")
    with contextlib.ExitStack() as stack:
        with a.entered():
            listener = stack.enter_context(socket.socket(socket.AF_INET if family == "ipv4" else socket.AF_INET6))
            listener.bind((LOOPBACK[family], 0))
            listener.listen()
            client = stack.enter_context(socket.socket(listener.family))
            client.connect(listener.getsockname())
            server = stack.enter_context(listener.accept()[0])
        client.setblocking(False)
        sent = client.send(bytes(unread)) if unread else 0
        until(lambda: sockopt.received_length(server) == sent)
        names = [four_tuple(client), four_tuple(server)]
        with migrate.hold(names, netns=a.netns), migrate.hold(names, netns=b.netns) as held:
            records = [migrate.dump(sock) for sock in (client, server)]
            for sock in (client, server):
                migrate.release(sock)
            with b.entered():
                ends = [stack.enter_context(migrate.restore(record, activate=False)) for record in records]
            held.replay()
            for sock in ends:
                migrate.activate(sock)
        peers = [Peer(end, send=MEBI, receive=MEBI + more) for end, more in zip(ends, (0, sent), strict=True)]
        for peer in peers:
            peer.join()
        assert peers[0].received_digest == digest(noise(), MEBI)


def test_two_listeners_share_a_port(field: Field) -> None:
    with field.life("ipv4") as life, contextlib.ExitStack() as stack:

        def share(sock: socket.socket) -> None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

        first = life.listen(share)
        second = stack.enter_context(life.fresh(life.mover.here))
        share(second)
        second.bind(first.getsockname())
        second.listen(3)
        records = [migrate.dump(sock) for sock in (first, second)]
        life.mover.move_address()
        with life.mover.here.entered():
            moved = [stack.enter_context(migrate.restore(record)) for record in records]
        for old in (first, second):
            migrate.release(old)
            old.close()
        assert [sock.getsockname() for sock in moved] == [moved[0].getsockname()] * 2
        assert all(options.read(sock, connected=False)["SO_REUSEPORT"] == 1 for sock in moved)
        life.listener = None


def test_traffic_goes_on_through_many_moves(field: Field) -> None:
    """Both directions are busy all the time, and nobody waits for anything."""
    with field.life("ipv4") as life:
        life.passive()
        life.peer.setblocking(True)
        peer = Peer(life.peer, send=30 * MEBI, receive=30 * MEBI)
        for _ in range(5):
            life.ours.setblocking(True)
            ours = Peer(life.ours, send=6 * MEBI, receive=6 * MEBI)
            until(lambda ours=ours: ours.received > MEBI)  # type: ignore[misc]
            ours.join()
            life.move()
        peer.join()
        assert peer.sent == peer.received == 30 * MEBI
        judge(life.wire.segments, life.four_tuple, closed=False)
