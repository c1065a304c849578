"""docs/support.md out of a run of the tests: `scripts/support` writes it, `scripts/support --check` compares.

Which test stands for which case of CRIU's suite is said here; `tests/unit/test_support.py` sees that the tests exist.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from migrate.tcpstate import REBUILD, TcpState, Way

__all__ = ["CRIU", "FILES", "main", "page"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
STATES, UNCONNECTED = "tests/e2e/test_states.py", "tests/e2e/test_states_unconnected.py"
FEATURES, LIKE_CRIU = "tests/e2e/test_features.py", "tests/e2e/test_like_criu.py"
OPTIONS, HOLD, MOVE = "tests/kernel/test_options.py", "tests/kernel/test_hold.py", "tests/kernel/test_move.py"
FILES = (STATES, UNCONNECTED, FEATURES, LIKE_CRIU, OPTIONS, HOLD, MOVE)

LIVES, ENDED, NEVER = "test_a_connection_lives_on", "test_a_connection_that_ended", "test_never_connected"
QUEUE = "test_a_listener_with_what_waits_in_it"
# A case of CRIU's (test/zdtm/static and transition), what it checks, and where: a file, and how test names begin.
CRIU: tuple[tuple[str, str, str, str], ...] = (
    ("socket-tcp, -tcp6, -tcp4v6", "a connection, both directions", STATES, f"{LIVES}[ESTABLISHED"),
    ("socket-tcp(6, 4v6)-local", "both ends on one host", LIKE_CRIU, "test_both_ends_on_one_host"),
    ("socket-tcp-nft-nfconntrack, -ipt-", "with connection tracking", FEATURES, "test_what_hosts_have[conntrack"),
    ("socket-tcpbuf(6)", "full buffers", MOVE, "test_bytes_that_a_shut_window_kept_here_move"),
    ("socket-tcpbuf(6)-local", "full buffers, both ends", LIKE_CRIU, "test_both_ends_on_one_host[ipv4-buffers"),
    ("socket-tcp(6, 4v6)-fin-wait1", "FIN_WAIT_1", STATES, f"{LIVES}[FIN_WAIT_1"),
    ("socket-tcp(6, 4v6)-fin-wait2", "FIN_WAIT_2", STATES, f"{LIVES}[FIN_WAIT_2"),
    ("socket-tcp(6, 4v6)-close-wait", "CLOSE_WAIT", STATES, f"{LIVES}[CLOSE_WAIT"),
    ("socket-tcp(6, 4v6)-last-ack", "LAST_ACK", STATES, f"{LIVES}[LAST_ACK"),
    ("socket-tcp(6, 4v6)-closing", "CLOSING", STATES, f"{LIVES}[CLOSING"),
    ("socket-tcp(6, 4v6)-closed", "both sides are done", UNCONNECTED, f"{ENDED}[finished_first"),
    ("socket-tcp-closed-last-ack", "done, by way of LAST_ACK", UNCONNECTED, f"{ENDED}[finished-"),
    ("socket-tcp-reseted", "reset by the peer, data unread", UNCONNECTED, f"{ENDED}[reset"),
    ("socket-tcp-syn-sent", "SYN_SENT", UNCONNECTED, "test_a_syn_that_was_lost_is_repeated"),
    ("socket-tcp(6)-unconn", "never connected", UNCONNECTED, NEVER),
    ("unbound_sock", "not even bound", UNCONNECTED, f"{NEVER}[fresh"),
    ("socket-tcp-listen, socket_listen(6, 4v6)", "a listener", UNCONNECTED, f"{QUEUE}[idle"),
    ("socket-tcp-reuseport", "two listeners on one port", LIKE_CRIU, "test_two_listeners_share_a_port"),
    ("socket-tcp-skip-in-flight", "connections not accepted yet; CRIU drops them", UNCONNECTED, f"{QUEUE}[three"),
    ("socket-tcp-close0, -close2, -dump-tcp-close", "let go", MOVE, "test_a_discarded_socket_leaves"),
    ("socket-tcp-close1", "… but not the listener", UNCONNECTED, "test_a_frozen_listener"),
    ("socket-tcp-keepalive", "keepalive and its options", OPTIONS, "test_an_option_of_a_connection_moves"),
    ("sock_tcp_opts00, 01", "options of tcp(7)", OPTIONS, "test_an_option_of_a_connection_moves"),
    ("socket-linger", "SO_LINGER", OPTIONS, "test_an_option_of_a_connection_moves"),
    ("sock_opts00, 01, 02", "options of socket(7)", OPTIONS, "test_all_options_at_once"),
    ("sock_ip_opts00, 01", "options of ip(7)", OPTIONS, "test_an_option_of_a_connection_moves"),
    ("sk-freebind, sk-freebind-false", "IP_FREEBIND", OPTIONS, "test_an_option_of_a_listening_socket_moves"),
    ("sock_filter00, 01", "socket filters", OPTIONS, "test_a_long_filter_moves_whole"),
    ("net_lock_socket_nftables(6), _iptables(6)", "no packet passes", HOLD, "test_nothing_leaves_while_both_sides"),
    ("transition/socket-tcp(6)", "moves amidst traffic", LIKE_CRIU, "test_traffic_goes_on_through_many_moves"),
)
FAMILIES, QUEUES = ("ipv4", "ipv6", "mapped"), ("empty", "full")
# Of the states that test_states.py has not: the beginnings of the test names, with {family}.
OTHERS: Mapping[TcpState, tuple[str, str]] = {
    TcpState.CLOSED: (f"{ENDED}[reset-empty-{{}}", f"{ENDED}[reset-full-{{}}"),
    TcpState.LISTEN: (f"{QUEUE}[idle-{{}}", f"{QUEUE}[three-{{}}"),
    TcpState.SYN_RECEIVED: ("test_a_handshake_is_waited_for[{}", ""),
    TcpState.TIME_WAIT: ("test_time_wait_is_made_anew[{}", ""),
}
HEAD = """# What moves

This page is written by `scripts/support` from a run of the tests. Each test moves between two hosts (network namespaces
with kernels of their own in all that matters to TCP), and lets both ends live on to the end of the connection: data,
options and the wire are compared.

## States

| state | how it comes back | {columns} |
| --- | --- | {rules} |
"""
LIMITS = """
*full*: bytes sent and not acknowledged, bytes not sent, bytes not read, as far as the state can have them; of LISTEN,
connections that nobody has accepted. "–": there is nothing to try.

- **LISTEN.** Connections in the accept queue become records of their own. `dump --wait-handshakes SECONDS` leaves them
  to the owner and waits until it has accepted them. Once taken they cannot be put back: if the dump fails, a process
  keeps them for `--hold SECONDS`, and `dump --pid` takes them from there; then they end. After a dump nobody who
  connects is refused for as long: the SYN is repeated, until the listener is back somewhere.
- **SYN_RECEIVED** is waited for, three seconds unless `--wait-handshakes` says more; then the dump is refused.
- **TIME_WAIT** is made anew for its whole time; it answers a repeated FIN with the same numbers and timestamps. BPF
  alone tells these. Where that is not allowed (`unshare -Ur`, a kernel without BTF), and where the address has not
  come when the record is restored, the destination keeps the four-tuple free for the time that is left.
- **CLOSED.** A pending error comes back as ECONNRESET. To ask which one it is (SO_ERROR) would take it away from the
  application, and no silent way leads to most others.
- **SYN_SENT.** The SYN is repeated after a second at the latest, as any lost SYN.

## Features

| feature | |
| --- | --- |
| SACK, window scaling, timestamps | move; each also tried without |
| timestamps in microseconds | move; the unit can also change on the way, in both directions |
| urgent data | moves, whether read inline or not; a mark whose byte was read out of band becomes unread again |
| simultaneous open | moves after it, and before it in SYN_SENT |
| Fast Open | such a connection moves like others; a listener keeps TCP_FASTOPEN |
| out-of-order segments | not in the record: the peer repeats them |
| a shut window | is probed from the new host |
| path MTU | found anew |
| conntrack, strict rp_filter, policy routing | tried on both hosts |
| ECN | moves with agents and `tcpmig restore` where BPF is allowed ([how](path-state.md)); else goes on without |
| AccECN | in the record, not restored: its counters cannot be set |
| round-trip time | in the record, not restored: the kernel measures it again |
| Multipath TCP, TLS in the kernel, TCP-AO | refused before anything is touched |
| TCP-MD5 | refused likewise: the record has no key unless a program puts it there ([how](options.md)) |
"""
BESIDE = """## Beside CRIU's test suite

CRIU's cases save and restore processes on one host, and its developers run them for every release; they were not run
here. Ours check the same between two hosts. Tests of options that this kernel does not have are not counted.

| CRIU's case | what it checks | our tests | result |
| --- | --- | --- | --- |"""


def page(results: Mapping[tuple[str, str], bool]) -> str:
    """The page; ``results`` says of (file, test name) whether it passed."""

    def result(file: str, beginning: str) -> str:
        found = [passed for (where, name), passed in results.items() if where == file and name.startswith(beginning)]
        if not beginning:
            return "–"
        return f"{sum(found)} of {len(found)} pass" if len(found) > 1 else "passes" if all(found) and found else "fails"

    columns = [f"{family}, {queue}" for family in FAMILIES for queue in QUEUES]
    lines = [HEAD.format(columns=" | ".join(columns), rules=" | ".join("---" for _ in columns)).rstrip()]
    for state, plan in REBUILD.items():
        cells = []
        for family in FAMILIES:
            for number, queue in enumerate(QUEUES):
                if plan.way in (Way.REPAIR, Way.CONNECT):
                    cells.append(result(STATES, f"{LIVES}[{state.name}-{family}-{queue}"))
                else:
                    cells.append(result(UNCONNECTED, OTHERS[state][number].format(family)))
        lines.append(f"| {state.name} | {plan.way.value} | {' | '.join(cells)} |")
    lines += [
        LIMITS,
        BESIDE,
    ]
    for case, what, file, name in CRIU:
        lines.append(f"| {case} | {what} | `{file}::{name.partition('[')[0]}` | {result(file, name)} |")
    return "\n".join(lines) + "\n"


def run(directory: Path) -> Iterator[tuple[tuple[str, str], bool]]:
    """Run the tests; the result of each."""
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", *FILES, f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        if case.find("skipped") is None:
            yield (file, case.attrib["name"]), case.find("failure") is None and case.find("error") is None


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="docs/support.md from a run of the tests")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page says something else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = page(dict(run(Path(directory))))
    if arguments.check:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return int("| fails |" in text)


if __name__ == "__main__":
    sys.exit(main())
