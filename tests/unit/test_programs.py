"""The fixture of real programs: they serve what they should, and nothing of them stays."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.fix_netns import LanFactory
from tests.fix_programs import Content, Program, Programs
from tests.waiting import until


def test_nginx_serves_the_same_content_on_two_hosts(lan: LanFactory, programs: Programs, content: Content) -> None:
    net = lan("client", "a", "b")
    servers = {host: programs.nginx(net.host(host), content, workers=2) for host in ("a", "b")}
    for host, nginx in servers.items():
        assert len(nginx.workers()) == 2
        for address in (net.host(host).ip4, f"[{net.host(host).ip6}]"):
            for name, expected in list(content.digests.items())[:3]:
                body = net.host("client").run(["curl", "-sf", f"http://{address}/{name}"], text=False).stdout
                assert hashlib.sha256(body).hexdigest() == expected  # type: ignore[arg-type]
        assert nginx.errors() == []
    processes = [pid for nginx in servers.values() for pid in (nginx.pid, *nginx.workers())]
    programs.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_redis_answers(lan: LanFactory, programs: Programs) -> None:
    net = lan("client", "a")
    programs.redis(net.host("a"))
    assert net.host("client").run(["redis-cli", "-h", net.host("a").ip6, "ping"]).stdout == "PONG\n"


def test_socat_is_ready_when_it_listens(lan: LanFactory, programs: Programs) -> None:
    net = lan("client", "a")
    programs.start(net.host("a"), ["socat", "TCP-LISTEN:7000,fork,reuseaddr", "EXEC:cat"], port=7000)
    there = f"TCP:{net.host('a').ip4}:7000"
    assert net.host("client").run(["socat", "-", there], input="hello").stdout == "hello"


def test_a_program_that_does_not_start_says_why(lan: LanFactory, programs: Programs) -> None:
    a = lan("a").host("a")
    with pytest.raises(AssertionError, match="NONSENSE"):
        programs.start(a, ["socat", "NONSENSE:7000", "-"], port=7000)


def test_a_process_left_behind_is_killed_and_told(
    lan: LanFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "grace", 0.1)
    programs = Programs(tmp_path / "programs")
    program = programs.start(lan("a").host("a"), ["sh", "-c", "(trap '' TERM; exec sleep 60) & echo $!"])
    program.process.wait()
    until(lambda: program.log.endswith("\n"))
    left = Path(f"/proc/{int(program.log)}/stat")
    until(lambda: "(sleep)" in left.read_text())
    with pytest.raises(AssertionError, match=r"left .*\(sleep\).* behind"):
        programs.close()
    until(lambda: not left.exists() or " Z " in left.read_text())


def test_content_is_a_function_of_its_seed(tmp_path: Path) -> None:
    made = [Content.make(tmp_path / str(i), files=8, seed=seed).digests for i, seed in enumerate((1, 1, 2))]
    assert made[0] == made[1] != made[2]
