"""Plugins and rules of the whole suite: one ``fix_*.py`` a subject."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest_plugins = [
    "tests.fix_netns",
    "tests.fix_programs",
    "tests.fix_agents",
    "tests.fix_keepalived",
    "tests.fix_cgroup",
]


def pytest_sessionstart() -> None:
    """Without the privilege nothing here means anything: say so once instead of failing five hundred times."""
    if os.geteuid() != 0:
        pytest.exit("the suite makes network namespaces and needs root: start it with scripts/test", returncode=4)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands remember of connections is a host's: the suite's goes to a directory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCPMIG_STATE", str(tmp_path_factory.mktemp("state")))
        yield
