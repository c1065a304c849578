"""What strangers and broken callers do to an agent: it says so clearly, serves on, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from migrate.agent.client import Client
from migrate.agent.tls import load_channel_credentials
from migrate.agent.v1 import handoff_pb2 as handoff
from migrate.agent.v1 import migration_pb2 as migration
from migrate.agent.v1 import types_pb2 as types
from migrate.fourtuple import FourTuple
from migrate.selection import Selector
from tests.e2e.test_agent_move import ECHO, VIP, dial, name, says, serving
from tests.fix_agents import Agent, Agents
from tests.fix_netns import Lan, LanFactory
from tests.waiting import until

SEED = 20261122
SECONDS = 6  # of malformed messages
HANDOFF = "Handoff/Transfer"
FAULTS = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}  # the agent's, or ours
PYTHON = [sys.executable, "-c"]
MOST = 64 << 20  # bytes by which an agent may grow


@pytest.fixture
def scene(lan: LanFactory, agents: Agents) -> Iterator[tuple[Lan, Agent, socket.socket]]:
    """An agent, and a connection of its host that must not notice anything."""
    net = lan("client", "a")
    net.assign("a", net.vip4)
    agent = agents(net.host("a"), adopt=[ECHO])
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        yield net, agent, client
        assert says(client, b"after")
        with Client(f"unix:{agent.socket}") as caller:
            assert [each.local for each in caller.connections(Selector(connection=FourTuple.parse(name(client))))]


def memory(agent: Agent) -> int:
    """Resident bytes."""
    assert agent.process is not None
    with open(f"/proc/{agent.process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# ---- HTTP/2 by hand: RFC 9113 frames, HPACK literals without an index


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def headers(path: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "a"}
    fields |= {"content-type": "application/grpc"}
    return b"".join(b"\0" + bytes((len(k),)) + k.encode() + bytes((len(v),)) + v.encode() for k, v in fields.items())


def raw_call(agent: Agent, path: str) -> socket.socket:
    """A call that has begun, on the agent's unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(agent.socket))
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, headers(path)))
    return sock


def test_a_message_of_1_gib_is_refused_before_it_is_taken_in(scene: tuple[Lan, Agent, socket.socket]) -> None:
    _, agent, _ = scene
    assert agent.process is not None
    before = memory(agent)
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"unix:{agent.socket}", options=options) as channel:
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/tcpmig.v1.Migration/Restore")
        with pytest.raises(grpc.RpcError, match="larger than max"):
            list(method(iter([bytes(1 << 30)]), timeout=60))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{agent.process.pid}/status").read_text())
    assert peak is not None
    assert int(peak[1]) * 1024 - before < MOST


def test_garbage_and_half_open_connections(scene: tuple[Lan, Agent, socket.socket]) -> None:
    net, agent, client = scene
    noise = random.Random(SEED)
    before = memory(agent)
    with contextlib.ExitStack() as opened, net.host("client").entered():
        for number in range(60):
            sock = opened.enter_context(socket.create_connection((net.host("a").ip4, 7420), timeout=10))
            with contextlib.suppress(ConnectionError):
                sock.sendall(
                    (b"", b"\x16\x03\x01\x02\x00\x01", noise.randbytes(4096), b"GET / HTTP/1.1\r\n\r\n")[number % 4]
                )
        for _ in range(20):
            opened.enter_context(raw_call(agent, "/tcpmig.v1.Migration/Dump"))  # and not a word
        begun = time.monotonic()
        assert says(client, b"meanwhile")
        with Client(f"unix:{agent.socket}") as caller:
            assert list(caller.connections())
        assert time.monotonic() - begun < 10
    assert memory(agent) - before < MOST


def test_a_caller_whose_link_is_cut_in_the_middle_of_a_dump(
    lan: LanFactory, agents: Agents, certificates: Path
) -> None:
    net = lan("client", "a", "operator")
    net.assign("a", net.vip4)
    agent = agents(net.host("a"), adopt=[ECHO])
    program = (
        "import sys, time; from pathlib import Path; from migrate.agent.client import Client;"
        "from migrate.fourtuple import FourTuple; from migrate.selection import Selector\n"
        f"client = Client({agent.address!r}, tls=Path({str(certificates)!r}))\n"
        "def store(_): print('frozen', flush=True); time.sleep(60)\n"
        "list(client.dump(Selector(connection=FourTuple.parse(sys.argv[1])), store))"
    )
    with serving(net.host("a"), net.vip4), dial(net) as client:
        assert says(client, b"before")
        caller = net.host("operator").popen(
            [*PYTHON, program, name(client)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"frozen\n"
        assert agent.rows() == [("source", "OFFERED")]
        client.settimeout(40)
        net.host("operator").run(["ip", "link", "set", net.host("operator").dev, "down"])
        client.sendall(b"after")
        assert client.recv(5, socket.MSG_WAITALL) == b"after"  # in twice the keepalive time
        until(agent.settled, what="it is thawed")
        caller.kill()
        caller.wait()


def test_slow_readers_stop_nobody(lan: LanFactory, agents: Agents) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    a, b = agents(net.host("a"), adopt=[ECHO]), agents(net.host("b"), adopt=[ECHO])
    before = memory(a)
    with serving(net.host("a"), net.vip4), dial(net) as client, contextlib.ExitStack() as opened:
        assert says(client, b"before")
        for _ in range(10):
            sock = opened.enter_context(raw_call(a, "/tcpmig.v1.Migration/Watch"))  # and reads nothing
            sock.sendall(frame(0, 1, 1, bytes(5)))
        drain = migration.DrainRequest(destinations=[b.address], dry_run=True).SerializeToString()
        for _ in range(10):  # the progress of a move likewise
            sock = opened.enter_context(raw_call(a, "/tcpmig.v1.Migration/Drain"))
            sock.sendall(frame(0, 1, 1, b"\0" + len(drain).to_bytes(4) + drain))
        for source, destination in ((a, b), (b, a)) * 2:
            with Client(f"unix:{source.socket}") as caller:
                only = Selector(connection=FourTuple.parse(name(client)))
                *_, last = caller.migrate(only, destination.address, steer=VIP)
            assert last.summary.done == 1
            until(lambda: a.settled() and b.settled())
            assert says(client, b"after")
    assert memory(a) - before < MOST


# ---- malformed messages


def samples(client: socket.socket) -> dict[str, list[Message]]:
    """Sound messages, by call; the connection they name is there, but nobody stores its record."""
    selector = types.Selector(connection=name(client))
    batch, id = bytes(16), b"i" * 16
    listed = handoff.ConnectionList(ids=id, epochs=[1], four_tuples=bytes(36))
    one = migration.ConnectionEpoch(id=id, epoch=1)
    piece = handoff.Piece(lengths=[4], data=b"data", last=True)
    start = migration.DumpStart(selector=selector, store_within=Duration(nanos=200_000_000), hold=Duration())
    return {
        "Migration/ListConnections": [migration.ListConnectionsRequest(selector=selector)],
        "Migration/Dump": [
            migration.DumpRequest(start=start),
            migration.DumpRequest(start=migration.DumpStart(selector=selector, leave_running=True)),
            migration.DumpRequest(stored=migration.DumpStored(chunk=7)),
        ],
        "Migration/Restore": [migration.RestoreRequest(records=migration.RecordChunk(chunk=1, records=b"\x8aICI\1\1"))],
        "Migration/Migrate": [migration.MigrateRequest(selector=selector, destination="unix:/nowhere", dry_run=True)],
        "Migration/Drain": [migration.DrainRequest(destinations=["unix:/nowhere"], dry_run=True)],
        "Migration/Abort": [migration.AbortRequest(move_id="none")],
        "Migration/Resolve": [
            migration.ResolveRequest(ask=migration.AskVerdicts(connections=[one])),
            migration.ResolveRequest(
                settle=migration.SettleBatch(batch="00" * 16, verdict=migration.VERDICT_COMMITTED)
            ),
        ],
        "Handoff/Check": [
            handoff.CheckRequest(
                hello=handoff.Hello(oldest_version=1, newest_version=1),
                prepare=handoff.Prepare(batch=batch, connections=listed, patience_seconds=0.5, steer="vip:x"),
            )
        ],
        "Handoff/Transfer": [
            handoff.TransferRequest(hello=handoff.Hello(oldest_version=1, newest_version=1, host="fuzz")),
            handoff.TransferRequest(prepare=handoff.Prepare(batch=batch, connections=listed, patience_seconds=0.5)),
            handoff.TransferRequest(offer=handoff.Offer(batch=batch, connections=listed, records=piece)),
            handoff.TransferRequest(query=handoff.Query(batch=batch, connections=listed)),
            handoff.TransferRequest(released=handoff.Released(batch=batch, kept=piece)),
            handoff.TransferRequest(abort=handoff.AbortBatch(batch=batch)),
        ],
    }


def mutated(data: bytes, chance: random.Random) -> bytes:
    """As sound as before, or with a few bytes changed, cut, doubled or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + chance.randrange(8)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randrange(1, 8))
            case 3:
                changed[at:at] = changed[max(0, at - chance.randrange(1, 20)) : at]
            case 4:
                changed[at : at + 1] = chance.choice((b"\xff", b"\0", b"\x80\x80\x80\x80\x10", b"\x7f"))
    return bytes(changed)


def ends(channel: grpc.Channel, call: str, messages: Sequence[bytes]) -> grpc.StatusCode:
    """How a call with these messages ends, within a moment."""
    method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/tcpmig.v1.{call}")
    said = method(iter(messages), timeout=0.3)
    with contextlib.suppress(grpc.RpcError):
        for _ in said:
            pass
    code: grpc.StatusCode = said.code()
    return code


def test_malformed_messages(lan: LanFactory, agents: Agents, certificates: Path) -> None:
    net = lan("client", "a")
    net.assign("a", net.vip4)
    agent = agents(net.host("a"), adopt=[ECHO])
    chance = random.Random(SEED)
    codes: Counter[grpc.StatusCode] = Counter()
    with serving(net.host("a"), net.vip4), dial(net) as client, contextlib.ExitStack() as opened:
        opened.enter_context(net.host("client").entered())
        assert says(client, b"before")
        as_agent = load_channel_credentials(certificates, "agent")
        operator = opened.enter_context(grpc.insecure_channel(f"unix:{agent.socket}"))
        peer = opened.enter_context(grpc.secure_channel(agent.address, as_agent))
        known = samples(client)
        before, deadline = memory(agent), time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            call = chance.choice(list(known))
            chosen = [chance.choice(known[call]) for _ in range(chance.randrange(4))]
            messages = [mutated(message.SerializeToString(), chance) for message in chosen]
            if call == HANDOFF and chance.random() < 0.8:
                messages.insert(0, known[call][0].SerializeToString())
            code = ends(peer if call.startswith("Handoff") else operator, call, messages)
            assert code not in FAULTS, (call, messages)
            codes[code] += 1
        until(agent.settled, what="nothing is left of it")
        assert says(client, b"after")
        assert memory(agent) - before < MOST
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 5, codes
    assert codes[grpc.StatusCode.OK] > 5, codes
    assert codes.total() > 40, codes
