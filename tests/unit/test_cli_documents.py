"""What is made from the command line's parser: the manual page and the completion scripts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tcpmig.1"


def draw(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "draw-manpage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_manual_page_is_as_new_as_the_parser(tmp_path: Path) -> None:
    done = draw("--check")
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "tcpmig.1"
    copy.write_text(PAGE.read_text().replace("hold", "HOLD"))
    done = draw("--check", copy)
    assert (done.returncode, done.stderr) == (1, "tcpmig.1 is stale: run scripts/draw-manpage\n")


def test_the_manual_page_has_every_verb_and_no_rubbish() -> None:
    text = PAGE.read_text().replace("\\-", "-").replace("\\fR", "").replace("\\fI", "").replace("\\fB", "")
    for verb in VERBS:
        assert f"tcpmig {verb}" in text
    assert not re.search(r"==SUPPRESS==|%\(|None|/home|/root", text)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "tcpmig.bash"
    with file.open("w") as stdout:
        assert main(["completion", "bash"], stdout=stdout) == 0
    return file


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["du"], {"dump"}),
        (["re"], {"restore"}),
        (["dump", "--when"], {"--when-quiet"}),
        (["restore", "rec"], {"record.ici"}),
        (["show", "rec"], {"record.ici"}),
        (["dump", "-o", "rec"], {"record.ici"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=" ".join,
)
def test_bash_completes(script: Path, tmp_path: Path, words: list[str], offered: set[str]) -> None:
    """A real bash, asked as its line editor would ask it."""
    (tmp_path / "record.ici").touch()
    ask = (
        'source "$1"; shift; function=$(complete -p tcpmig | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        'COMP_WORDS=(tcpmig "$@"); COMP_CWORD=$#; COMP_LINE="tcpmig $*"; COMP_POINT=${#COMP_LINE}; '
        '"$function" tcpmig "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = [shutil.which("bash") or "bash", "--norc", "-c", ask, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "tcpmig" in capsys.readouterr().out
