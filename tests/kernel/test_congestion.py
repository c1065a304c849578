"""A restored connection has the congestion window and the threshold of its record, and nothing else changes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrate
from migrate.errors import HostError, Refused
from migrate.kernel import sockopt, tcpinfo
from migrate.kernel.congestion import Congestion
from migrate.pathstate import PathState
from migrate.restore import Restored
from tests.fix_netns import LanFactory
from tests.kernel.pairs import KINDS, pair
from tests.waiting import until

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
MAKE = "import sys, time; from migrate.kernel.congestion import Congestion; made = Congestion(); print(made.name)"


def windows(sock: socket.socket) -> tuple[int, int]:
    info = tcpinfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    return info.snd_cwnd, info.snd_ssthresh


def known() -> list[str]:
    return AVAILABLE.read_text().split()


@pytest.fixture(scope="module")
def congestion() -> Iterator[Congestion]:
    with Congestion() as made:
        yield made


@pytest.fixture
def local() -> Iterator[socket.socket]:
    """A connection over lo."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # BBR keeps no threshold
        yield sock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("control", ["reno", "cubic"])
def test_a_restored_connection_goes_on_with_both(lan: LanFactory, kind: str, control: str) -> None:
    net = lan("client", "a")
    a = net.host("a")
    with PathState() as paths, pair(net.host("client"), a, kind) as (client, server, flow):
        before = windows(server)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        with migrate.hold([flow], netns=a.netns) as hold:
            record = migrate.dump(server)
            migrate.release(server)
            record.cwnd, record.ssthresh, record.max_window = 321, 123, 1 << 20
            with a.entered():
                restored = migrate.restore(record, activate=False)
            assert isinstance(restored, Restored)
            paths.carry(restored)
            hold.replay()
            migrate.activate(restored)
        with restored:
            assert windows(restored) == (321, 123) != before
            assert sockopt.congestion(restored) == control
            assert not restored.unset
            sending = threading.Thread(target=restored.sendall, args=[bytes(1_000_000)])
            sending.start()
            with client.makefile("rb") as stream:
                assert len(stream.read(1_000_000)) == 1_000_000
            sending.join()
            assert windows(restored)[0] >= 321
            with pytest.raises(Refused):
                paths.carry(restored)


def test_the_record_of_a_dump_has_them(congestion: Congestion, local: socket.socket) -> None:
    congestion.set(local, 55, 44)
    record = migrate.dump(local)
    assert (record.cwnd, record.ssthresh) == (55, 44)
    assert record.congestion == sockopt.congestion(local) != congestion.name


def test_other_connections_to_the_peer_are_as_they_were(congestion: Congestion, local: socket.socket) -> None:
    with socket.create_connection(local.getpeername()) as older:
        before = windows(older)
        congestion.set(local, 300, 200)
        with socket.create_connection(local.getpeername()) as younger:
            assert windows(older) == before == windows(younger)


def test_threads_do_not_mix_their_values(congestion: Congestion, local: socket.socket) -> None:
    sockets = [socket.create_connection(local.getpeername()) for _ in range(8)]
    for sock in sockets:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    wrong: list[tuple[int, int]] = []

    def work(number: int, sock: socket.socket) -> None:
        for _ in range(300):
            congestion.set(sock, 100 + number, 500 + number)
            if windows(sock) != (100 + number, 500 + number):
                wrong.append(windows(sock))

    threads = [threading.Thread(target=work, args=each) for each in enumerate(sockets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sock in sockets:
        sock.close()
    assert not wrong


def test_it_is_gone_when_closed() -> None:
    descriptors = os.listdir("/proc/self/fd")
    with Congestion() as made:
        assert made.name in known()
        made.close()
    until(lambda: made.name not in known())
    assert os.listdir("/proc/self/fd") == descriptors


def test_it_is_gone_when_its_process_is_killed() -> None:
    program = [sys.executable, "-c", f"{MAKE}; sys.stdout.flush(); time.sleep(60)"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        assert name in known()
        process.kill()
    until(lambda: name not in known())


def test_a_window_that_cannot_be_set_is_named(lan: LanFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    net = lan("client", "a")
    a = net.host("a")
    with PathState() as paths, pair(net.host("client"), a, "IPv4") as (_, server, _):
        record = migrate.dump(server)
        record.cwnd = 200  # an idle connection's needs nothing
        migrate.release(server)
        monkeypatch.setattr(paths._congestion, "name", "none_such")
        with a.entered(), migrate.restore(record, activate=False) as restored:
            assert isinstance(restored, Restored)
            paths.carry(restored)
            assert restored.unset == ["the congestion window"]


def test_without_the_privilege() -> None:
    done = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-c", MAKE], capture_output=True, text=True, timeout=30, check=False
    )
    assert "PrivilegeError" in done.stderr
    assert "CAP_BPF" in done.stderr


def test_a_kernel_without_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise FileNotFoundError(2, "No such file", "/sys/kernel/btf/vmlinux")

    monkeypatch.setattr("migrate.kernel.congestion.Btf", none)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match="BTF"):
        Congestion()
    assert os.listdir("/proc/self/fd") == descriptors
