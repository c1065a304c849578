"""The demo's picture and the numbers in it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from migrate.demo.scene import Result, Row, blackouts, percentile
from migrate.demo.timeline import draw, ticks

SVG = "{http://www.w3.org/2000/svg}"


def result(**changes: object) -> Result:
    """A move of 100 connections, ten milliseconds apart, frozen for 20 ms, with an answer before and one after."""
    rows = [
        Row((n / 100, n / 100 + 0.020), [(n / 100 - 0.1, "A"), (n / 100 + 0.1, "B"), (99.0, "B")]) for n in range(100)
    ]
    facts: dict[str, object] = {
        "connections": 100,
        "moved": 100,
        "lost": 0,
        "answers": 300,
        "bytes_verified": 12_300_000,
        "resets": 0,
        "retransmissions": 0,
        "blackout": [0.0005] * 90 + [0.015] * 9 + [3.0],
        "freeze": [0.020] * 100,
        "duration": 1.0,
        "failures": [],
        "rows": rows,
    }
    return Result(**(facts | changes))  # type: ignore[arg-type]


def drawn(what: Result) -> ET.Element:
    return ET.fromstring(draw(what))


def texts(picture: ET.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def rectangles(picture: ET.Element, colour: str) -> list[tuple[float, float, float, float]]:
    return [
        tuple(float(each.attrib[name]) for name in ("x", "y", "width", "height"))  # type: ignore[misc]
        for each in picture.iter(f"{SVG}rect")
        if each.attrib["fill"] == colour
    ]


def colour_of(picture: ET.Element, words: str) -> str:
    """The colour that the legend explains by these words: that of the element before them."""
    elements = list(picture)
    place = next(number for number, element in enumerate(elements) if element.text == words)
    return elements[place - 1].attrib["fill"]


def test_it_says_what_happened() -> None:
    words = texts(drawn(result()))
    assert "100 live TCP connections moved from host A to host B: none lost" in words
    assert {"100 of 100", "12.3 MB", "time in ms", "RST segments on the wire", "20 ms"} <= set(words)


def test_a_loss_is_in_the_headline() -> None:
    words = texts(drawn(result(moved=97, lost=2)))
    assert "97 live TCP connections moved from host A to host B: 5 in trouble" in words


def test_a_freeze_stands_where_and_as_long_as_it_was() -> None:
    picture = drawn(result())
    frozen = [each for each in rectangles(picture, colour_of(picture, "frozen: between the two")) if each[0] < 850][1:]
    assert len(frozen) == 60
    pixels_a_second = (850 - 76) / 2
    assert frozen[0][0] == pytest.approx(76 + 0.5 * pixels_a_second, abs=0.1)
    assert [width for _, _, width, _ in frozen] == pytest.approx([0.020 * pixels_a_second] * 60, abs=0.1)
    assert frozen == sorted(frozen), "later rows moved later"


def test_an_answer_has_the_colour_of_its_host() -> None:
    row = Row((0.5, 0.52), [(0.1, "A"), (0.7, "B"), (0.9, "B"), (77.0, "B")])
    picture = drawn(result(rows=[row]))
    for host, count in (("A", 1), ("B", 2)):
        ticks_of_host = [
            each for each in rectangles(picture, colour_of(picture, f"an answer from {host}")) if each[2] == 2.5
        ]
        assert len(ticks_of_host) == count


def test_the_histogram_counts_every_connection_once() -> None:
    words = texts(drawn(result()))
    counts = {words[place - 1]: words[place] for place in range(1, len(words))}
    assert (counts["0 – 1"], counts["10 – 20"], counts["over 1,000"]) == ("90", "9", "1")


@pytest.mark.parametrize("changes", [{"rows": [], "moved": 0, "blackout": [], "freeze": []}, {"duration": 0.0}])
def test_nothing_to_show_is_shown_too(changes: dict[str, object]) -> None:
    assert drawn(result(**changes)).tag == f"{SVG}svg"


def test_every_mark_lies_in_the_picture() -> None:
    picture = drawn(result())
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    for each in picture.iter(f"{SVG}rect"):
        x, y, w, h = (float(each.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height and w >= 0 and h >= 0


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (-500, 1900, 11, [-500, 0, 500, 1000, 1500]),
        (0, 2300, 4, [0, 1000, 2000]),
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0, 4, [0]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, expected: list[float]) -> None:
    assert ticks(low, high, most) == pytest.approx(expected)


def test_blackout_is_the_longest_gap_less_the_longest_before() -> None:
    regular = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    late = [0.0, 1.0, 2.0, 3.25, 4.0, 5.0]
    early_gap_only = [0.0, 1.5, 2.0, 3.0, 4.0, 5.0]
    late_after_the_move = [0.0, 1.0, 2.0, 3.0, 4.5, 6.0]
    silent_ever_since = [0.0, 1.0, 2.0]
    rows = [regular, late, early_gap_only, late_after_the_move, silent_ever_since]
    assert blackouts(rows, 2.5, 2.9, 6.0) == pytest.approx([0.0, 0.0, 0.0, 0.25, 3.0])


def test_percentiles_by_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([], 50) == 0
