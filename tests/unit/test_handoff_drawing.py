"""The picture of the handoff is as new as the tables."""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from migrate.handoff.destination import DestinationEvent, DestinationState
from migrate.handoff.source import SourceEvent, SourceState

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "handoff.svg"


def draw_handoff(*arguments: str | Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts" / "draw-handoff", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_handoff_is_drawn_from_the_tables() -> None:
    done = draw_handoff("--check")
    assert done.returncode == 0, done.stderr


def test_a_stale_picture_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "handoff.svg"
    copy.write_text(PICTURE.read_text().replace("LINGERING", "lingering"))
    assert "handoff.svg is stale: run scripts/draw-handoff" in draw_handoff("--check", copy).stderr
    assert draw_handoff(copy).returncode == 0
    assert copy.read_bytes() == PICTURE.read_bytes()


def test_the_picture_has_every_state_and_every_event() -> None:
    words = " ".join(element.text or "" for element in ET.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text"))
    for each in (*SourceState, *DestinationState, *SourceEvent, *DestinationEvent):
        assert each.name in words


def test_a_transition_without_a_place_stops_the_drawing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "migrate", tmp_path / "migrate", ignore=shutil.ignore_patterns("agent", "__pycache__"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    table = tmp_path / "migrate" / "handoff" / "source.py"
    row = "_E.LINK_LOST: (_S.DOUBT, ()),"
    assert row in table.read_text()
    table.write_text(table.read_text().replace(row, row.replace("DOUBT", "PREPARING")))
    done = draw_handoff(tmp_path / "out.svg", root=tmp_path)
    assert done.returncode == 1
    assert "need a place, or lost their transition: DOUBT to PREPARING" in done.stderr
