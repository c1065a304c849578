"""Other local ends: what a map is about, what it makes of a connection, what is none."""

from __future__ import annotations

import pytest

from migrate.errors import UsageError
from migrate.fourtuple import FourTuple
from migrate.ici import Ici
from migrate.relocate import LocalMap, LocalMaps, relocate

WRONG = ("*:80", "nonsense", "10.0.0.3:0", "0.0.0.0:80", "224.0.0.1", "[::]:80", "fd00::1")


def maps(*texts: str) -> LocalMaps:
    return LocalMaps(LocalMap.parse(*text.split("=")) for text in texts)


def there(chosen: LocalMaps, local: str) -> str:
    remote = "[fd00::9]:9" if "[" in local else "10.0.0.9:9"
    new = chosen.there(FourTuple.parse(f"{local},{remote}"))
    return "" if new is None else str(new).removesuffix(f",{remote}")


def test_a_record_gets_another_end() -> None:
    record = Ici(4, b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 9, 1, 1, 1)
    relocate(record, "10.0.0.7")
    assert str(record.four_tuple) == "10.0.0.7:80,10.0.0.2:9"
    relocate(record, "10.0.0.8:81")
    assert str(record.four_tuple) == "10.0.0.8:81,10.0.0.2:9"
    for wrong in ("[fd00::1]:80", *WRONG):
        with pytest.raises(UsageError):
            relocate(record, wrong)
    assert str(record.four_tuple) == "10.0.0.8:81,10.0.0.2:9"


def test_the_most_exact_map_counts_and_only_that() -> None:
    chosen = maps(
        "10.0.0.2=10.0.0.3",
        "10.0.0.2:80=10.0.0.4:8080",
        "10.0.0.3=10.0.0.5",
        "10.0.0.6:1=10.0.0.7",
        "[fd00::2]=[fd00::3]",
    )
    assert there(chosen, "10.0.0.2:443") == "10.0.0.3:443"
    assert there(chosen, "10.0.0.2:80") == "10.0.0.4:8080"
    assert there(chosen, "10.0.0.6:1") == "10.0.0.7:1"
    assert there(chosen, "10.0.0.6:2") == ""
    assert there(chosen, "[fd00::2]:80") == "[fd00::3]:80"
    assert not maps()
    assert there(maps(), "10.0.0.2:80") == ""


@pytest.mark.parametrize("wrong", [*WRONG, "[fd00::1]:80", "10.0.0.2"])
def test_what_is_no_map(wrong: str) -> None:
    with pytest.raises(UsageError):
        LocalMap.parse("10.0.0.2", wrong)
    with pytest.raises(UsageError):
        LocalMap.parse(wrong, "10.0.0.2")


def test_one_end_becomes_one_other() -> None:
    with pytest.raises(UsageError, match="the same local end"):
        maps("10.0.0.2:80=10.0.0.3", "10.0.0.2:80=10.0.0.4")


def test_every_map_is_about_something() -> None:
    chosen = maps("10.0.0.2=10.0.0.3", "10.0.0.2:80=10.0.0.4")
    http, https = (FourTuple.parse(f"10.0.0.2:{port},10.0.0.9:9") for port in (80, 443))
    chosen.check_used([http, https])
    with pytest.raises(UsageError, match=r"the local end 10\.0\.0\.2, which"):
        chosen.check_used([http])
    with pytest.raises(UsageError, match=r"the local end 10\.0\.0\.2:80, which"):
        chosen.check_used([https])


def test_no_two_get_one_name() -> None:
    one, two, other, has = (
        FourTuple.parse(each)
        for each in (
            "10.0.0.2:80,10.0.0.9:9",
            "10.0.0.2:81,10.0.0.9:9",
            "10.0.0.2:81,10.0.0.9:10",
            "10.0.0.3:80,10.0.0.9:10",
        )
    )
    chosen = maps("10.0.0.2=10.0.0.3:80")
    assert chosen.clashes([one, two]) == {two}
    assert chosen.clashes([one, other]) == set()
    assert chosen.clashes([other, has]) == {other}
    assert chosen.clashes([has]) == set()
