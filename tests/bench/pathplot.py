"""The picture of tests/bench/pathstate: throughput over time with path state and without (SVG 1.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from migrate.demo.timeline import ticks

__all__ = ["draw"]

Arrivals = Sequence[tuple[float, float]]  # seconds from the move, bytes

_WIDTH, _HEIGHT = 1000, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 960, 130, 470
_BEGIN, _END, _BIN = -0.4, 1.2, 0.02  # seconds
_COLOURS = "#b3124b", "#2b6cb0"
_INK, _FAINT = "#1f2933", "#7b8794"


def draw(streams: Sequence[Arrivals], shares: Sequence[float], *, runs: int, rate: float, seconds: float) -> str:
    """Of the two kinds, without and with, what arrived in a run on average, and in percent in the first ``seconds``.

    ``rate`` is the path's, in bytes a second.
    """
    highest = rate * 8e-6 * 1.35
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="13" fill="{_INK}" role="img" '
        f'aria-label="Throughput of a bulk stream that moves, with path state and without">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 38, "A bulk stream moves to another host", size=21, bold=True),
        _text(
            _LEFT,
            62,
            f"{rate * 8e-6:,.0f} Mbit/s, round trip 40 ms, cubic. What the client receives, mean of {runs} runs each.",
            colour=_FAINT,
        ),
        *_axes(highest),
    ]
    kinds = zip(("without path state", "with path state"), streams, _COLOURS, strict=True)
    for number, (words, arrivals, colour) in enumerate(kinds):
        y = 88 + 20 * number
        parts.append(f'<rect x="{_LEFT}" y="{y - 6}" width="22" height="3" fill="{colour}"/>')
        text = f"{words}: {shares[number]:.0f} % of what the path can carry in the first {seconds * 1000:.0f} ms"
        parts.append(_text(_LEFT + 30, y, text))
        points = " ".join(f"{_x(time):.1f},{_y(value, highest):.1f}" for time, value in _throughput(arrivals))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _throughput(arrivals: Arrivals) -> Iterator[tuple[float, float]]:
    """The middle of each bin, and Mbit/s."""
    bins = [0.0] * round((_END - _BEGIN) / _BIN)
    for when, size in arrivals:
        place = math.floor((when - _BEGIN) / _BIN)
        if 0 <= place < len(bins):
            bins[place] += size
    for place, size in enumerate(bins):
        yield _BEGIN + (place + 0.5) * _BIN, size * 8e-6 / _BIN


def _axes(highest: float) -> Iterator[str]:
    for value in ticks(0, highest, 6):
        y = _y(value, highest)
        yield f'<rect x="{_LEFT}" y="{y:.1f}" width="{_RIGHT - _LEFT}" height="0.7" fill="#d5dae0"/>'
        yield _text(_LEFT - 8, y + 4, f"{value:,.0f}", anchor="end", colour=_FAINT)
    yield _text(_LEFT - 8, _TOP - 4, "Mbit/s", anchor="end", colour=_FAINT)
    for value in ticks(_BEGIN * 1000, _END * 1000, 9):
        x = _x(value / 1000)
        yield f'<rect x="{x - 0.5:.1f}" y="{_BOTTOM}" width="1" height="6" fill="{_INK}"/>'
        yield _text(x, _BOTTOM + 22, f"{value:,.0f}".replace("-", "−"), anchor="middle")
    yield f'<rect x="{_LEFT}" y="{_BOTTOM}" width="{_RIGHT - _LEFT}" height="1" fill="{_INK}"/>'
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 48, "time in ms", anchor="middle", colour=_FAINT)
    yield f'<rect x="{_x(0) - 0.5:.1f}" y="{_TOP}" width="1" height="{_BOTTOM - _TOP}" fill="{_FAINT}"/>'
    yield _text(_x(0), _TOP - 5, "the move begins", anchor="middle", colour=_FAINT)


def _x(time: float) -> float:
    return _LEFT + (time - _BEGIN) / (_END - _BEGIN) * (_RIGHT - _LEFT)


def _y(value: float, highest: float) -> float:
    return _BOTTOM - min(value, highest) / highest * (_BOTTOM - _TOP)


def _text(
    x: float, y: float, words: str, *, size: int = 13, bold: bool = False, anchor: str = "start", colour: str = _INK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>'
        f"{escape(words)}</text>"
    )
