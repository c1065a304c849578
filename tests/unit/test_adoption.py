"""The words of --adopt, and looking for the application that one of them names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.adopt.sockets import MAX_PATH, listener_at
from migrate.agent.adoption import Rule, parse_rule
from migrate.app.plain import Application
from migrate.errors import PrivilegeError, UsageError


def test_words_give_a_rule() -> None:
    shop = bytes([10, 0, 0, 100])
    assert parse_rule("*=hold") == Rule(None, "hold")
    assert parse_rule("10.0.0.100:80=unix:/run/shop/a=b") == Rule((shop, 80), "unix", path="/run/shop/a=b")
    assert parse_rule("10.0.0.100=child:cat -u") == Rule((shop, None), "child", ("cat", "-u"))


@pytest.mark.parametrize(
    "words", ["*", "*=", "*=unix", "*=unix:", f"*=unix:/{'x' * MAX_PATH}", "*=child:", "*=hold:it"]
)
def test_words_that_are_no_rule(words: str) -> None:
    with pytest.raises(UsageError):
        parse_rule(words)


def test_the_listener_is_looked_up_without_a_word(tmp_path: Path) -> None:
    path = str(tmp_path / "app" / "socket")
    assert listener_at(path) is None
    with Application(path):
        assert listener_at(path) == os.getpid()
    assert listener_at(path) is None
    (tmp_path / "app").chmod(0o755)
    with pytest.raises(PrivilegeError, match="open to other users"):
        listener_at(path)


def test_an_agent_that_is_not_root_reaches_it(tmp_path: Path) -> None:
    """With the capability that the systemd unit gives it, which lets it search a directory and not write to a file."""
    path = str(tmp_path / "app" / "socket")
    program = f"from migrate.adopt.sockets import listener_at; print(listener_at({path!r}))"
    user = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]
    command = [*user, "--ambient-caps=+dac_read_search", sys.executable, "-c", program]
    with Application(path):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == f"{os.getpid()}\n"


def test_users_are_names_or_numbers() -> None:
    command = [
        sys.executable,
        "-m",
        "migrate.cli",
        "agent",
        "--insecure",
        "--adopt-user",
        "0",
        "--adopt-user",
        "no-user",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == UsageError.exit_code
    assert "there is no user 'no-user'" in done.stderr
