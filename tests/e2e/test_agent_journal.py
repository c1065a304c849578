"""The destination's journal keeps the records while a handoff lasts: never in plain, and only for who has the key."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.agent.client import Client
from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.selection import Selector
from tests.crash_bench import stopped
from tests.e2e.test_agent_move import VIP, name
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Lan, LanFactory
from tests.peers import connect
from tests.waiting import until

GO = "destination:COMMITTING:WON"  # they have been claimed, the records are still needed


@contextlib.contextmanager
def moving(net: Lan, a: Agent, b: Agent, payload: bytes) -> Iterator[tuple[socket.socket, threading.Thread]]:
    """A connection with unread data on its way from a to b: the client's end, and who waits for the move."""
    client, server = connect(net.host("client"), net.host("a"), net.vip4)
    with client, server:
        client.sendall(payload)
        until(lambda: len(server.recv(len(payload), socket.MSG_PEEK)) == len(payload))

        def move() -> None:
            with contextlib.suppress(Error), Client(f"unix:{a.socket}") as caller:
                list(caller.migrate(Selector(connection=FourTuple.parse(name(client))), b.address, steer=VIP))

        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        yield client, mover
        mover.join(40)
        assert not mover.is_alive()


def found(agent: Agent, payload: bytes) -> list[Path]:
    """The agent's files that have it: the database, its log, their free pages, whatever there is."""
    return [file for file in agent.directory.rglob("*") if file.is_file() and payload in file.read_bytes()]


def test_no_file_of_an_agent_ever_holds_payload(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=["*=child:cat"])
    b.stop()
    b.start(crash_at=f"{GO}:Activate=STOP")
    payload = os.urandom(64).hex().encode()
    with moving(net, a, b, payload) as (client, mover):
        process = b.process
        assert process is not None
        until(lambda: stopped(process.pid), what="b stands in the middle of the handoff")
        assert b.records() == 1
        assert found(a, payload) + found(b, payload) == []
        process.send_signal(signal.SIGCONT)
        mover.join(40)
        assert client.recv(len(payload), socket.MSG_WAITALL) == payload
        until(lambda: a.settled() and b.settled())
        assert found(a, payload) + found(b, payload) == []
    (key,) = (b.directory / "key").iterdir()
    assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_size) == (0o600, 32)


@pytest.mark.parametrize("kept", [True, False], ids=["the key is there", "the key is lost"])
def test_a_killed_agent_s_records(lan: LanFactory, agents: Agents, kept: bool) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), adopt=["*=child:cat"])
    b.stop()
    b.start(crash_at=f"{GO}:Activate")
    with moving(net, a, b, b"word") as (client, _):
        assert b.process is not None
        b.process.wait(20)
        assert b.records() == 1
        if not kept:
            shutil.rmtree(b.directory / "key")
        b.start()
        until(lambda: a.settled() and b.settled(), what="the handoff comes to its end")
        client.settimeout(20)
        if kept:
            assert client.recv(4, socket.MSG_WAITALL) == b"word"
            return
        log = b.log.read_text()
        assert "connections are lost: their records cannot be read" in log
        assert name(client) in log
        with pytest.raises(ConnectionResetError):  # nobody is left in the dark: the host answers as for any stranger
            client.sendall(b"more")
            client.recv(1)
