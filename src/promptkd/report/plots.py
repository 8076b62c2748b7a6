"""Curves of the logged figures as data for Plotly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from promptkd.report.curves import LOGGED, group_of, logged
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import Figure, power
from promptkd.report.story import run_labels
from promptkd.results import Results, Series
from promptkd.visible import visible

__all__ = ["Chart", "Group", "Line", "Stage", "chart_data", "stages"]

GROUP_ORDER = ("Losses", "Validation", "Responses", "Other figures", "Norms and rates", "Time")
FOLDED = ("Norms and rates", "Time")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one run."""

    name: str
    """Of the run; empty where the stage has a single one."""
    x: list[float]
    y: list[float | None]
    """In the figure's unit; None where the logged value is not finite."""

    @property
    def span(self) -> str:
        """First and last finite value: "3.36 → 2.81"."""
        finite = [value for value in self.y if value is not None]
        return " → ".join(dict.fromkeys(_short(value) for value in finite[:1] + finite[-1:])) or "not finite"

    @property
    def broken(self) -> int:
        """Logged values that are not finite."""
        return self.y.count(None)


@dataclass(frozen=True, slots=True)
class Chart:
    id: str
    figure: Figure
    lines: list[Line]

    @property
    def spoken(self) -> str:
        """The chart in words, for those who cannot see it."""
        unit = f" {self.figure.unit}" if self.figure.unit else ""
        return f"{self.figure.label}{unit}: " + " ".join(_spoken(line) for line in self.lines)


def _spoken(line: Line) -> str:
    named = f"{line.name}, " if line.name else ""
    finite = [value for value in line.y if value is not None]
    if not finite:
        return f"{named}{len(line.y)} logged values, none of them finite."
    low, high = _short(min(finite)), _short(max(finite))
    return f"{named}{line.span} over {len(line.y)} points, lowest {low}, highest {high}."


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    charts: list[Chart]
    folded: bool
    """Kept behind a summary line, since few readers need it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training, of one or several runs."""

    name: str
    runs: list[str]
    """Names of the runs, in the order of their colours; one empty name where there is a single one."""
    points: int
    groups: list[Group]
    once: list[tuple[str, str]] = field(default_factory=list)
    """Label and value of the figures that were logged a single time."""
    unread: list[str] = field(default_factory=list)
    """Names of logged figures that are not numbers."""


def stages(records: Sequence[Results]) -> list[Stage]:
    """Every stage of the `unified` records, with one chart per logged figure; stages of one name are drawn together."""
    found: dict[str, dict[str, Series]] = {}
    for run, record in zip(_run_names(records), records, strict=True):
        for series in record.history:
            runs = found.setdefault(series.name, {})
            runs[f"{run} ({len(runs) + 1})" if run in runs else run] = series
    return [_stage(name, runs, f"chart-{at}") for at, (name, runs) in enumerate(found.items())]


def _run_names(records: Sequence[Results]) -> list[str]:
    """The model that a run trained, where that says which run is meant; else the run's label."""
    trained = [next((label for label in record.models if not is_teacher(label)), "") for record in records]
    with_history = [label for label, record in zip(trained, records, strict=True) if record.history]
    return [
        label if label and with_history.count(label) == 1 else run
        for label, run in zip(trained, run_labels(records), strict=True)
    ]


def chart_data(found: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the page's script draws: numbers, units, and the names of runs, which the script escapes for Plotly."""
    return [
        {
            "id": chart.id,
            "unit": chart.figure.unit,
            "lines": [[stage.runs.index(line.name), line.x, line.y] for line in chart.lines],
            "names": [visible(name) for name in stage.runs] if len(stage.runs) > 1 else [],
        }
        for stage in found
        for group in stage.groups
        for chart in group.charts
    ]


def _stage(name: str, runs: dict[str, Series], prefix: str) -> Stage:
    shown = runs if len(runs) > 1 else dict(zip([""], runs.values(), strict=True))
    points = [point for series in shown.values() for point in series.points]
    names = list(dict.fromkeys(name for point in points for name in point if name != "step"))
    names.sort(key=lambda name: list(LOGGED).index(name) if name in LOGGED else len(LOGGED))
    groups: dict[str, list[Chart]] = {}
    once, unread = [], []
    for position, logged_name in enumerate(names):
        lines = [_line(run, logged_name, series.points) for run, series in shown.items()]
        drawn = [line for line in lines if line is not None and line.x]
        if not drawn:
            unread.append(logged_name)
        elif all(len(line.x) == 1 for line in drawn):
            once += [(_label(logged_name, line), f"{line.span} {logged(logged_name).unit}".strip()) for line in drawn]
        else:
            chart = Chart(f"{prefix}-{position}", logged(logged_name), drawn)
            groups.setdefault(group_of(logged_name), []).append(chart)
    ordered = [Group(title, groups[title], title in FOLDED) for title in GROUP_ORDER if title in groups]
    return Stage(name, list(shown), max(map(len, (series.points for series in shown.values()))), ordered, once, unread)


def _label(name: str, line: Line) -> str:
    return f"{logged(name).label} ({line.name})" if line.name else logged(name).label


def _line(run: str, name: str, points: list[dict[str, Any]]) -> Line | None:
    """None where a value under `name` is not a number."""
    figure = logged(name)
    x: list[float] = []
    y: list[float | None] = []
    for position, point in enumerate(points):
        if name not in point or point[name] is None:
            continue
        value = _as_number(point[name])
        if value is None:
            return None
        step = _as_number(point.get("step", position))
        x.append(position if step is None or not math.isfinite(step) else step)
        y.append(_rounded(value * figure.scale) if math.isfinite(value) else None)
    return Line(run, x, y)


def _as_number(value: Any) -> float | None:
    """JSON has no NaN: a record holds such a value as one of three words."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _short(value: float) -> str:
    written = f"{abs(value):.3g}" if abs(value) < 1000 else f"{abs(value):.0f}"
    return ("−" if value < 0 else "") + power(written)
