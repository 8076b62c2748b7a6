"""The table of evaluations: one row per model, data set and decoding, one column per metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from promptkd.report.decoding import decoding_words
from promptkd.report.differences import verdict
from promptkd.report.labels import is_teacher
from promptkd.report.metrics import Better, deviation, estimate, in_order, metric
from promptkd.report.story import run_labels
from promptkd.results import Difference, Metric, Results

__all__ = ["Cell", "ComparisonRow", "by_setting", "comparison_table", "metric_columns", "model_order"]


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    interval: str | None
    deviation: str | None
    """ "± 0.4": the standard deviation between the seeds."""
    rows: int | None
    best: bool
    """Among the students of this data set and decoding the best, or not told apart from the best (see `_marked`)."""
    source: Metric


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    run: str
    """Empty unless two records measured the same model in the same way with different outcomes."""
    model: str
    data: str
    decoding: str
    """In words."""
    cells: dict[str, Cell]
    """By metric name; a metric that was not measured has no cell."""


@dataclass(slots=True)
class _Entry:
    run: str
    model: str
    data: str
    decoding: str
    metrics: dict[str, Metric]
    paired: list[Difference] = field(default_factory=list)
    """Differences over the very rows and decoding of this entry."""

    @property
    def setting(self) -> tuple[str, str]:
        """Figures are comparable where data and decoding are the same."""
        return self.data, self.decoding


def metric_columns(records: Sequence[Results]) -> list[str]:
    """Names of every metric that an evaluation holds, in the order of the columns."""
    return in_order(name for record in records for evaluation in record.evaluations for name in evaluation.metrics)


def model_order(records: Sequence[Results]) -> list[str]:
    """Every model that was measured, teachers first, then in the order of the records."""
    measured = [each.model for record in records for each in record.evaluations]
    measured += [each.model for record in records for each in record.curves]
    return sorted(dict.fromkeys(measured), key=lambda label: not is_teacher(label))


def comparison_table(records: Sequence[Results]) -> list[ComparisonRow]:
    """One row per model, data set and decoding of the `unified` records, settings of the same kind together.

    What several records measured of the same model in the same way stands in one row, unless they disagree.
    """
    entries = _entries(records)
    settings = list(dict.fromkeys(entry.setting for entry in entries))
    models = model_order(records)
    entries.sort(key=lambda entry: (settings.index(entry.setting), models.index(entry.model)))
    marked = {name: _marked_everywhere(name, entries) for name in metric_columns(records)}
    return [_row(position, entry, marked) for position, entry in enumerate(entries)]


def by_setting(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    """ "dolly_test, greedy, up to 256 tokens" -> the rows that can be compared."""
    groups: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        groups.setdefault(", ".join(part for part in (row.data, row.decoding) if part), []).append(row)
    return groups


def _entries(records: Sequence[Results]) -> list[_Entry]:
    found: dict[tuple[str, str, str], list[_Entry]] = {}
    for record, run in zip(records, run_labels(records), strict=True):
        for each in record.evaluations:
            words = decoding_words(each.decoding)
            same = found.setdefault((each.data, words, each.model), [])
            agreeing = next((entry for entry in same if _agree(entry.metrics, each.metrics)), None)
            entry = agreeing or _Entry(run, each.model, each.data, words, {})
            entry.metrics = {**each.metrics, **entry.metrics}
            entry.paired += _paired(record, each.data, words, each.model)
            if agreeing is None:
                same.append(entry)
    for entries in found.values():
        if len(entries) == 1:
            entries[0].run = ""
    return [entry for entries in found.values() for entry in entries]


def _agree(ours: dict[str, Metric], theirs: dict[str, Metric]) -> bool:
    shared = ours.keys() & theirs.keys()
    return all(math.isclose(ours[name].value, theirs[name].value, rel_tol=1e-6, abs_tol=1e-9) for name in shared)


def _paired(record: Results, data: str, decoding: str, model: str) -> list[Difference]:
    """The record's differences of `model` on `data`, if they can only be about this decoding."""
    decodings = {decoding_words(each.decoding) for each in record.evaluations if each.data == data}
    names = {f"{data}, {decoding}", *([data] if decodings == {decoding} else [])}
    return [each for each in record.differences if each.data in names and model in (each.model, each.baseline)]


def _row(position: int, entry: _Entry, marked: dict[str, set[int]]) -> ComparisonRow:
    cells = {}
    for name, measured in entry.metrics.items():
        value, interval = estimate(metric(name), measured)
        spread = deviation(metric(name), measured)
        cells[name] = Cell(value, interval, spread, measured.rows, position in marked[name], measured)
    return ComparisonRow(entry.run, entry.model, entry.data, entry.decoding, cells)


def _marked_everywhere(name: str, entries: list[_Entry]) -> set[int]:
    groups: dict[tuple[str, str], dict[int, _Entry]] = {}
    for position, entry in enumerate(entries):
        if not is_teacher(entry.model) and name in entry.metrics:
            groups.setdefault(entry.setting, {})[position] = entry
    better = metric(name).better
    return set().union(*(_marked(name, better, group) for group in groups.values())) if better else set()


def _marked(name: str, better: Better, students: dict[int, _Entry]) -> set[int]:
    """Positions of the best student and of those that cannot be told apart from it.

    Empty where that says nothing: fewer than two students, a figure without an interval, or no student told apart.
    """
    figures = {position: entry.metrics[name] for position, entry in students.items()}
    if len(students) < 2 or not all(_has_interval(figure) for figure in figures.values()):
        return set()
    pick = min if better == "lower" else max
    lead = pick(figures, key=lambda position: figures[position].value)
    tied = {position for position in students if not _told_apart(name, students[lead], students[position])}
    return tied if len(tied) < len(students) else set()


def _has_interval(measured: Metric) -> bool:
    ends = (measured.low, measured.value, measured.high)
    return all(end is not None and math.isfinite(end) for end in ends)


def _told_apart(name: str, lead: _Entry, other: _Entry) -> bool:
    """By the paired difference where a record holds one, else by intervals that do not overlap."""
    if lead is other:
        return False
    for difference in lead.paired:
        if difference.metric == name and {difference.model, difference.baseline} == {lead.model, other.model}:
            return verdict(difference) == ("better" if difference.model == lead.model else "worse")
    ours, theirs = lead.metrics[name], other.metrics[name]
    ends = (ours.low, ours.high, theirs.low, theirs.high)
    low, high, other_low, other_high = (math.nan if end is None else end for end in ends)
    return high < other_low or other_high < low
