"""Of several notify programs one follows, and none is turned away by one that is just ending."""

from __future__ import annotations

from pathlib import Path

from migrate.cli.resident import Resident


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = Resident(tmp_path, "10.0.0.100"), Resident(tmp_path, "10.0.0.100")
    with first.taken() as ours:
        assert ours
        with second.taken() as theirs:
            assert not theirs
        with Resident(tmp_path, "fd00::100").taken() as other:
            assert other
    with second.taken() as theirs:
        assert theirs


def test_whom_to_serve(tmp_path: Path) -> None:
    first, second = Resident(tmp_path, "10.0.0.100"), Resident(tmp_path, "10.0.0.100")
    assert first.served() == 0
    first.serve(4711)
    with first.taken():
        second.serve(4712)  # and then finds the place taken
    assert first.served() == 4712  # which the first sees, for it looks again when it has left
    assert not [each.name for each in tmp_path.iterdir() if each.suffix.strip(".").isdecimal()]
