"""What a connection has learnt about its path goes with a handoff, where there is something to go."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading

import pytest

from migrate.agent.client import Client
from migrate.fourtuple import FourTuple
from migrate.kernel import tcpinfo
from migrate.kernel.diag import Extension, SockDiag
from migrate.pathstate import INITIAL
from migrate.selection import Selector
from tests.bench.longpath import Line, long_path
from tests.crash_bench import stopped
from tests.e2e.test_agent_move import VIP, name
from tests.fix_agents import Agents
from tests.fix_netns import LanFactory
from tests.peers import Peer, connect
from tests.waiting import until

DELAY = 0.04  # seconds each way
WINDOW = 100  # segments that the download has got to when it moves


def grown(sock: socket.socket) -> bool:
    """Its window, and what the peer offers to take, which limits what is believed of a window."""
    info = tcpinfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcpinfo.SIZE))
    return info.snd_cwnd >= WINDOW and info.snd_wnd >= WINDOW * info.snd_mss


@pytest.mark.parametrize("option", [None, "--no-path-state"])
def test_a_bulk_download_does_not_begin_again(lan: LanFactory, agents: Agents, option: str | None) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"), options=[option] if option else [])
    with long_path(net, Line(DELAY), Line(DELAY)) as path:
        # However slow this machine is: no time-out, which would shrink the window, while the path stands still.
        a.host.run(["ip", "route", "change", "default", "via", "10.0.0.254", "rto_min", "20s"])
        client, server = connect(net.host("client"), a.host, net.vip4)
        peer = Peer(client)
        with client, server:
            sent = 0
            server.setblocking(False)

            def download() -> bool:
                nonlocal sent
                with contextlib.suppress(BlockingIOError):
                    while not grown(server):
                        sent += server.send(bytes(1 << 16))
                return grown(server)

            until(download, what="the window has grown")
            os.kill(path, signal.SIGSTOP)  # so what is seen at b is not what acknowledgments have made of it
            until(lambda: stopped(path))
            chosen = FourTuple.parse(name(client))
            done: list[int] = []

            def move() -> None:
                with Client(f"unix:{a.socket}") as caller:
                    *_, last = caller.migrate(Selector(connection=chosen), b.address, steer=VIP)
                    done.append(last.summary.done)

            mover = threading.Thread(target=move, daemon=True)
            with b.host.entered(), SockDiag() as diag:
                mover.start()
                seen = 0
                while mover.is_alive():
                    found = diag.find(chosen, extensions=Extension.INFO)
                    if found is not None and found.info:
                        seen = max(seen, tcpinfo.parse(found.info).snd_cwnd)
            assert done == [1]
            assert seen == INITIAL if option else seen >= WINDOW
            os.kill(path, signal.SIGCONT)
            until(lambda: peer.received == sent, within=30, what="all of it arrives")


def test_a_host_that_allows_no_bpf_says_so_once(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"))
    b.stop()
    b.start(prefix=["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"])
    for _ in range(2):
        client, server = connect(net.host("client"), a.host, net.vip4)
        with client, server:
            done = a.tcpmig("migrate", name(client), "--to", b.address)
            assert done.code == 0, done
    assert b.log.read_text().count("begin with a new congestion window") == 1
