"""Pictures that are drawn from tables are as new as the tables."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from migrate.tcpstate import REBUILD, TcpState

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "tcp-states.svg"


def draw_states(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "draw-states", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_states_are_drawn_from_the_table() -> None:
    done = draw_states("--check")
    assert done.returncode == 0, done.stderr


def test_a_stale_picture_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "states.svg"
    assert "states.svg is stale: run scripts/draw-states" in draw_states("--check", copy).stderr
    assert not copy.exists()
    assert draw_states(copy).returncode == 0
    assert copy.read_bytes() == PICTURE.read_bytes()
    copy.write_text(copy.read_text().replace("ESTABLISHED", "established"))
    assert draw_states("--check", copy).returncode == 1


def test_the_picture_says_what_the_tables_say() -> None:
    words = {element.text for element in ET.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")}
    assert {state.name.replace("_", "-") for state in TcpState} <= words
    for plan in REBUILD.values():
        assert any(" → ".join(step.value for step in plan.steps) in (word or "") for word in words)


def test_a_transition_without_a_place_stops_the_drawing(tmp_path: Path) -> None:
    """The table of a copy of the project gets an arrow that the layout does not know."""
    for name in ("migrate/__init__.py", "migrate/errors.py", "migrate/tcpstate.py", "scripts/draw-states"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((ROOT / name).read_text())
    table = tmp_path / "migrate" / "tcpstate.py"
    row = "Event.CLOSE: (TcpState.LAST_ACK, Action.FIN)"
    assert row in table.read_text()
    table.write_text(table.read_text().replace(row, row.replace("LAST_ACK", "CLOSING")))
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "draw-states", tmp_path / "out.svg"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "these arrows need a place, or lost their transition" in done.stderr
    assert "CLOSING" in done.stderr and "LAST_ACK" in done.stderr
