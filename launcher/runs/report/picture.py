"""The loss curve as an SVG: a line, the evaluations as dots, round numbers on both axes.

Written with the standard library's ElementTree, which escapes and closes what it writes (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree as ET

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 44
_TICKS = 5
_COLOURS = {"line": "#2563eb", "dots": "#dc2626", "grid": "#e5e7eb", "text": "#374151", "ground": "#ffffff"}


def loss_curve(losses: Points, evaluations: Points, *, title: str) -> str:
    """An SVG document; without a point, one that says so."""
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "width": str(WIDTH),
            "height": str(HEIGHT),
            "role": "img",
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    ET.SubElement(root, "title").text = title
    _add(root, "rect", width=WIDTH, height=HEIGHT, fill=_COLOURS["ground"])
    _label(root, _LEFT, 20, title, anchor="start")
    every = [*losses, *evaluations]
    if not every:
        _label(root, WIDTH / 2, HEIGHT / 2, "no loss was logged")
        return _document(root)
    across = _Axis.over([x for x, _ in every], _LEFT, WIDTH - _RIGHT)
    up = _Axis.over([y for _, y in every], HEIGHT - _BOTTOM, _TOP)
    for tick in up.ticks:
        _add(
            root, "line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=up.at(tick), y2=up.at(tick), stroke=_COLOURS["grid"]
        )
        _label(root, _LEFT - 6, up.at(tick) + 4, f"{tick:g}", anchor="end")
    for tick in across.ticks:
        _label(root, across.at(tick), HEIGHT - _BOTTOM + 18, f"{tick:,.0f}")
    _label(
        root,
        (_LEFT + WIDTH - _RIGHT) / 2,
        HEIGHT - 8,
        "step, ● on evaluation data" if evaluations else "step",
    )
    places = [(across.at(x), up.at(y)) for x, y in losses]
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        _add(root, "polyline", points=path, fill="none", stroke=_COLOURS["line"])
    elif places:
        _dot(root, *places[0], _COLOURS["line"])
    for x, y in evaluations:
        _dot(root, across.at(x), up.at(y), _COLOURS["dots"])
    return _document(root)


class _Axis:
    """Values to places, with round numbers between."""

    def __init__(self, low: float, high: float, start: float, end: float, ticks: list[float]) -> None:
        self._low, self._high, self._start, self._end = low, high, start, end
        self.ticks = ticks

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        step = _round_step((high - low) or abs(high) or 1.0)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        if low == high:
            high = low + step
        count = round((high - low) / step)
        return cls(low, high, start, end, [low + number * step for number in range(count + 1)])

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that about _TICKS are in the span."""
    rough = span / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _add(parent: ET.Element, tag: str, **values: object) -> ET.Element:
    shown = {
        name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in values.items()
    }
    return ET.SubElement(parent, tag, shown)


def _label(parent: ET.Element, x: float, y: float, text: str, *, anchor: str = "middle") -> None:
    made = _add(parent, "text", x=float(x), y=float(y), fill=_COLOURS["text"])
    made.set("text-anchor", anchor)
    made.text = text


def _dot(parent: ET.Element, x: float, y: float, colour: str) -> None:
    _add(parent, "circle", cx=float(x), cy=float(y), r=3.5, fill=colour)


def _document(root: ET.Element) -> str:
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"
