"""Linters, type checker and spelling, as ordinary tests: one command checks all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent


def scripts(interpreter: str) -> list[Path]:
    """The scripts without a suffix that this interpreter runs."""
    files = (path for folder in ("scripts", ".ci", "tests") for path in ROOT.joinpath(folder).rglob("*"))
    return sorted(path for path in files if path.is_file() and not path.suffix and interpreter in shebang(path))


def shebang(path: Path) -> str:
    with path.open("rb") as file:
        line = file.readline(100)
    return line.decode(errors="replace") if line.startswith(b"#!") else ""


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--quiet", ".", *scripts("python")],
        ["ruff", "format", "--quiet", "--diff", ".", *scripts("python")],
        ["codespell"],
        ["shellcheck", *scripts("bash")],
        ["mypy"],
    ],
    ids=lambda command: " ".join(str(word) for word in command[:2] if not isinstance(word, Path)),
)
def test_clean(command: list[str | Path]) -> None:
    done = subprocess.run([TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_there_are_scripts_to_check() -> None:
    names = {str(path.relative_to(ROOT)) for path in scripts("bash")}
    assert {"scripts/test", "scripts/demo", "scripts/provision", ".ci/run"} <= names
