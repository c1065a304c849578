"""wrk, unmodified, keeps 500 connections to nginx busy while they move from one host to the other and back."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from migrate.kernel import netns, tcpinfo
from migrate.kernel.diag import Endpoint, Extension, SockDiag
from migrate.tcpstate import TcpState
from tests.e2e.test_agent_move import VIP
from tests.fix_agents import Agents
from tests.fix_netns import Host, LanFactory
from tests.fix_programs import Content, Programs
from tests.waiting import until

CONNECTIONS = 500
# Milliseconds before each request: otherwise wrk leaves the others no processor.
PACE = "function delay() return math.random(100, 300) end\n"

_heard = tcpinfo.reader("bytes_received")


def received(client: Host) -> dict[int, int]:
    """The bytes that each of the client's connections has received, by its port."""
    with netns.entered(client.netns), SockDiag() as diag:
        found = diag.list_connections(
            states=[TcpState.ESTABLISHED], remote=Endpoint(port=80), extensions=Extension.INFO
        )
    return {each.four_tuple.local_port: _heard(each.info)[0] for each in found}


def test_wrk_sees_no_error(
    lan: LanFactory, agents: Agents, programs: Programs, content: Content, tmp_path: Path
) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    client = net.host("client")
    servers = [programs.nginx(net.host(name), content) for name in "ab"]
    a, b = (agents(net.host(name), adopt=["*=child:socat - TCP:127.0.0.1:80"]) for name in "ab")
    pace = tmp_path / "pace.lua"
    pace.write_text(PACE)
    file = min(
        (each for each in content.directory.iterdir() if each.stat().st_size), key=lambda each: each.stat().st_size
    )
    # An answer that takes longer is an error: this is what 160 programs that start at once may take on a busy machine.
    wrk = client.popen(
        ["wrk", "-t1", f"-c{CONNECTIONS}", "-d10m", "--timeout", "20s", "-s", pace, f"http://{net.vip4}/{file.name}"],
        stdout=subprocess.PIPE,
        text=True,
    )

    def all_heard_since(before: dict[int, int]) -> bool:
        assert wrk.poll() is None
        time.sleep(0.1)  # to look is work, and wrk should not have to wait for it
        now = received(client)
        return len(now) == CONNECTIONS and all(count > before.get(port, 0) for port, count in now.items())

    until(lambda: all_heard_since({}), within=30, what="every connection has had an answer")
    ports = received(client).keys()
    for source, destination in ((a, b), (b, a)):
        done = source.tcpmig("drain", "--to", destination.address, "--steer", VIP, "--when-quiet", "30", timeout=90)
        stayed = {name: each for name, each in done.results.items() if not each["ok"]}
        assert (done.code, len(done.results), stayed) == (0, CONNECTIONS, {}), done.said
        moved = received(client)
        until(partial(all_heard_since, moved), within=30, what="every connection has had an answer since")
    assert received(client).keys() == ports  # wrk says nothing when it connects anew
    wrk.send_signal(signal.SIGINT)
    report, _ = wrk.communicate(timeout=20)
    # It prints these lines only when there is something to say.
    assert "Socket errors" not in report, report
    assert "Non-2xx" not in report, report
    answers = re.search(r"(\d+) requests in", report)
    assert answers and int(answers[1]) > 3 * CONNECTIONS, report
    complaints = [line for server in servers for line in server.errors()]
    assert not [line for line in complaints if "103: Software caused connection abort" not in line]
