"""What the page plots: the metrics that training logged, and exposure bias over lengths."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from promptkd.report.formatting import DASH, curve_words, joined, power_of_ten
from promptkd.report.labels import is_teacher, run_labels
from promptkd.report.metrics import MetricInfo, in_log_order, logged_group, logged_info
from promptkd.results import Curve, CurvePoint, Results, Series
from promptkd.visible import visible

_GROUP_ORDER = ("Losses", "Validation", "Responses", "Other metrics", "Norms and rates", "Time")


class Line(NamedTuple):
    """One metric of one run, or its mean over the seeds of a study's method."""

    name: str  # of the run or method; empty where the stage has a single one
    x: list[float]
    y: list[float | None]  # in the metric's unit; None where the logged value is not finite
    low: Sequence[float | None] = ()  # the least and the largest of the seeds, as long as `x`; empty for a single run
    high: Sequence[float | None] = ()

    @property
    def span(self) -> str:
        """First and last finite value: "3.36 → 2.81"."""
        finite = [_short(value) for value in self.y if value is not None]
        return " → ".join(dict.fromkeys(finite[:1] + finite[-1:])) or "not finite"

    @property
    def spoken(self) -> str:
        named = f"{self.name}, " if self.name else ""
        finite = [value for value in self.y if value is not None]
        if not finite:
            return f"{named}{len(self.y)} logged values, none of them finite."
        low, high = _short(min(finite)), _short(max(finite))
        return f"{named}{self.span} over {len(self.y)} points, lowest {low}, highest {high}."


class Chart(NamedTuple):
    id: str
    info: MetricInfo
    lines: list[Line]
    same: list[str]  # labels of further metrics with the very same curves, which have no chart of their own
    not_finite: list[tuple[str, int, int]]  # of each run with such values: its name, how many, and of how many

    @property
    def spoken(self) -> str:  # for those who cannot see it
        return f"{joined(self.info.label, self.info.unit, by=' ')}: {' '.join(line.spoken for line in self.lines)}"


class Stage(NamedTuple):
    """One stage of training, of one or several runs."""

    name: str
    runs: list[str]  # names of the lines, in the order of their colors; one empty name where there is a single one
    seeds: int  # the most that one line is the mean of; 0 where each line is a run
    points: int
    groups: dict[str, list[Chart]]  # by title
    once: list[tuple[str, str]]  # label and value of the metrics that were logged a single time
    not_numbers: list[str]  # names of what was logged, but not as numbers


def stages(records: Sequence[Results]) -> list[Stage]:
    """Every stage of the `unified` records, one chart per logged metric; stages of one name are plotted together.

    The runs of a study are plotted by method, as the mean over its seeds.
    """
    found: dict[str, dict[str, Series]] = {}
    methods = {label for record in records if record.kind == "study" for label in record.training}
    for run, record in zip(_run_names(records), records, strict=True):
        for series in record.history:
            runs = found.setdefault(series.name, {})
            runs[f"{run} ({len(runs) + 1})" if run in runs else run] = series
    return [_stage(name, runs, f"chart-{at}", methods) for at, (name, runs) in enumerate(found.items())]


def _run_names(records: Sequence[Results]) -> list[str]:
    """The model that a run trained, where only this run trained it; else the run's label."""
    trained = [next((label for label in record.models if not is_teacher(label)), "") for record in records]
    counts = Counter(label for label, record in zip(trained, records, strict=True) if label and record.history)
    return [label if counts[label] == 1 else run for label, run in zip(trained, run_labels(records), strict=True)]


def chart_data(found: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the page's script draws: numbers, units, and the names of runs, which the script escapes for Plotly."""
    data = []
    for stage in found:
        names = list(map(visible, stage.runs)) if len(stage.runs) > 1 else []
        for chart in (chart for group in stage.groups.values() for chart in group):
            lines = [[stage.runs.index(line.name), line.x, line.y, line.low, line.high] for line in chart.lines]
            data.append({"id": chart.id, "unit": chart.info.unit, "lines": lines, "names": names})
    return data


def _stage(name: str, runs: dict[str, Series], prefix: str, methods: Collection[str]) -> Stage:
    runs = runs if len(runs) > 1 else {"": next(iter(runs.values()))}
    groups_of = {run: method if (method := run.rpartition("-seed-")[0]) in methods else run for run in runs}
    seeds = max(Counter(groups_of.values()).values())
    names = dict.fromkeys(name for series in runs.values() for point in series.points for name in point)
    groups: dict[str, list[Chart]] = {title: [] for title in _GROUP_ORDER}
    once, not_numbers = [], []
    for position, logged in enumerate(in_log_order(name for name in names if name != "step")):
        info = logged_info(logged)
        lines = [line for run, series in runs.items() if (line := _line(run, info, series.points)) and line.x]
        if not lines:
            not_numbers.append(logged)
        elif all(len(line.x) == 1 for line in lines):
            labels = [f"{info.label} ({line.name})" if line.name else info.label for line in lines]
            once += [(label, f"{line.span} {info.unit}".strip()) for label, line in zip(labels, lines, strict=True)]
        else:
            not_finite = [(line.name, line.y.count(None), len(line.y)) for line in lines if None in line.y]
            shown = _by_method(lines, groups_of) if seeds > 1 else lines
            chart = Chart(f"{prefix}-{position}", info, shown, [], not_finite)
            twin = next((each for group in groups.values() for each in group if _are_same(each, chart)), None)
            if twin is None:
                groups[logged_group(logged)].append(chart)
            else:
                twin.same.append(info.label)
    points = max(len(series.points) for series in runs.values())
    charts = {title: group for title, group in groups.items() if group}
    names_of_lines = list(dict.fromkeys(groups_of.values()))
    return Stage(name, names_of_lines, seeds if seeds > 1 else 0, points, charts, once, not_numbers)


def _by_method(lines: list[Line], methods: Mapping[str, str]) -> list[Line]:
    """The runs of one method as one line: mean, least and largest of the seeds that logged a finite value at a step."""
    found = []
    for method in dict.fromkeys(methods[line.name] for line in lines):
        at: dict[float, list[float]] = {}
        for line in (line for line in lines if methods[line.name] == method):
            for step, value in zip(line.x, line.y, strict=True):
                at.setdefault(step, []).extend([] if value is None else [value])
        steps = sorted(at)
        picks = (fmean, min, max)
        means, low, high = ([_rounded(pick(at[x]), 6) if at[x] else None for x in steps] for pick in picks)
        found.append(Line(method, steps, means, low, high))
    return found


def _are_same(one: Chart, other: Chart) -> bool:
    """Whether two metrics of one unit have the same values, but for rounding, at the same steps of the same runs."""
    if one.info.unit != other.info.unit or len(one.lines) != len(other.lines):
        return False
    pairs = zip(one.lines, other.lines, strict=True)
    return all(a.name == b.name and a.x == b.x and all(map(_is_close, a.y, b.y)) for a, b in pairs)


def _is_close(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-9)


def _line(run: str, info: MetricInfo, points: list[dict[str, Any]]) -> Line | None:
    """None where one of the values is not a number."""
    line = Line(run, [], [])
    for position, point in enumerate(points):
        if point.get(info.name) is not None:
            value, step = _as_number(point[info.name]), _as_number(point.get("step", position))
            if value is None:
                return None
            line.x.append(position if step is None or not math.isfinite(step) else step)
            line.y.append(_rounded(value * info.scale, 6))
    return line


def _as_number(value: Any) -> float | None:
    words = ("NaN", "Infinity", "-Infinity")  # JSON has no NaN: a record holds such a value as one of these
    is_number = value in words if isinstance(value, str) else type(value) in (int, float)
    return float(value) if is_number else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def _short(value: float) -> str:
    written = f"{abs(value):.3g}" if abs(value) < 1000 else f"{abs(value):.0f}"
    return ("−" if value < 0 else "") + power_of_ten(written)


MOST_BANDS = 4  # intervals of more curves, one over the other, show nothing: the page draws those that are chosen


class BiasKind(NamedTuple):
    """What the curves of a plot of exposure bias show."""

    x: str
    y: str
    at: str  # of what the table below the plot has a column for each
    symbol: str
    sentence: str
    told: str = ""  # what the plot shows, where it is not the value over lengths


_LENGTH = "response length l, tokens"
_KINDS = {
    "exposure_bias": BiasKind(_LENGTH, "ExAccErr(l), %", "at length", "l", "ExAccErr(l) in %, l in tokens."),
    "exposure_bias_difference": BiasKind(
        _LENGTH,
        "difference in ExAccErr(l), percentage points",
        "at length",
        "l",
        "Difference in ExAccErr(l) in percentage points, l in tokens.",
        "differences",
    ),
    "exposure_bias_by_step": BiasKind(
        "optimizer step", "ExAccErr(l), %", "after step", "step", "ExAccErr(l) in %, by optimizer step.", "by step"
    ),
}


@dataclass(slots=True)
class BiasPlot:
    """Curves that can be compared: of one kind, data set and settings."""

    id: str
    data: str
    settings: str  # in words
    kind: BiasKind = _KINDS["exposure_bias"]
    curves: list[Curve] = field(default_factory=list)

    @property
    def title(self) -> str:
        return joined(self.data, self.kind.told)

    @property
    def lengths(self) -> list[float]:
        """Up to six, for the table below the plot."""
        every = sorted({point.x for curve in self.curves for point in curve.points if point.value is not None})
        steps = min(len(every), 6) - 1
        return [every[round(at * (len(every) - 1) / max(steps, 1))] for at in range(steps + 1)]

    def cells(self, curve: Curve) -> list[tuple[str, str]]:
        """Value and interval at each of `lengths`; a dash where the curve is not defined."""
        cells = {each.x: (_percent(each.value), _interval(each)) for each in curve.points if each.value is not None}
        return [cells.get(length, (DASH, "")) for length in self.lengths]


def bias_plots(records: Sequence[Results]) -> list[BiasPlot]:
    """One plot per kind, data set and setting of the `unified` records."""
    plots: dict[tuple[str, str, str], BiasPlot] = {}
    curves = [curve for record in records for curve in record.curves]
    for curve in sorted(curves, key=lambda curve: list(_KINDS).index(curve.name)):
        words, kind = curve_words(curve.settings), _KINDS[curve.name]
        plot = BiasPlot(f"bias-{len(plots)}", curve.data, words, kind)
        plot = plots.setdefault((curve.name, curve.data, words), plot)
        plot.curves = sorted([*plot.curves, curve], key=lambda curve: not is_teacher(curve.model))
    return list(plots.values())


def bias_data(plots: Sequence[BiasPlot], models: Sequence[str]) -> list[dict[str, Any]]:
    """What the page's script draws: numbers, and models by their position in `models`."""

    def drawn(curve: Curve) -> dict[str, Any]:
        points = [[each.x, *(_rounded(end, 5) for end in (each.value, each.low, each.high))] for each in curve.points]
        return {"model": models.index(curve.model), "points": points}

    return [
        {"id": each.id, "x": each.kind.x, "y": each.kind.y, "curves": list(map(drawn, each.curves))} for each in plots
    ]


def _interval(point: CurvePoint) -> str:
    return "" if point.low is None or point.high is None else f"[{_percent(point.low)}, {_percent(point.high)}]"


def _percent(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
