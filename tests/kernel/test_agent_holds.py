"""The agent's hold: nothing that it keeps is forgotten between two batches."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest

from migrate.agent.holds import Holds
from migrate.agent.kept import EARLY, SentOn, readdressed
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection
from migrate.kernel.segment import four_tuple
from tests.fix_netns import LanFactory
from tests.peers import connect
from tests.waiting import until

OLD, NEW = b"old batch", b"new batch"


class Scene:
    """An agent's hold at a, and a connection of it."""

    def __init__(self, holds: Holds, client: socket.socket, server: socket.socket) -> None:
        self.holds, self.client, self.server = holds, client, server
        (local, local_port), (remote, remote_port) = server.getsockname(), server.getpeername()
        self.name = FourTuple.parse(f"{local}:{local_port},{remote}:{remote_port}")
        self.told = 0

    def arrived(self) -> None:
        self.told += 1

    def waits(self) -> bool:
        """Whether the hold's descriptor says that something waits to be collected."""
        return bool(select.select([self.holds], [], [], 0)[0])


@pytest.fixture
def scene(lan: LanFactory) -> Iterator[Scene]:
    net = lan("client", "a")
    a = net.host("a")
    client, server = connect(net.host("client"), a, a.ip4)
    with a.entered():
        holds = Holds("test-agent-holds")
    with client, server, contextlib.closing(holds):
        scene = Scene(holds, client, server)
        holds.tell(scene.arrived)
        yield scene
        holds.lift(OLD, [scene.name])
        holds.lift(NEW, [scene.name])


def test_whoever_collects_a_segment_tells_of_it(scene: Scene) -> None:
    scene.holds.hold(NEW, [scene.name])
    scene.client.sendall(b"word")
    until(scene.waits)
    assert scene.holds.take(OLD, [scene.name]) == ()
    assert not scene.waits(), "the descriptor does not tell it any more"
    assert scene.told == 1
    (packet,) = scene.holds.take(NEW, [scene.name])
    assert (four_tuple(packet), packet[-4:], scene.told) == (scene.name, b"word", 1)


def test_what_comes_late_for_a_batch_is_not_given_to_a_socket_that_moves_on(scene: Scene) -> None:
    scene.holds.hold(NEW, [scene.name])
    scene.client.sendall(b"word")
    until(scene.waits)
    (packet,) = scene.holds.take(NEW, [scene.name])
    told = scene.told
    scene.holds.keep([packet])
    assert scene.holds.replay(OLD, [scene.name]) == 0
    assert scene.told > told, "the batch that sends on hears of it"
    assert scene.holds.take(NEW, [scene.name]) == (packet,)
    scene.holds.keep([packet])
    assert scene.holds.replay(NEW, [scene.name]) == 1
    assert scene.server.recv(4) == b"word"


def test_what_was_sent_on_is_given_to_one_that_stays(scene: Scene) -> None:
    other = FourTuple(scene.name.local, 1, scene.name.remote, 2)
    sent = SentOn()
    scene.holds.hold(NEW, [scene.name])
    scene.client.sendall(b"word")
    until(scene.waits)
    sent.add(scene.holds.take(NEW, [scene.name]))
    scene.client.sendall(b"more")
    until(scene.waits)
    assert sent.take({other}) == []
    scene.holds.keep(sent.take({scene.name}))
    assert sent.take({scene.name}) == [], "once"
    scene.holds.lift(NEW, [scene.name])
    assert scene.server.recv(8, socket.MSG_WAITALL) == b"wordmore"


def test_so_much_is_kept_twice_and_no_more() -> None:
    sent = SentOn()
    sent.add([bytes(EARLY - 1)])
    assert not sent.full
    sent.add([b"\0"])
    assert sent.full


def test_segments_get_the_name_that_the_destination_knows(scene: Scene) -> None:
    scene.holds.hold(NEW, [scene.name])
    scene.client.sendall(b"word")
    until(scene.waits)
    packets = scene.holds.take(NEW, [scene.name])
    there = scene.name._replace(local_port=99)
    assert readdressed(packets, [Connection(b"", 1, scene.name)]) == packets
    (packet,) = readdressed(packets, [Connection(b"", 1, scene.name, there)])
    assert four_tuple(packet) == there
