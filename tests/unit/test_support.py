"""docs/support.md: the tests that it names exist, and it names every state."""

from __future__ import annotations

import re

from migrate.tcpstate import TcpState
from tests.support import CRIU, OTHERS, PAGE, ROOT


def test_what_the_page_names_is_there() -> None:
    for _, _, file, name in CRIU:
        assert re.search(rf"^def {name.partition('[')[0]}", (ROOT / file).read_text(), re.MULTILINE), name
    for names in OTHERS.values():
        assert all(
            f"def {name.partition('[')[0]}" in (ROOT / "tests/e2e/test_states_unconnected.py").read_text()
            for name in names
        )


def test_the_page_has_every_state_and_every_case_and_no_failure() -> None:
    page = PAGE.read_text()
    assert all(f"| {state.name} |" in page for state in TcpState)
    assert all(f"| {case} |" in page for case, *_ in CRIU)
    assert "| fails |" not in page
    assert all(first == last for first, last in re.findall(r"(\d+) of (\d+) pass", page))
