"""The bench runs, and what it prints is what it promises. Its numbers mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_core_bench_emits_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "core.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "core", "--quick", "--json", file],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(file.read_text())
    assert (report["v"], report["bench"], report["quick"]) == (1, "core", True)
    assert {"name", "value", "limit", "bound", "unit", "ok"} <= set.intersection(*map(set, report["numbers"]))
    assert [number["name"] for number in report["numbers"]] == [
        "record of an idle connection",
        "copies of a queue on its way to the file",
        "bytes a segment after a restore, to before",
        "receive buffer after bulk, restored to untouched",
        "send buffer after bulk, restored to untouched",
        "list of 200 connections to `ss -Htnp`",
        "`tcpmig --help` over a bare interpreter",
        "blackout of one echoing connection, median",
        "retransmissions by its peer",
        "200 idle connections, Python to C",
        "64 KiB in the receive queue, Python to C",
        "64 KiB sent, not acknowledged, Python to C",
        "64 KiB not yet sent, Python to C",
        "eight options set, to none",
        "all options set, to none",
        "a connection of 300 in batches of 100 to one of 100",
    ]
    for number in report["numbers"]:
        assert number["name"] in done.stderr
