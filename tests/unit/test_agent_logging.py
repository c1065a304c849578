"""Log lines: one event a line, readable by programs, without payload."""

from __future__ import annotations

import io
import json
import logging as standard
import re
from collections.abc import Iterator

import pytest

from migrate.agent import logging


@pytest.fixture(autouse=True)
def _leave_the_root_as_it_was() -> Iterator[None]:
    logger = standard.getLogger("migrate")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


LOG = logging.get_logger("migrate.agent.server")


def test_logfmt(out: io.StringIO) -> None:
    logging.configure("info", stream=out)
    LOG.info("batch committed", move="m1", connections=64, to="10.0.0.2:7420", empty="", why='it said "no"')
    time, _, rest = out.getvalue().partition(" ")
    assert re.fullmatch(r"time=20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == (
        'level=info event="batch committed" move=m1 connections=64 to=10.0.0.2:7420 empty="" '
        'why="it said \\"no\\"" logger=migrate.agent.server\n'
    )


def test_json(out: io.StringIO) -> None:
    logging.configure("debug", "json", out)
    LOG.debug("frozen", connections=2, seconds=0.5, names=("a", "b"), steer=None, ok=True)
    said = json.loads(out.getvalue())
    assert said.pop("time")
    assert said == {
        "level": "debug",
        "event": "frozen",
        "connections": 2,
        "seconds": 0.5,
        "names": ["a", "b"],
        "steer": None,
        "ok": True,
        "logger": "migrate.agent.server",
    }


@pytest.mark.parametrize("form", ["logfmt", "json"])
@pytest.mark.parametrize(
    "value",
    [b"secret", bytearray(b"secret"), memoryview(b"secret"), [b"secret"], {"sent": b"secret"}, ((b"secret",),)],
)
def test_payload_never_gets_into_a_line(form: str, value: object, out: io.StringIO) -> None:
    logging.configure("info", form, out)  # type: ignore[arg-type]
    LOG.info("dumped", record=value)
    assert "secret" not in out.getvalue()
    assert "<6 bytes>" in out.getvalue()


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_what_others_write_makes_no_line_of_its_own(form: str, out: io.StringIO) -> None:
    logging.configure("info", form, out)  # type: ignore[arg-type]
    LOG.info("called", peer="x\nlevel=error event=forged\x1b[2J\u2028")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(level: str, expected: int, out: io.StringIO) -> None:
    logging.configure(level, stream=out)
    for name in logging.LEVELS:
        getattr(LOG, name)("something")
    assert len(out.getvalue().splitlines()) == expected


def test_a_fault_brings_its_traceback_in_the_same_line(out: io.StringIO) -> None:
    logging.configure("info", "json", out)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        LOG.exception("call failed")
    said = json.loads(out.getvalue())
    assert said["level"] == "error"
    assert said["traceback"].endswith("ZeroDivisionError: by zero")


def test_the_journal_gets_priorities_and_keeps_its_own_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    logging.configure("info")
    LOG.warning("slow")
    LOG.error("failed")
    assert capsys.readouterr().err == (
        "<4>level=warning event=slow logger=migrate.agent.server\n"
        "<3>level=error event=failed logger=migrate.agent.server\n"
    )


def test_it_is_set_up_once_however_often_it_is_called(out: io.StringIO) -> None:
    for _ in range(3):
        logging.configure("info", stream=out)
    LOG.info("once")
    assert len(out.getvalue().splitlines()) == 1
