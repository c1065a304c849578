"""What a dry run foresees: each reason for which a destination would refuse, asked before anything begins."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from migrate.agent.v1 import handoff_pb2 as pb
from migrate.agent.v1 import handoff_pb2_grpc
from tests.e2e.test_agent_move import ECHO, VIP, carries, dial, name, says, serving
from tests.fix_agents import Agent, Agents
from tests.fix_netns import LanFactory
from tests.stub_agent import HandoffServicer


def untouched(agent: Agent) -> bool:
    """Its journal has never seen a connection, and nothing is held."""
    with contextlib.closing(sqlite3.connect(agent.directory / "state" / "journal.db")) as journal:
        return agent.settled() and not journal.execute("SELECT count(*) FROM seen").fetchone()[0]


def test_each_destination_says_what_it_would_take(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b", "c")
    net.assign("a", net.vip4)
    net.assign("a", net.vip6)
    a = agents(net.host("a"))
    b = agents(net.host("b"), adopt=[f"{net.vip4}:8000=hold", "*:8002=child:nothing-of-that-name"])
    c = agents(net.host("c"), adopt=["*:8001=hold"])
    net.host("c").sysctl("net.ipv6.conf.lo.disable_ipv6", 1)
    with contextlib.ExitStack() as opened:
        for port in (8000, 8001, 8002):
            opened.enter_context(serving(net.host("a"), net.vip4, port))
        opened.enter_context(serving(net.host("a"), net.vip6, 8001))
        clients = [opened.enter_context(dial(net, port)) for port in (8000, 8001, 8002)]
        clients.append(opened.enter_context(dial(net, 8001, net.vip6)))
        first, second, third, fourth = map(name, clients)
        plan = a.tcpmig("drain", "--to", f"{b.address},{c.address}", "--dry-run")
        assert plan.code == 0, plan
        assert {each: result.get("to") for each, result in plan.results.items() if result["ok"]} == {
            first: b.address,
            second: c.address,
        }
        assert "nobody at the destination adopts it" in plan.results[third]["reason"]
        assert "no IPv6" in plan.results[fourth]["reason"]
        only_b = a.tcpmig("migrate", third, "--to", b.address, "--dry-run").results[third]
        assert "does not exist" in only_b["reason"]
        missing = a.tcpmig("migrate", first, "--to", b.address, "--steer", "vip:eth7", "--dry-run")
        assert (missing.code, "this host has no device eth7" in missing.said) == (1, True), missing
        a.host.run(["ip", "link", "add", "eth7", "type", "veth", "peer", "name", "eth8"])
        lost = a.tcpmig("migrate", first, "--to", b.address, "--steer", "vip:eth7", "--dry-run").results[first]
        assert "no device eth7" in lost["reason"]
        assert all(map(untouched, (a, b, c)))
        assert not carries(net.host("b"), net.vip4)
        assert all(says(client, b"alive") for client in clients)


def test_a_destination_without_room_or_that_is_not_there(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a")), agents(net.host("b"))
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        wish = ["migrate", name(client), "--to", b.address, "--dry-run"]
        assert a.tcpmig(*wish).results[name(client)]["ok"]
        b.stop()
        absent = a.tcpmig(*wish)
        assert absent.code == 1, absent
        assert "cannot be reached" in absent.results[name(client)]["reason"]
        assert "cannot be reached" in absent.said
        b.start(prefix=["prlimit", "--nofile=64:64"])
        full = a.tcpmig(*wish)
        assert full.code == 0, full
        assert "no descriptor left" in full.results[name(client)]["reason"]
        assert untouched(b)
        assert says(client, b"after")


class Newer(HandoffServicer):  # type: ignore[misc]
    """Of a release that speaks another version."""

    async def Check(self, request: pb.CheckRequest, context: Any) -> pb.CheckResponse:
        hello = pb.Hello(oldest_version=2, newest_version=3, host="newer", software="9.9")
        return pb.CheckResponse(hello=hello, prepared=pb.Prepared(batch=request.prepare.batch))


@contextlib.contextmanager
def stub(path: Path, servicer: Any) -> Iterator[str]:
    """An agent of another release, in this process."""
    begun, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = grpc.aio.server()
        handoff_pb2_grpc.add_HandoffServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        begun.set()
        await stop.wait()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert begun.wait(30)
        yield f"unix:{path}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.mark.parametrize(("release", "why"), [(Newer(), "speaks handoff version 2 to 3"), (HandoffServicer(), "older")])
def test_a_destination_of_another_release(
    lan: LanFactory, agents: Agents, tmp_path: Path, release: Any, why: str
) -> None:
    net = lan("client", "a")
    net.assign("a", net.vip4)
    a = agents(net.host("a"))
    with serving(net.host("a"), net.vip4), dial(net) as client, stub(tmp_path / "other", release) as other:
        assert says(client, b"before")
        plan = a.tcpmig("migrate", name(client), "--to", other, "--dry-run")
        assert plan.code == 1, plan
        assert why in plan.said
        assert says(client, b"after")


def test_ipv6_is_not_forwarded_between_agents_named_by_ipv4(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip6)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    with (
        serving(net.host("a"), net.vip6),
        dial(net, address=net.vip6) as client,
        dial(net, address=net.vip6) as other,
        net.capture("client") as wire,
    ):
        assert says(client, b"before")
        assert says(other, b"before")
        for more in (["--dry-run"], []):
            done = a.tcpmig("migrate", name(client), "--to", b.address, "--steer", "forward", *more)
            assert "the other IP version" in done.results[name(client)]["reason"]
        alone = a.tcpmig("migrate", name(client), "--to", b.address, "--steer", VIP)
        assert alone.code == 1, alone
        assert "the other IP version" in alone.results[name(client)]["reason"]
        following = a.tcpmig("migrate", "--local", f"[{net.vip6}]", "--to", b.address, "--steer", "follow")
        assert following.code == 1, following
        assert "the other IP version" in following.said
        assert says(client, b"still here")
        both = a.tcpmig("migrate", "--local", f"[{net.vip6}]", "--to", b.address, "--steer", VIP)
        assert (both.code, both.summary["done"]) == (0, 2), both
        assert says(client, b"after")
        assert says(other, b"after")
    assert not wire.rsts
