"""kernel/probe.py: what it says here, as an ordinary user, in a user namespace; and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from migrate.errors import HostError, KernelError, PrivilegeError
from migrate.kernel import probe
from tests.fix_netns import Host, LanFactory

NEEDED = {"TCP_REPAIR", "TCP_REPAIR_WINDOW", "sock_diag", "nftables", "NFLOG", "raw sockets"}
# What needs a privilege of the user namespace that owns the network namespace, or of the first one.
OF_THE_NAMESPACE = NEEDED - {"sock_diag"} | {
    "microsecond timestamps",
    "AF_PACKET",
    "IP_TRANSPARENT",
    "netdev fwd",
    "network namespaces",
}
OF_THE_FIRST = {"BPF", "SO_SNDBUFFORCE"}

PROGRAM = """
import json, os, sys
from migrate.kernel import probe
os.setresuid(*3 * [int(sys.argv[1])])
print(json.dumps([each._asdict() for each in probe.capabilities()]))
"""


@pytest.fixture
def host(lan: LanFactory) -> Host:
    return lan("a").host("a")


def capabilities(host: Host, *wrapper: str, user: int = 0) -> dict[str, probe.Capability]:
    done = host.run([*wrapper, sys.executable, "-W", "error", "-c", PROGRAM, str(user)])
    assert done.stderr == ""
    return {each["name"]: probe.Capability(**each) for each in json.loads(done.stdout)}


def here(host: Host) -> dict[str, probe.Capability]:
    with host.entered():
        return {each.name: each for each in probe.capabilities()}


def test_root_can(host: Host) -> None:
    found = here(host)
    assert {name for name, each in found.items() if each.needed} == NEEDED
    for name in NEEDED | OF_THE_NAMESPACE | OF_THE_FIRST | {"pidfd_getfd"}:
        assert found[name].ok, found[name]
    assert all(bool(each.remedy) != each.ok and each.detail for each in found.values())
    with host.entered():
        for name in NEEDED:
            probe.require(name)


def test_an_ordinary_user_cannot_and_is_told_why(host: Host) -> None:
    found = capabilities(host, user=12345)
    missing = {name for name, each in found.items() if each.detail == f"{name}: not permitted"}
    assert missing == OF_THE_NAMESPACE | OF_THE_FIRST
    for name in missing:
        assert not found[name].ok
        assert found[name].remedy.startswith("run as root, or give this process CAP_")
    assert found["sock_diag"].ok
    assert found["pidfd_getfd"].detail.endswith(": of this user's processes")


def test_in_a_user_namespace(host: Host) -> None:
    found = capabilities(host, "unshare", "-Urn", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    for name in OF_THE_NAMESPACE:
        assert found[name].ok, found[name]
    assert not found["SO_SNDBUFFORCE"].ok
    assert "CAP_NET_ADMIN in the first user namespace" in found["SO_SNDBUFFORCE"].remedy


def test_require_without_the_privilege(host: Host) -> None:
    program = (
        "import os; from migrate.kernel import probe\nos.setresuid(12345, 12345, 12345)\nprobe.require('TCP_REPAIR')"
    )
    done = host.run([sys.executable, "-c", program], check=False)
    assert done.stderr.splitlines()[-1] == (
        f"{PrivilegeError.__module__}.PrivilegeError: TCP_REPAIR: not permitted "
        "(run as root, or give this process CAP_NET_ADMIN)"
    )


def test_it_leaves_nothing_behind(host: Host) -> None:
    here(host)  # what is loaded once
    tcpdump = ["tcpdump", "-i", "any", "-n", "-l", "-U"]
    with host.popen(tcpdump, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as wire:
        assert wire.stderr
        assert wire.stdout
        assert any(b"listening" in line for line in wire.stderr)
        before = descriptors_and_children()
        here(host)
        assert descriptors_and_children() == before
        host.run(["ping", "-c1", "-W5", host.ip4])  # the last that is captured
        seen = []
        for line in wire.stdout:
            seen.append(line)
            if b"echo reply" in line:
                break
        wire.terminate()
    assert not [line for line in seen if b"Flags [" in line]
    assert host.run(["nft", "list", "ruleset"]).stdout == ""
    assert host.run(["ss", "-Htan"]).stdout == ""
    assert host.run(["cat", "/proc/net/netfilter/nfnetlink_log"]).stdout == ""


def descriptors_and_children() -> tuple[list[str], str]:
    command = ["ps", "--ppid", str(os.getpid()), "-o", "comm="]
    children = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return sorted(os.listdir("/proc/self/fd")), children


def test_loopback_never_up(host: Host) -> None:
    found = capabilities(host, "unshare", "-n")["TCP_REPAIR_WINDOW"]
    assert not found.ok
    assert found.detail == "127.0.0.1 cannot be used: lo is down"
    assert found.remedy == "ip link set lo up"


def test_a_strict_conntrack(host: Host) -> None:
    assert here(host)["conntrack"].ok
    host.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    found = here(host)["conntrack"]
    assert (found.ok, found.remedy) == (False, "sysctl net.netfilter.nf_conntrack_tcp_loose=1")


def test_few_descriptors(host: Host) -> None:
    program = (
        "from migrate.kernel import probe; print({each.name: each for each in probe.capabilities()}['open files'])"
    )
    done = host.run(["prlimit", "--nofile=1000:1000", sys.executable, "-c", program])
    (line,) = (line for line in done.stdout.splitlines() if "'open files'" in line)
    assert "ok=False" in line
    assert "a process can have 1000 at most" in line
    assert f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]} at most" in here(host)["open files"].detail


def test_what_the_kernel_lacks_has_a_remedy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(92, "Protocol not available")

    def lack() -> None:
        raise HostError("no such thing here", hint="build it")

    def fail() -> None:
        raise KernelError("trying", 12)

    names = ("refuses", "lacks", "fails")
    probes = [
        probe._Probe(name, True, attempt, "a use", "boot another")
        for name, attempt in zip(names, (refuse, lack, fail), strict=True)
    ]
    monkeypatch.setattr(probe, "_PROBES", probes)
    assert probe.capabilities() == [
        probe.Capability("refuses", False, True, "refuses: Protocol not available [ENOPROTOOPT]", "boot another"),
        probe.Capability("lacks", False, True, "no such thing here", "build it"),
        probe.Capability("fails", False, True, "trying: Cannot allocate memory [ENOMEM]", "boot another"),
    ]
    for name in names:
        with pytest.raises(HostError) as caught:
            probe.require(name)
        assert not isinstance(caught.value, PrivilegeError)
        assert caught.value.hint
