"""The picture: who answered when, each connection's freeze, and how long the peers heard nothing (SVG 1.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape, quoteattr

from migrate.demo.scene import Result, Row, percentile

__all__ = ["draw", "ticks"]

_WIDTH, _HEIGHT = 1240, 780
_LEFT, _RIGHT = 76, 850  # of the time axis
_FLOW_TOP, _FLOW_BOTTOM = 130, 240
_ROWS_TOP, _ROWS_BOTTOM = 290, 700
_SIDE, _SIDE_BARS, _SIDE_RIGHT = 900, 990, 1150  # the histogram: labels, bars
_MOST_ROWS = 60
_MARGIN = 0.5  # seconds before the first freeze and after the last
_BINS = 100  # of the flow of answers

_COLOURS = {"A": "#2b6cb0", "B": "#dd7a12"}
_PALE = {"A": "#dbe8f5", "B": "#fcead3"}
_FREEZE, _INK, _FAINT = "#b3124b", "#1f2933", "#7b8794"
_EDGES = (0, 1, 5, 10, 20, 30, 50, 100, 200, 500, 1000)  # milliseconds


def draw(result: Result) -> str:
    """The picture as an XML document."""
    begin, end = -_MARGIN, result.duration + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="12" '
        f'fill="{_INK}" role="img" aria-label={quoteattr(_headline(result))}>',
        _rect(0, 0, _WIDTH, _HEIGHT, "#ffffff"),
        _text(_LEFT, 40, _headline(result), size=22, bold=True),
        _text(_LEFT, 64, _subtitle(result), size=13, colour=_FAINT),
        *_legend(),
        *_flow(result.rows, begin, end),
        *_connections(result.rows, begin, end),
        *_axis(begin, end),
        *_histogram(result.blackout),
        *_figures(result),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from ``low`` to ``high``, at most ``most`` of them, 1, 2 or 5 times a power of ten apart."""
    rough = max(high - low, 1e-9) / most
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _headline(result: Result) -> str:
    outcome = "none lost" if result.good else f"{result.lost + result.connections - result.moved} in trouble"
    return f"{result.moved:,} live TCP {_noun(result.moved)} moved from host A to host B: {outcome}"


def _subtitle(result: Result) -> str:
    return (
        f"HTTP keep-alive connections of nginx with traffic on each; the whole move took {result.duration * 1000:,.0f} "
        f"ms. Time counts from the first connection's freeze."
    )


def _legend() -> Iterator[str]:
    entries = [(_COLOURS["A"], "an answer from A"), (_COLOURS["B"], "an answer from B")]
    entries += [(_PALE["A"], "lives on A"), (_PALE["B"], "lives on B"), (_FREEZE, "frozen: between the two")]
    x = _LEFT
    for colour, words in entries:
        yield _rect(x, 79, 14, 12, colour)
        yield _text(x + 20, 89, words)
        x += 40 + 7 * len(words)


def _flow(rows: Sequence[Row], begin: float, end: float) -> Iterator[str]:
    """How many answers came from each host, over time, by all connections."""
    width = (end - begin) / _BINS
    counts = {host: [0] * _BINS for host in _COLOURS}
    for row in rows:
        for time, host in row.answers:
            place = math.floor((time - begin) / width)
            if host in counts and 0 <= place < _BINS:
                counts[host][place] += 1
    highest = max(map(sum, zip(*counts.values(), strict=True))) or 1
    scale = (_FLOW_BOTTOM - _FLOW_TOP) / highest
    for rate in ticks(0, highest / width, 4)[1:]:
        y = _FLOW_BOTTOM - rate * width * scale
        yield _rect(_LEFT, y, _RIGHT - _LEFT, 0.6, "#e4e7eb")
        yield _text(_LEFT - 8, y + 4, f"{rate:,.0f}", anchor="end", size=11, colour=_FAINT)
    for place in range(_BINS):
        bottom = float(_FLOW_BOTTOM)
        left, right = (_x(begin + each * width, begin, end) for each in (place, place + 1))
        for host, colour in _COLOURS.items():
            height = counts[host][place] * scale
            bottom -= height
            if height:
                yield _rect(left, bottom, right - left - 0.8, height, colour)
    yield _text(_LEFT, _FLOW_TOP - 8, "Answers per second, all connections", bold=True)


def _connections(rows: Sequence[Row], begin: float, end: float) -> Iterator[str]:
    """A row each for some of the connections, in the order in which they moved."""
    moved = sorted((row for row in rows if row.frozen), key=lambda row: row.frozen or (0.0, 0.0))
    shown = (
        [moved[number * len(moved) // _MOST_ROWS] for number in range(_MOST_ROWS)] if len(moved) > _MOST_ROWS else moved
    )
    what = (
        f"{len(shown)} of the {len(rows):,} connections"
        if len(shown) < len(rows)
        else f"All of {len(rows)} {_noun(len(rows))}"
    )
    yield _text(_LEFT, _ROWS_TOP - 10, f"{what}, a row each, in the order in which they moved", bold=True)
    pitch = (_ROWS_BOTTOM - _ROWS_TOP) / max(len(shown), 1)
    height = pitch * 0.8
    for number, row in enumerate(shown):
        assert row.frozen is not None
        y = _ROWS_TOP + number * pitch
        frozen, thawed = (_x(time, begin, end) for time in row.frozen)
        yield _rect(_LEFT, y, frozen - _LEFT, height, _PALE["A"])
        yield _rect(thawed, y, _RIGHT - thawed, height, _PALE["B"])
        for time, host in row.answers:
            if begin <= time <= end and host in _COLOURS:
                yield _rect(_x(time, begin, end) - 1.25, y, 2.5, height, _COLOURS[host])
        yield _rect(frozen, y, max(thawed - frozen, 1.5), height, _FREEZE)


def _axis(begin: float, end: float) -> Iterator[str]:
    yield _rect(_LEFT, _ROWS_BOTTOM + 4, _RIGHT - _LEFT, 1, _INK)
    for time in ticks(begin * 1000, end * 1000, 11):
        x = _x(time / 1000, begin, end)
        yield _rect(x - 0.5, _ROWS_BOTTOM + 4, 1, 6, _INK)
        yield _text(x, _ROWS_BOTTOM + 24, f"{time:,.0f}".replace("-", "−"), anchor="middle")
    yield _text((_LEFT + _RIGHT) / 2, _ROWS_BOTTOM + 46, "time in ms", anchor="middle", colour=_FAINT)


def _histogram(blackout: Sequence[float]) -> Iterator[str]:
    """How many peers missed their connection for how long."""
    yield _text(_SIDE, _FLOW_TOP - 8, "Blackout, as the peers saw it", bold=True)
    yield _text(_SIDE, _FLOW_TOP + 10, "longest gap in what they received, less the", size=11, colour=_FAINT)
    yield _text(_SIDE, _FLOW_TOP + 24, "longest before the move; connections by ms", size=11, colour=_FAINT)
    counts = [0] * len(_EDGES)
    for seconds in blackout:
        counts[sum(edge <= seconds * 1000 for edge in _EDGES) - 1] += 1
    while len(counts) > 5 and not counts[-1]:
        counts.pop()
    most = max(counts) or 1
    for number, count in enumerate(counts):
        y = _FLOW_TOP + 40 + number * 24
        last = number + 1 == len(_EDGES)
        name = f"over {_EDGES[-1]:,}" if last else f"{_EDGES[number]} – {_EDGES[number + 1]}"
        yield _text(_SIDE_BARS - 10, y + 13, name, anchor="end")
        width = count / most * (_SIDE_RIGHT - _SIDE_BARS)
        yield _rect(_SIDE_BARS, y, max(width, 1), 17, _FREEZE if count else "#cbd2d9")
        yield _text(_SIDE_BARS + max(width, 1) + 7, y + 13, f"{count:,}", colour=_INK if count else _FAINT)


def _figures(result: Result) -> Iterator[str]:
    """The numbers that matter, large."""
    figures = [
        (f"{result.moved:,} of {result.connections:,}", "connections moved"),
        (f"{result.lost}", "lost"),
        (f"{result.resets}", "RST segments on the wire"),
        (f"{result.bytes_verified / 1e6:,.1f} MB", "verified byte by byte"),
        (f"{percentile(result.blackout, 99) * 1000:.0f} ms", "blackout, 99th percentile"),
        (f"{percentile(result.freeze, 50) * 1000:.0f} ms", "frozen, median"),
    ]
    for number, (value, words) in enumerate(figures):
        y = 476 + number * 44
        yield _text(_SIDE, y, value, size=20, bold=True)
        yield _text(_SIDE, y + 16, words, colour=_FAINT)


def _noun(count: int) -> str:
    return "connection" if count == 1 else "connections"


def _x(time: float, begin: float, end: float) -> float:
    return _LEFT + (time - begin) / (end - begin) * (_RIGHT - _LEFT)


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(
    x: float, y: float, words: str, *, size: int = 12, bold: bool = False, anchor: str = "start", colour: str = _INK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>'
        f"{escape(words)}</text>"
    )
