"""Exposure bias over lengths: the curves of several students on one plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from promptkd.report.decoding import curve_words
from promptkd.report.labels import is_teacher
from promptkd.results import Curve, CurvePoint, Results

__all__ = ["BiasPlot", "bias_data", "bias_plots"]

_TABLE_LENGTHS = 6


@dataclass(slots=True)
class BiasPlot:
    """Curves that can be compared: the same data and settings."""

    id: str
    data: str
    settings: str
    """In words."""
    curves: list[Curve] = field(default_factory=list)

    @property
    def lengths(self) -> list[float]:
        """A few lengths from short to long, for the table below the plot."""
        every = sorted({point.x for curve in self.curves for point in curve.points if point.value is not None})
        if len(every) <= _TABLE_LENGTHS:
            return every
        last = len(every) - 1
        return [every[round(at * last / (_TABLE_LENGTHS - 1))] for at in range(_TABLE_LENGTHS)]

    def cells(self, curve: Curve) -> list[tuple[str, str]]:
        """Value and interval at each of `lengths`; a dash where the curve is not defined."""
        found = {point.x: point for point in curve.points}
        return [_cell(found.get(length)) for length in self.lengths]


def bias_plots(records: Sequence[Results]) -> list[BiasPlot]:
    """One plot per data set and setting of the `unified` records."""
    plots: dict[tuple[str, str], BiasPlot] = {}
    for record in records:
        for curve in record.curves:
            words = curve_words(curve.settings)
            plot = plots.setdefault((curve.data, words), BiasPlot(f"bias-{len(plots)}", curve.data, words))
            plot.curves.append(curve)
    for plot in plots.values():
        plot.curves.sort(key=lambda curve: not is_teacher(curve.model))
    return list(plots.values())


def bias_data(plots: Sequence[BiasPlot], models: Sequence[str]) -> list[dict[str, Any]]:
    """What the page's script draws: numbers, and models by their position in `models`."""
    return [
        {
            "id": plot.id,
            "curves": [
                {
                    "model": models.index(curve.model),
                    "points": [
                        [point.x, _short(point.value), _short(point.low), _short(point.high)] for point in curve.points
                    ],
                }
                for curve in plot.curves
            ],
        }
        for plot in plots
    ]


def _short(value: float | None) -> float | None:
    return None if value is None or value != value or abs(value) == float("inf") else float(f"{value:.5g}")


def _cell(point: CurvePoint | None) -> tuple[str, str]:
    if point is None or point.value is None:
        return "–", ""
    interval = f"[{_percent(point.low)}, {_percent(point.high)}]" if None not in (point.low, point.high) else ""
    return _percent(point.value), interval


def _percent(value: float | None) -> str:
    """One decimal is enough beside intervals of this width; zero has no sign."""
    return "–" if value is None else f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
