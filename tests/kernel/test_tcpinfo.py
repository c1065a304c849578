"""kernel/tcpinfo.py: each field where the kernel writes it."""

from __future__ import annotations

import ctypes
import re
import socket
import sys
from pathlib import Path

import pytest

from migrate.kernel import tcpinfo
from tests.fix_netns import LanFactory
from tests.peers import connect
from tests.waiting import until

HEADER = Path("/usr/include/linux/tcp.h")
TYPES = {"__u8": ctypes.c_uint8, "__u16": ctypes.c_uint16, "__u32": ctypes.c_uint32, "__u64": ctypes.c_uint64}


def test_the_fields_are_those_of_the_header() -> None:
    # The header of an older kernel has fewer of them.
    text = HEADER.read_text()
    body = re.sub(r"/\*.*?\*/", "", text[text.index("struct tcp_info {") :], flags=re.DOTALL)
    found = re.findall(r"(__u\d+)\s+tcpi_(\w+)([^;]*);", body[: body.index("};")])
    found = [(kind, {"snd_wscale": "wscales", "delivery_rate_app_limited": "flags"}.get(n, n)) for kind, n, _ in found]
    assert len(found) >= 54
    assert [name for _, name in found] == list(tcpinfo.TcpInfo._fields[: len(found)])
    layout = type("layout", (ctypes.Structure,), {"_fields_": [(name, TYPES[kind]) for kind, name in found]})
    for number, (_, name) in enumerate(found):
        assert getattr(layout, name).offset == tcpinfo._OFFSETS[number]


def test_of_a_connection(lan: LanFactory) -> None:
    net = lan("client", "a")
    client, server = connect(net.host("client"), net.host("a"))
    with client, server:
        client.sendall(b"x" * 5000)
        assert until(lambda: len(server.recv(5000, socket.MSG_PEEK)) == 5000)
        server.send(b"y" * 10)
        assert client.recv(10)

        def told(sock: socket.socket) -> tcpinfo.TcpInfo:
            return tcpinfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcpinfo.SIZE))

        until(lambda: told(server).unacked == 0)
        info = told(client)
    assert (info.state, info.options & 7, info.advmss, info.pmtu) == (1, 7, 1448, 1500)
    assert (info.bytes_sent, info.bytes_acked, info.bytes_received) == (5000, 5001, 10)
    assert (info.notsent_bytes, info.unacked, info.total_retrans) == (0, 0, 0)
    assert info.snd_cwnd >= 10
    assert info.snd_wnd > 50_000
    assert 0 < info.min_rtt <= info.rtt < 1_000_000


def test_the_scales_are_ours_and_the_peers(lan: LanFactory) -> None:
    net = lan("client", "a")

    def narrow(sock: socket.socket) -> None:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # so that it asks for a smaller scale

    client, server = connect(net.host("client"), net.host("a"), prepare=narrow)
    with client, server:
        mine, peers = (
            tcpinfo.scales(tcpinfo.parse(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcpinfo.SIZE)).wscales)
            for each in (client, server)
        )
    assert mine[0] == peers[1] < mine[1] == peers[0]


def test_scales_follow_the_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "little")
    assert tcpinfo.scales(0x7A) == (10, 7)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert tcpinfo.scales(0x7A) == (7, 10)


RAW = bytes(range(232))


def test_older_and_newer_kernels() -> None:
    short = tcpinfo.parse(RAW)
    assert short.snd_wnd == int.from_bytes(RAW[228:232], sys.byteorder)
    assert set(short[tcpinfo.TcpInfo._fields.index("rcv_wnd") :]) == {0}
    assert tcpinfo.parse(RAW + bytes(1000)) == short
    assert set(tcpinfo.parse(b"")) == {0}


def test_reader() -> None:
    whole = tcpinfo.parse(RAW)
    names = [name for name in tcpinfo.TcpInfo._fields if tcpinfo.TcpInfo._fields.index(name) % 3 == 0][:15]
    assert tcpinfo.reader(*names)(RAW) == tuple(getattr(whole, name) for name in names)
    assert tcpinfo.reader("snd_wnd")(RAW) == (whole.snd_wnd,)


@pytest.mark.parametrize("names", [("rtt", "state"), ("rcv_wnd",), ("state", "accecn_opt_seen")])
def test_reader_refuses_what_it_cannot_read_everywhere(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="not in the order of struct tcp_info, or not on every kernel"):
        tcpinfo.reader(*names)
