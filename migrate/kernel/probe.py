"""What this host can do, found out by doing it: no kernel version is ever asked for.

Each probe works in this process's network namespace with sockets of its own, sends no packet and leaves nothing behind:
what it makes in nftables it removes in the same transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from migrate.errors import Error, HostError, NotFound, PrivilegeError, from_oserror
from migrate.kernel import bpf, diag, netns, nflog, nfnetlink, pidfd, sockopt, tcpinfo, uapi
from migrate.kernel import nf_tables as nf
from migrate.kernel.batch import Batch
from migrate.tcpstate import TcpState

__all__ = ["Capability", "capabilities", "require"]

TCP_MD5SIG, TCP_AO_INFO = 14, 40  # include/uapi/linux/tcp.h
MD5SIG_BYTES, AO_INFO_BYTES = 216, 104  # of struct tcp_md5sig and struct tcp_ao_info_opt
NO_DESCRIPTOR = 0x7FFFFFFF  # higher than any limit allows
MANY_DESCRIPTORS = 16384
NOBODY = 65534  # an ordinary user, whatever this process is
TABLE = "tcpmig-probe"  # never seen by anybody: no transaction ends with it


class Capability(NamedTuple):
    """One thing that this host can do, or cannot."""

    name: str
    ok: bool
    needed: bool  # no connection moves without it; of the others ``detail`` says what they are good for
    detail: str  # what it is good for, or why it does not work
    remedy: str  # one sentence: what would change that; empty if it works


class _Probe(NamedTuple):
    name: str
    needed: bool
    attempt: Callable[[], str | None]  # raises OSError or Error if it does not work; may return a remark
    use: str
    remedy: str  # where this process lacks no privilege, but the kernel the thing
    privilege: str = "CAP_NET_ADMIN"


def capabilities() -> list[Capability]:
    """Try everything; takes some hundredths of a second. Never raises."""
    found = []
    for probe in _PROBES:
        try:
            found.append(Capability(probe.name, True, probe.needed, _attempt(probe), ""))
        except HostError as error:
            found.append(Capability(probe.name, False, probe.needed, error.what, error.hint or probe.remedy))
    return found


def require(name: str) -> None:
    """Raise HostError, or PrivilegeError, with the remedy, unless this host can do the thing of that name."""
    _attempt({probe.name: probe for probe in _PROBES}[name])


def _attempt(probe: _Probe) -> str:
    try:
        remark = probe.attempt()
    except OSError as failure:
        error = from_oserror(probe.name, failure)
    except Error as failure:
        error = failure
    else:
        return f"{probe.use}: {remark}" if remark else probe.use
    if isinstance(error, PrivilegeError):
        raise PrivilegeError(
            f"{probe.name}: not permitted", hint=f"run as root, or give this process {probe.privilege}"
        )
    raise error if isinstance(error, HostError) else HostError(error.what, hint=probe.remedy)


# Connections and their owners


def _repair() -> None:
    with socket.socket() as sock:
        sockopt.enter_repair(sock)


@contextlib.contextmanager
def _rebuilt() -> Iterator[socket.socket]:
    # A connection from loopback to loopback that its peer never hears of; in repair mode its end is as silent.
    with socket.socket() as sock:
        sockopt.enter_repair(sock)
        try:
            sock.bind(("127.0.0.1", 0))
            sock.connect(("127.0.0.1", 9))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENETUNREACH):
                raise HostError("127.0.0.1 cannot be used: lo is down", hint="ip link set lo up") from None
            raise
        sockopt.set_repair_options(sock, sockopt.repair_options(1460, 7, 7, sack=True, timestamps=True))
        yield sock


def _window() -> None:
    with _rebuilt() as sock:
        sockopt.set_window(sock, (0, 65535, 65535, 65535, 0))


def _microseconds() -> None:
    with _rebuilt() as sock:
        sockopt.set_timestamp(sock, 1)
        if not tcpinfo.parse(sockopt.tcp_info(sock)).options & uapi.TCPI_OPT_USEC_TS:
            raise HostError("timestamps count milliseconds only", hint="boot Linux 6.7 or newer")


def _sock_diag() -> None:
    diag.list_connections(states=[TcpState.SYN_SENT])


def _pidfd_getfd() -> str | None:
    # The kernel asks for the permission before it looks for the descriptor, so none needs to be taken.
    process, stranger = _ordinary(["cat"], stdin=subprocess.PIPE)
    with process:  # whose end closes its standard input, and so ends it
        pidfd_ = pidfd.open_process(process.pid)
        try:
            os.close(pidfd.get_fd(pidfd_, NO_DESCRIPTOR))
        except NotFound:
            return None if stranger else "of this user's processes"
        finally:
            os.close(pidfd_)
    return None


def _ordinary(command: list[str], **more: Any) -> tuple[subprocess.Popen[str], bool]:
    # A process of an ordinary user; the bool says whether that is another one than this process's.
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # root of a user namespace in which nobody else exists
            return subprocess.Popen(command, user=NOBODY, group=NOBODY, extra_groups=[], text=True, **more), True
    return subprocess.Popen(command, text=True, **more), False


def _descriptors() -> str:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < MANY_DESCRIPTORS:
        raise HostError(f"a process can have {most} at most", hint="ulimit -Hn, or LimitNOFILE= in the systemd unit")
    return f"{most} at most"


def _setns() -> None:
    with netns.entered(netns.OWN):
        pass


# Isolation: each in a transaction that also takes back what it makes


def _nftables() -> None:
    held, inet = nf.Place(nf.NFPROTO_INET, TABLE, "held"), (nf.NFPROTO_INET, TABLE)
    key = nf.concatenated(nf.TYPE_IPADDR, nf.TYPE_INET_SERVICE), 8
    match = (
        nf.payload(nf.NETWORK_HEADER, 12, 4, nf.register(0)),
        nf.payload(nf.TRANSPORT_HEADER, 0, 2, nf.register(1)),
        nf.lookup("held", nf.register(0)),
    )
    requests = [nf.new_set(held, 1, key=key, timeouts=True)]
    for chain, hook in (("arriving", nf.NF_INET_PRE_ROUTING), ("departing", nf.NF_INET_LOCAL_OUT)):
        requests.append(nf.new_chain(*inet, chain, hook=hook, priority=-300))
        requests.append(nf.new_rule(*inet, chain, *match, nf.verdict(nf.NF_DROP)))
    _transaction(nf.NFPROTO_INET, *requests, *nf.add_elements(held, [bytes(8)], timeout=1000))


def _nflog() -> None:
    with nflog.Listener() as listener:
        inet = nf.NFPROTO_INET, TABLE, "arriving"
        chain = nf.new_chain(*inet, hook=nf.NF_INET_PRE_ROUTING, priority=-300)
        _transaction(nf.NFPROTO_INET, chain, nf.new_rule(*inet, nf.log(listener.group), nf.verdict(nf.NF_DROP)))


def _forward() -> None:
    netdev = nf.NFPROTO_NETDEV, TABLE, "ingress"
    rule = (
        nf.immediate(nf.register(0), socket.if_nametoindex("lo").to_bytes(4, sys.byteorder)),
        nf.immediate(nf.register(1), bytes(4)),
        nf.forward(nf.register(0), nf.register(1), nf.NFPROTO_IPV4),
    )
    chain = nf.new_chain(*netdev, hook=nf.NF_NETDEV_INGRESS, priority=-500, device="lo")
    _transaction(nf.NFPROTO_NETDEV, chain, nf.new_rule(*netdev, *rule))


def _transaction(family: int, *requests: bytes) -> None:
    made, gone = nf.new_table(family, TABLE, "", exclusive=True), nf.del_table(family, TABLE)
    with contextlib.closing(nfnetlink.Netfilter()) as netfilter:
        netfilter.commit("nftables", [made, *requests, gone])


def _conntrack() -> str:
    loose = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
    if not loose.exists():
        return "not in use"
    if loose.read_text().strip() == "0":
        raise HostError(
            "conntrack takes connections that move here for invalid",
            hint="sysctl net.netfilter.nf_conntrack_tcp_loose=1",
        )
    return "picks up connections in mid-stream"


# Sockets


def _raw() -> None:
    for family in _families():
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)


def _families() -> list[socket.AddressFamily]:
    return [socket.AF_INET, socket.AF_INET6] if Path("/proc/net/if_inet6").exists() else [socket.AF_INET]


def _packet() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def _large_buffers() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_SNDBUFFORCE, 1 << 24)
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 1 << 24)


def _transparent() -> None:
    options = {
        socket.AF_INET: (socket.IPPROTO_IP, uapi.IP_TRANSPARENT),
        socket.AF_INET6: (socket.IPPROTO_IPV6, uapi.IPV6_TRANSPARENT),
    }
    for family in _families():
        with socket.socket(family) as sock:
            sock.setsockopt(*options[family], 1)


def _uring() -> None:
    Batch().close()


def _bpf() -> None:
    bpf.Program(8, bpf.put(0, 0) + bpf.leave()).close()


def _user_namespaces() -> None:
    process, _ = _ordinary(["unshare", "-Urn", "true"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        said = process.communicate()[1].strip()
    if process.returncode:
        raise HostError(
            said, hint="see user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_*"
        )


def _mptcp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, uapi.IPPROTO_MPTCP).close()


def _md5() -> None:
    key = socket.AF_INET.to_bytes(2, sys.byteorder).ljust(130, b"\0") + (1).to_bytes(2, sys.byteorder)
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, key.ljust(MD5SIG_BYTES, b"\0"))


def _tcp_ao() -> None:
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.IPPROTO_TCP, TCP_AO_INFO, AO_INFO_BYTES)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                raise


_PROBES = (
    _Probe("TCP_REPAIR", True, _repair, "freezes and rebuilds connections", "boot Linux 3.5 or newer"),
    _Probe("TCP_REPAIR_WINDOW", True, _window, "carries windows and negotiated options", "boot Linux 4.8 or newer"),
    _Probe("sock_diag", True, _sock_diag, "lists connections", "modprobe tcp_diag"),
    _Probe("nftables", True, _nftables, "holds connections", "modprobe nf_tables, or boot Linux 4.18 or newer"),
    _Probe("NFLOG", True, _nflog, "keeps what arrives in a hold", "modprobe nfnetlink_log nft_log"),
    _Probe(
        "raw sockets",
        True,
        _raw,
        "replays what was kept",
        "boot a kernel with raw sockets",
        "CAP_NET_RAW and CAP_NET_ADMIN",
    ),
    _Probe(
        "pidfd_getfd",
        False,
        _pidfd_getfd,
        "takes connections out of programs that know nothing of it",
        "boot Linux 5.6 or newer, with a seccomp filter that allows it",
        "CAP_SYS_PTRACE",
    ),
    _Probe(
        "SO_SNDBUFFORCE",
        False,
        _large_buffers,
        "carries queues beyond net.core.wmem_max and rmem_max",
        "raise net.core.wmem_max and rmem_max",
        "CAP_NET_ADMIN in the first user namespace",
    ),
    _Probe(
        "microsecond timestamps", False, _microseconds, "takes connections that have them", "boot Linux 6.7 or newer"
    ),
    _Probe(
        "io_uring",
        False,
        _uring,
        "restores many connections in a third of the time",
        "sysctl kernel.io_uring_disabled=0, boot Linux 6.11 or newer, with a seccomp filter that allows it",
    ),
    _Probe(
        "BPF",
        False,
        _bpf,
        "dumps many connections in a third of the time",
        "boot Linux 5.14 or newer with CONFIG_BPF_SYSCALL",
        "CAP_BPF and CAP_PERFMON in the first user namespace",
    ),
    _Probe("AF_PACKET", False, _packet, "announces an address that moves", "modprobe af_packet", "CAP_NET_RAW"),
    _Probe("IP_TRANSPARENT", False, _transparent, "rebuilds before the address has come", "boot Linux 2.6.37 or newer"),
    _Probe("netdev fwd", False, _forward, "forwards single flows to another host", "modprobe nft_fwd_netdev"),
    _Probe("conntrack", False, _conntrack, "lets moved connections pass", ""),
    _Probe("network namespaces", False, _setns, "--netns", "boot Linux 3.0 or newer", "CAP_SYS_ADMIN"),
    _Probe("user namespaces", False, _user_namespaces, "demo without root", "apt install util-linux", "CAP_SETUID"),
    _Probe("open files", False, _descriptors, "one descriptor a connection", ""),
    _Probe(
        "TCP_MD5SIG", False, _md5, "takes connections that have keys (RFC 2385)", "boot a kernel with CONFIG_TCP_MD5SIG"
    ),
    _Probe(
        "TCP-AO",
        False,
        _tcp_ao,
        "in the kernel; connections that use it stay where they are",
        "boot a kernel with CONFIG_TCP_AO",
    ),
    _Probe(
        "MPTCP",
        False,
        _mptcp,
        "in the kernel; connections that use it stay where they are",
        "boot a kernel with CONFIG_MPTCP",
    ),
)
