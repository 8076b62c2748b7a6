"""What a paired difference allows one to say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from promptkd.report.metrics import Figure, estimate, metric
from promptkd.report.story import run_labels
from promptkd.results import Difference, Results

__all__ = ["DifferenceRow", "Verdict", "difference_table", "verdict"]

Verdict = Literal["better", "worse", "tied", "open"]
"""tied: the interval holds zero, or a test does not rule chance out. open: no interval, so nothing can be said."""
LEVEL = 0.05
"""Largest adjusted p that speaks for a difference, beside an interval of 1 - `LEVEL`."""


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    run: str
    model: str
    baseline: str
    data: str
    figure: Figure
    verdict: Verdict
    change: str
    """"lower" or "higher": where the interval lies; "" when tied or open."""
    value: str
    """Signed, model less baseline."""
    interval: str | None
    size: str
    """Without its sign: "0.30 [0.25, 0.36]"."""
    rows: int | None
    source: Difference

    @property
    def words(self) -> str:
        """The verdict in two or three words."""
        if self.verdict in ("better", "worse"):
            return f"{self.change}, {self.verdict}"
        return "cannot be told apart" if self.verdict == "tied" else "no interval"


def verdict(difference: Difference) -> Verdict:
    """Only an interval that lies wholly on one side of zero, with the value, speaks for either model.

    Where the difference was tested, its adjusted p must be at most `LEVEL` too: the interval knows nothing of the other
    differences that were looked at.
    """
    value, low, high = difference.difference.value, difference.difference.low, difference.difference.high
    if low is None or high is None or not (math.isfinite(value) and low <= high):
        return "open"
    if difference.p_adjusted is not None and not difference.p_adjusted <= LEVEL and low <= value <= high:
        return "tied"
    if low > 0 and value > 0:
        return "better" if difference.better == "higher" else "worse"
    if high < 0 and value < 0:
        return "better" if difference.better == "lower" else "worse"
    return "tied" if low <= 0 <= high else "open"


def difference_table(records: Sequence[Results]) -> list[DifferenceRow]:
    """One row per recorded difference of the `unified` records, in their order.

    `run` is empty where no second record compares the same pair on the same data.
    """
    labels = run_labels(records)
    runs: dict[tuple[str, str, str], set[int]] = {}
    for index, record in enumerate(records):
        for each in record.differences:
            runs.setdefault((each.model, each.baseline, each.data), set()).add(index)
    return [
        _row(labels[index] if len(runs[each.model, each.baseline, each.data]) > 1 else "", each)
        for index, record in enumerate(records)
        for each in record.differences
    ]


def _row(run: str, difference: Difference) -> DifferenceRow:
    figure, measured = metric(difference.metric), difference.difference
    found = verdict(difference)
    told_apart = found in ("better", "worse")
    value, interval = estimate(figure, measured, signed=True)
    size, size_interval = estimate(figure, measured, flip=told_apart and measured.value < 0)
    return DifferenceRow(
        run=run,
        model=difference.model,
        baseline=difference.baseline,
        data=difference.data,
        figure=figure,
        verdict=found,
        change=("higher" if measured.value > 0 else "lower") if told_apart else "",
        value=value,
        interval=interval,
        size=f"{size} {size_interval}" if size_interval else size,
        rows=measured.rows,
        source=difference,
    )
