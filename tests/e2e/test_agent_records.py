"""Dump and Restore: connections in the hands of a caller, and what becomes of them when somebody dies."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from migrate.agent.client import Client
from migrate.agent.v1.types_pb2 import OUTCOME_DONE, OUTCOME_STAYED, Results
from migrate.errors import Error, NotFound, RecordError, RecordTruncated, Refused, RemoteError, UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.ici import Ici
from migrate.selection import Selector
from tests.crowd import Crowd
from tests.e2e.test_agent_move import ECHO, PORT, dial, name, says, serving
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Lan, LanFactory
from tests.peers import Peer, connect, digest, noise
from tests.waiting import until

SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


@pytest.fixture
def scene(lan: LanFactory, agents: Agents) -> Iterator[tuple[Lan, Agent]]:
    """A host that serves, with an agent."""
    net = lan("client", "a")
    net.assign("a", net.vip4)
    agent = agents(net.host("a"), adopt=[ECHO])
    with serving(net.host("a"), net.vip4):
        yield net, agent


def calling(agent: Agent) -> Client:
    return Client(f"unix:{agent.socket}")


def only(client: socket.socket) -> Selector:
    return Selector(connection=FourTuple.parse(name(client)))


def everything(net: Lan) -> Selector:
    return Selector(local=parse_endpoint(f"{net.vip4}:{PORT}"))


def outcomes(results: Iterator[Results]) -> list[int]:
    return [outcome for each in results for outcome in each.outcomes]


def make_room(sock: socket.socket) -> None:
    """For a record of several chunks."""
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)


def test_there_and_back(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with dial(net) as client, net.capture("client") as wire, calling(agent) as caller:
        for number in range(2):
            assert says(client, b"before")
            stored: list[bytes] = []
            assert outcomes(caller.dump(only(client), stored.append, hold=2)) == [OUTCOME_DONE]
            record = Ici.decode(b"".join(stored))
            assert (record.four_tuple, record.epoch) == (FourTuple.parse(name(client)), 2 * number + 1)
            client.sendall(b"while it is away")
            assert outcomes(caller.restore(stored)) == [OUTCOME_DONE]
            assert client.recv(16, socket.MSG_WAITALL) == b"while it is away"
            assert says(client, b"after")
    assert not wire.rsts


def test_it_goes_on_at_another_host(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=["*=child:cat"])
    size = 6 << 20
    client, server = connect(net.host("client"), net.host("a"), net.vip4, prepare=make_room)
    with client, server, calling(a) as source, calling(b) as destination:
        peer = Peer(client, send=size, receive=size, close_after=True)
        until(lambda: peer.sent > 2 << 20, what="much is unread")
        stored: list[bytes] = []
        assert outcomes(source.dump(only(client), stored.append, hold=2)) == [OUTCOME_DONE]
        net.withdraw("a", net.vip4)
        net.assign("b", net.vip4)
        assert len(stored) > 2
        whole = b"".join(stored)
        cut = [whole[at : at + 777_777] for at in range(0, len(whole), 777_777)]
        assert outcomes(destination.restore(cut)) == [OUTCOME_DONE]
        net.host("client").run(["ip", "neighbour", "flush", "all"])  # not before: b would refuse what it does not know
        peer.join()
        assert peer.received_digest == digest(noise(), size)


def test_many_at_once_and_one_that_stays(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with Crowd(net.host("client"), net.vip4, PORT, 400) as crowd, calling(agent) as caller:
        crowd.echo()
        stored: list[bytes] = []
        assert outcomes(caller.dump(everything(net), stored.append, hold=2)) == [OUTCOME_DONE] * 400
        here = dial(net)
        with here:
            assert says(here, b"a connection of its own")
        assert outcomes(caller.restore(stored)) == [OUTCOME_DONE] * 400
        crowd.echo()


def test_a_copy_leaves_it_running(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with dial(net) as client, calling(agent) as caller:
        assert says(client, b"before")
        copies: list[bytes] = []
        assert outcomes(caller.dump(only(client), copies.append, leave_running=True)) == [OUTCOME_DONE]
        until(agent.settled, what="nothing is left of it")
        assert says(client, b"after")
        [refused] = caller.restore(copies)
        assert refused.failures[0].problem.reason == "CONFLICT"
        assert "exists" in refused.failures[0].problem.what
        assert says(client, b"still")
        stored: list[bytes] = []
        list(caller.dump(only(client), stored.append, hold=2))
        assert outcomes(caller.restore(stored)) == [OUTCOME_DONE]
        assert outcomes(caller.restore(copies)) == [OUTCOME_STAYED]
        assert says(client, b"once more")


def test_a_record_is_good_for_one_life(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with calling(agent) as caller:
        with dial(net) as client:
            assert says(client, b"before")
            stored: list[bytes] = []
            list(caller.dump(only(client), stored.append, hold=2))
            assert outcomes(caller.restore(stored)) == [OUTCOME_DONE]
            assert says(client, b"after")
        until(lambda: not list(caller.connections(everything(net))), what="it is over")
        [replayed] = caller.restore(stored)
        assert replayed.failures[0].problem.reason == "CONFLICT"
        assert "epoch 2 is not newer than 2" in replayed.failures[0].problem.what
        assert replayed.failures[0].problem.hint
        agent.stop()
        agent.start()
    with calling(agent) as caller:
        assert outcomes(caller.restore(stored)) == [OUTCOME_STAYED]


def test_a_record_that_cannot_be_restored_is_as_good_as_before(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a")
    net.assign("a", net.vip4)
    agent = agents(net.host("a"), adopt=["*=child:/nowhere"])
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        stored: list[bytes] = []
        with calling(agent) as caller:
            list(caller.dump(only(client), stored.append, hold=2))
            [result] = caller.restore(stored)
            assert "does not exist" in result.failures[0].problem.what
            with pytest.raises(RecordTruncated):
                list(caller.restore([stored[0][:-1]]))
            with pytest.raises(RecordError):
                list(caller.restore([b"GET / HTTP/1.1\r\n\r\n"]))
        agent.stop()
        agent.directory.joinpath("again").mkdir()
        agent._words[agent._words.index("*=child:/nowhere")] = "*=child:cat"
        agent.start()
        with calling(agent) as caller:
            assert outcomes(caller.restore(stored)) == [OUTCOME_DONE]
        assert says(client, b"after")


class Full(Exception):
    """There is no room to store it."""


def full(_: bytes) -> None:
    raise Full


def test_what_is_not_stored_lives_on(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with dial(net) as client, calling(agent) as caller:
        assert says(client, b"before")
        with pytest.raises(Full):
            list(caller.dump(only(client), full))
        until(agent.settled, what="it is thawed")
        assert says(client, b"after")
        slow = threading.Event()
        with pytest.raises(Refused, match=r"did not store the records within 0\.3 s"):
            list(caller.dump(only(client), lambda _: slow.wait(1.0), store_within=0.3))
        assert says(client, b"after")
        with pytest.raises(RemoteError, match="in time"):
            list(caller.dump(only(client), lambda _: slow.wait(1.5), timeout=0.7))
        until(agent.settled, what="it is thawed")
        assert says(client, b"after")


def test_a_record_that_is_too_old_to_be_known(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with dial(net) as client, calling(agent) as caller:
        assert says(client, b"before")
        copied: list[bytes] = []
        list(caller.dump(only(client), copied.append, leave_running=True))
        record = Ici.decode(b"".join(copied))
        record.origin_time -= 31 * 86400 * 10**9
        (results,) = caller.restore([record.encode()])
        assert "older than 30 days" in results.failures[0].problem.what
        assert says(client, b"after")


def test_words_that_make_no_sense(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    here = everything(net)
    with calling(agent) as caller:
        for wrong, asked in [
            (UsageError, caller.dump(Selector(), full)),
            (UsageError, caller.dump(here, full, hold=-1)),
            (UsageError, caller.dump(here, full, store_within=1e9)),
            (NotFound, caller.dump(Selector(local=parse_endpoint("10.9.9.9:9")), full)),
        ]:
            with pytest.raises(wrong):
                list(asked)


@pytest.mark.parametrize("moment", ["frozen", "source:OFFERED:COMMITTED:WriteJournal"])
def test_an_agent_killed_before_the_commit_leaves_it_at_its_source(scene: tuple[Lan, Agent], moment: str) -> None:
    net, agent = scene
    if moment != "frozen":
        agent.stop()
        agent.start(crash_at=moment)
    with dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")

        def store(_: bytes) -> None:
            assert agent.rows() == [("source", "OFFERED")]
            if moment == "frozen":
                agent.kill()

        with calling(agent) as caller, pytest.raises(RemoteError):
            list(caller.dump(only(client), store))
        assert agent.process is not None
        assert agent.process.wait(10) == -signal.SIGKILL
        client.sendall(b"after")
        agent.start()
        assert client.recv(5, socket.MSG_WAITALL) == b"after"
        assert says(client, b"and again")
        until(agent.settled, what="nothing is left of it")
    assert not wire.rsts


@pytest.mark.parametrize("moment", ["source:OFFERED:COMMITTED:Release", "source:RELEASED:ACTIVATED:Forget"])
def test_an_agent_killed_after_the_commit_has_let_go(scene: tuple[Lan, Agent], moment: str) -> None:
    net, agent = scene
    agent.stop()
    agent.start(crash_at=moment)
    with dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")
        stored: list[bytes] = []
        with calling(agent) as caller, pytest.raises(RemoteError):
            list(caller.dump(only(client), stored.append))
        assert agent.process is not None
        agent.process.wait(10)
        agent.start()
        client.sendall(b"after")
        record = Ici.decode(stored[0])
        with calling(agent) as caller:
            assert caller.verdicts([(record.id, record.epoch)]) == [True]
            assert outcomes(caller.restore(stored)) == [OUTCOME_DONE]
        assert client.recv(5, socket.MSG_WAITALL) == b"after"
    assert not wire.rsts


@pytest.mark.parametrize(
    "moment",
    [
        "destination:RESTORING:RESTORED:WriteJournal",
        "destination:COMMITTING:WON:Adopt",
        "destination:COMMITTING:WON:LiftHold",
        "destination:ACTIVE:RELEASED:Forget",
    ],
)
def test_an_agent_killed_while_it_restores(scene: tuple[Lan, Agent], moment: str) -> None:
    net, agent = scene
    with dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")
        stored: list[bytes] = []
        with calling(agent) as caller:
            list(caller.dump(only(client), stored.append, hold=30))
        agent.stop()
        agent.start(crash_at=moment)
        with calling(agent) as caller, pytest.raises(RemoteError):
            list(caller.restore(stored))
        assert agent.process is not None
        agent.process.wait(10)
        agent.start()
        with calling(agent) as caller, contextlib.suppress(Error):
            done = outcomes(caller.restore(stored))
            assert done == [OUTCOME_DONE if "RESTORING" in moment else OUTCOME_STAYED]
        assert says(client, b"after")
    assert not wire.rsts


def test_the_hold_outlasts_the_agent_and_ends(scene: tuple[Lan, Agent]) -> None:
    net, agent = scene
    with dial(net) as client, net.capture("client") as wire:
        assert says(client, b"before")
        stored: list[bytes] = []
        with calling(agent) as caller:
            list(caller.dump(only(client), stored.append, hold=6))
        agent.stop()
        agent.start()
        assert agent.held() == 1
        client.sendall(b"nobody answers")
        until(lambda: agent.held() == 0, what="the kernel ends it")
        until(lambda: bool(wire.rsts), what="the host answers")
