"""The command line's own cost: `tcpmig list` against `ss`, `tcpmig --help` against a bare interpreter."""

from __future__ import annotations

import argparse
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

from tests.bench.measure import PLAIN, Report, elapsed, in_own_network, narrate, spread

TCPMIG = str(Path(sys.executable).with_name("tcpmig"))


def measure(report: Report) -> None:
    pairs, times = (100, 2) if report.quick else (5000, 9)
    narrate(f"list of {2 * pairs} connections, --help")
    listing = in_own_network("commands", "--pairs", pairs, "--times", times)
    report.number(
        f"list of {2 * pairs} connections to `ss -Htnp`",
        listing["tcpmig"]["median"] / listing["ss"]["median"],
        2.5,
        "x",
        spread=listing,
    )
    bare, ready = [], []
    for _ in range(2 if report.quick else 15):
        bare.append(elapsed([sys.executable, "-c", ""]))
        ready.append(elapsed([TCPMIG, "--help"]))
    starts = {"interpreter": spread(bare), "tcpmig": spread(ready)}
    over = starts["tcpmig"]["median"] - starts["interpreter"]["median"]
    report.number("`tcpmig --help` over a bare interpreter", over, 60, "ms", spread=starts)


def main() -> None:
    """Inside a network namespace of our own: connections to ourselves, so that both ends are listed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    listener = socket.create_server(("127.0.0.1", 8000))
    name = listener.getsockname()
    ends = [end for _ in range(arguments.pairs) for end in (socket.create_connection(name), listener.accept()[0])]
    listener.close()
    for command in (["ss", "-Htnp"], [TCPMIG, "list"]):
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=PLAIN).stdout.splitlines()
        if sum(":8000" in line for line in lines) != len(ends):
            raise SystemExit(f"{command[0]} does not list every connection")
    ss, tcpmig = [], []
    for _ in range(arguments.times):
        ss.append(elapsed(["ss", "-Htnp"]))
        tcpmig.append(elapsed([TCPMIG, "list"]))
    json.dump({"ss": spread(ss), "tcpmig": spread(tcpmig)}, sys.stdout)


if __name__ == "__main__":
    main()
