"""Line charts, forest and scatter plots as SVG: text stays text, the same numbers give the same bytes, on any scheme.

A page shows them as images, which see neither its style sheet nor its choice of a dark scheme. So the background is
transparent, and every color has a contrast of 3 or more with both white and near black, and text of 4 or more, but for
the names in scatter plots, which have the colors of their points.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, NamedTuple

from benchmarks.evidence.studies import Point
from promptkd.report.formatting import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 256, 44, 10, 26, 40  # of the plot with its axes
_LINE = 17  # height of a line of the legend
_ROW = 20  # height of a row of a forest plot
_FEW = 8  # points of a scatter plot whose names find room in its usual height; each further one adds to that
_CHARACTER, _WIDE = 6.4, 7.2  # width of a character at this size of text, a mean one and one of a short wide name
_GRAY = "#7b7f87"
_COLORS = ("#3a83c9", "#d3622b", "#2b9a68", "#b56bb8", "#a98a1d", "#d5496b", "#2795a5", "#8a7a5c")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """One series; a `level` is a horizontal line at its only point, for what the axis does not vary."""

    name: str
    points: Sequence[Point]
    kind: Literal["band", "whiskers", "level"] = "band"


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    names: Sequence[str] = field(default_factory=tuple)  # of categories at 0, 1, 2, …


@dataclass(frozen=True)
class Interval:
    """A row of a forest plot; a claim is large and in color, anything else gray."""

    name: str
    value: float
    low: float
    high: float
    is_claimed: bool


class Mark(NamedTuple):
    """A point of a scatter plot, with the ends of its bar along x."""

    point: Point
    left: float
    right: float


def forest(title: str, rows: Sequence[Interval], x: Axis) -> str:
    """An image of differences, a row each with its interval, about a line at zero."""
    left = _WIDE * max(len(row.name) for row in rows) + 14
    foot = _TOP + _ROW * len(rows)
    ends = [0.0, *(end for row in rows for end in (row.low, row.value, row.high))]
    _, _, at_x = _scale(ends, x, left, _WIDTH - _RIGHT)
    parts = [f'<path d="M{left:.0f} {foot}H{_WIDTH - _RIGHT}" fill="none" stroke="{_GRAY}"/>']
    parts += [f'<path d="M{at_x(0.0)} {_TOP - 6}V{foot}" stroke="{_GRAY}" stroke-dasharray="3 3"/>']
    for value, text in at_x.ticks():
        parts.append(f'<text x="{at_x(value)}" y="{foot + 15}" text-anchor="middle">{escape(text)}</text>')
    for at, row in enumerate(rows):
        y, color = _TOP + _ROW * at + _ROW // 2, _COLORS[0] if row.is_claimed else _GRAY
        parts.append(f'<text x="{left - 8:.0f}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(f'<path d="M{at_x(row.low)} {y}H{at_x(row.high)}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{at_x(row.value)}" cy="{y}" r="{4.5 if row.is_claimed else 3}" fill="{color}"/>')
    half = _WIDE * len(x.label) / 2
    middle = max(half, min((left + _WIDTH - _RIGHT) / 2, _WIDTH - half))  # all of it within the image
    parts.append(f'<text x="{middle:.0f}" y="{foot + 32}" text-anchor="middle">{escape(x.label)}</text>')
    return _image(title, parts, foot + _BOTTOM)


def chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """An image of the lines, with a legend below them where there are several."""
    ranged = [line for line in lines if line.kind != "level"] or lines
    left, right, at_x = _scale([p.x for line in ranged for p in line.points], x, _LEFT, _WIDTH - _RIGHT)
    ends = [end for line in lines for p in line.points for end in (p.low, p.value, p.high)]
    _, _, at_y = _scale(ends, y, _HEIGHT - _BOTTOM, _TOP)
    parts = _axes(at_x, at_y, x, y)
    parts += [_drawn(line, at, at_x, at_y, (left, right)) for at, line in enumerate(lines)]
    legend, height = _legend(lines) if len(lines) > 1 else ("", _HEIGHT)
    return _image(title, [*parts, *([legend] if legend else [])], height)


def scatter(title: str, marks: Mapping[str, Mark], x: Axis, y: Axis) -> str:
    """An image of points with bars both ways and names, each put where it covers nothing, nearest to its own point."""
    points, height = [mark.point for mark in marks.values()], _HEIGHT + _LINE * max(0, len(marks) - _FEW)
    _, _, at_x = _scale([end for mark in marks.values() for end in (mark.left, mark.right)], x, _LEFT, _WIDTH - _RIGHT)
    _, _, at_y = _scale([end for point in points for end in (point.low, point.high)], y, height - _BOTTOM, _TOP)
    parts, taken = _axes(at_x, at_y, x, y, height), []
    dots = {name: (at_x(mark.point.x), at_y(mark.point.value)) for name, mark in marks.items()}
    colors = dict(zip(dots, itertools.cycle(_COLORS), strict=False))
    for name, (left, top) in dots.items():
        mark = marks[name]
        across, along = (at_x(mark.left), at_x(mark.right)), (at_y(mark.point.high), at_y(mark.point.low))
        bars = f"M{left} {along[0]}V{along[1]}M{across[0]} {top}H{across[1]}"
        parts.append(f'<path d="{bars}" stroke="{colors[name]}" stroke-opacity=".6"/>')
        parts.append(f'<circle cx="{left}" cy="{top}" r="3.5" fill="{colors[name]}"/>')
        taken += [_Box(left - 4, left + 4, top - 4, top + 4)]
        taken += [_Box(left - 1, left + 1, *along), _Box(*across, top - 1, top + 1)]
    for name, (left, top) in sorted(dots.items(), key=lambda dot: -dot[1][0]):  # the right edge has the least room
        others = [dot for other, dot in dots.items() if other != name]
        box = _free_box(_WIDE * len(name), (left, top), others, taken, height - _BOTTOM)
        taken.append(box)
        at = f'x="{box.left:.0f}" y="{box.bottom - 3:.0f}"'
        parts.append(f'<text {at} fill="{colors[name]}">{escape(name)}</text>')
    return _image(title, parts, height)


class _Box(NamedTuple):
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def distance(self, x: float, y: float) -> float:
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.top - y, 0, y - self.bottom))


def _free_box(
    width: float, own: tuple[float, float], others: Sequence[tuple[float, float]], taken: Sequence[_Box], foot: float
) -> _Box:
    """For a name of a point: beside, above or below it, where it meets the fewest of what is taken, then of the others
    is nearer to the fewest than to its own. It stays above the axis at `foot`.
    """
    x, y = own
    places = (x + 6, x - 6 - width, x + 2, x - 2 - width, x - width / 2)
    lefts = [left for left in places if _LEFT <= left <= _WIDTH - width] or [max(4.0, _WIDTH - width)]
    tops = [top for top in (y - 6, y - 17, y + 5, y - 28, y + 16, y - 40, y + 28) if _TOP - 12 <= top <= foot - 12]
    boxes = [_Box(left, left + width, top, top + 12) for top in tops for left in lefts]

    def wrongs(box: _Box) -> tuple[int, int]:
        away = box.distance(x, y)
        return sum(map(box.meets, taken)), sum(box.distance(*other) <= away for other in others)

    return min(boxes, key=wrongs)  # the first of equal ones


def _image(title: str, parts: Sequence[str], height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="560" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_GRAY}"><title>{escape(title)}</title>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


class _Place:
    """From a value on an axis to the image's units, and back to the axis's round values."""

    def __init__(self, low: float, high: float, axis: Axis, first: float, last: float):
        self._log, self._names = axis.log, axis.names
        self._low, self._high = (math.log10(low), math.log10(high)) if axis.log else (low, high)
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        share = ((math.log10(value) if self._log else value) - self._low) / (self._high - self._low)
        return round(self._first + share * (self._last - self._first), 1)

    def ticks(self) -> list[tuple[float, str]]:
        if self._names:
            return [(float(at), name) for at, name in enumerate(self._names)]
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            span = self._high - self._low
            steps = (1,) if span > 2 else (1, 3) if span > 1 else (1, 1.5, 2, 3, 5, 7)
            values = [step * 10.0**power for power in powers for step in steps]
            return [(v, f"{v:g}") for v in values if self._low - 1e-9 <= math.log10(v) <= self._high + 1e-9]
        step = _round_step((self._high - self._low) / 6)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        count = math.floor((self._high + step * 1e-6) / step)
        values = [at * step for at in range(math.ceil((self._low - step * 1e-6) / step), count + 1)]
        return [(value, number(round(value, decimals), decimals)) for value in values]


def _scale(values: Sequence[float], axis: Axis, first: float, last: float) -> tuple[float, float, _Place]:
    low, high = min(values), max(values)
    if axis.names:
        low, high = -0.4, len(axis.names) - 0.6
    elif axis.log:
        low, high = low / 1.15, high * 1.15
    else:
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
    return low, high, _Place(low, high, axis, first, last)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _axes(at_x: _Place, at_y: _Place, x: Axis, y: Axis, height: int = _HEIGHT) -> list[str]:
    foot = height - _BOTTOM
    parts = [f'<path d="M{_LEFT} {_TOP}V{foot}H{_WIDTH - _RIGHT}" fill="none" stroke="{_GRAY}"/>']
    for value, text in at_x.ticks():
        parts.append(f'<text x="{at_x(value)}" y="{foot + 15}" text-anchor="middle">{escape(text)}</text>')
    for value, text in at_y.ticks():
        level = at_y(value)
        parts.append(f'<path d="M{_LEFT} {level}H{_WIDTH - _RIGHT}" stroke="{_GRAY}" stroke-opacity=".25"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{level + 4}" text-anchor="end">{escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{foot + 32}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text x="4" y="13">{escape(y.label)}</text>')
    return parts


def _stroke(at: int) -> str:
    dashes = _DASHES[(at + at // len(_COLORS)) % len(_DASHES)]
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'stroke="{_COLORS[at % len(_COLORS)]}" stroke-width="2"{dash}'


def _drawn(line: Line, at: int, at_x: _Place, at_y: _Place, span: tuple[float, float]) -> str:
    """The mean as a line, and its interval as a band or as whiskers."""
    color, stroke = _COLORS[at % len(_COLORS)], _stroke(at)
    points = line.points
    if line.kind == "level":
        points = [points[0]._replace(x=end) for end in span]
    parts = []
    if line.kind == "whiskers":
        for point in points:
            x, value = at_x(point.x), at_y(point.value)
            parts.append(f'<path d="M{x} {at_y(point.low)}V{at_y(point.high)}" stroke="{color}"/>')
            parts.append(f'<circle cx="{x}" cy="{value}" r="3" fill="{color}"/>')
    elif any(point.low < point.high for point in points):
        edge = [(p.x, p.high) for p in points] + [(p.x, p.low) for p in reversed(points)]
        path = "L".join(f"{at_x(x)} {at_y(y)}" for x, y in edge)
        parts.append(f'<path d="M{path}Z" fill="{color}" fill-opacity=".15"/>')
    path = "L".join(f"{at_x(p.x)} {at_y(p.value)}" for p in points)
    return "\n".join([*parts, f'<path d="M{path}" fill="none" {stroke}/>'])


def _legend(lines: Sequence[Line]) -> tuple[str, int]:
    """The names, as many side by side as fit, and the height of the image with them."""
    parts, x, y = [], 4.0, _HEIGHT + 10
    for at, line in enumerate(lines):
        width = 34 + _CHARACTER * len(line.name)
        if x > 4 and x + width > _WIDTH:
            x, y = 4.0, y + _LINE
        parts.append(f'<path d="M{x:.0f} {y - 4}h20" {_stroke(at)}/>')
        parts.append(f'<text x="{x + 25:.0f}" y="{y}">{escape(line.name)}</text>')
        x += width + 8
    return "\n".join(parts), y + 8
