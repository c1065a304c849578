"""An unmodified program on both hosts: nginx is emptied at quiet points and refilled while its clients go on asking."""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
from collections.abc import Sequence
from functools import partial

from tests.e2e.test_agent_move import VIP
from tests.fix_agents import Agents
from tests.fix_netns import Host, LanFactory
from tests.fix_programs import Content, Programs
from tests.waiting import until

CLIENTS = 60


class Visitor(threading.Thread):
    """A keep-alive HTTP client that asks again and again over one connection."""

    def __init__(self, host: Host, address: str, port: int, path: str, digest: str) -> None:
        super().__init__(daemon=True)
        with host.entered():
            self._connection = http.client.HTTPConnection(address, port, timeout=20)
            self._connection.connect()
        self._connection.auto_open = 0  # never a second connection
        self._path, self._digest = path, digest
        self.answers = 0
        self.error: BaseException | None = None
        self.over = False

    def run(self) -> None:
        try:
            while not self.over:
                self._connection.request("GET", self._path)
                body = self._connection.getresponse().read()
                assert hashlib.sha256(body).hexdigest() == self._digest
                self.answers += 1
                time.sleep(0.02)
        except BaseException as error:
            self.error = error
        finally:
            self._connection.close()


def _went_on(visitors: Sequence[Visitor], before: Sequence[int]) -> bool:
    """Each has had more answers since, or says what is wrong."""
    return all(v.answers > count + 2 or v.error is not None for v, count in zip(visitors, before, strict=True))


def test_nginx_is_drained_and_filled_again(
    lan: LanFactory, agents: Agents, programs: Programs, content: Content
) -> None:
    net = lan("client", "a", "b")
    net.assign("a", net.vip4)
    servers = {name: programs.nginx(net.host(name), content) for name in "ab"}
    a, b = (agents(net.host(name), adopt=["*:80=relay:127.0.0.1:80"]) for name in "ab")
    file, digest = next((name, each) for name, each in content.digests.items() if name != "0.bin")
    visitors = [Visitor(net.host("client"), net.vip4, 80, f"/{file}", digest) for _ in range(CLIENTS)]
    with net.capture("client") as wire:
        for visitor in visitors:
            visitor.start()
        for source, destination in ((a, b), (b, a)):
            chosen = ["migrate", "--local", f"{net.vip4}:80", "--state", "ESTABLISHED"]
            done = source.tcpmig(*chosen, "--to", destination.address, "--steer", VIP, "--when-quiet", "20")
            assert (done.code, done.summary["done"]) == (0, CLIENTS), [
                each for each in done.objects if not each.get("ok")
            ]
            until(partial(_went_on, visitors, [visitor.answers for visitor in visitors]))
        for visitor in visitors:
            visitor.over = True
        for visitor in visitors:
            visitor.join(20)
    assert not [visitor.error for visitor in visitors if visitor.error]
    assert not wire.rsts
    # What left is over for the server that had it: it sees ECONNABORTED, and nothing else.
    complaints = servers["a"].errors() + servers["b"].errors()
    assert not [each for each in complaints if "103: Software caused connection abort" not in each]
