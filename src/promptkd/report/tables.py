"""The tables: evaluations (one row per model, data set and decoding), and what the models cost to train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from promptkd.report.differences import verdict
from promptkd.report.formatting import DASH, decoding_words, deviation, duration, estimate, millions, number
from promptkd.report.labels import TEACHER, is_teacher, run_labels
from promptkd.report.metrics import in_order, metric_info
from promptkd.results import Better, Difference, Metric, ModelRecord, Results, Training


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    interval: str | None
    deviation: str | None
    """ "± 0.4": the standard deviation between the seeds."""
    best: bool
    """Among the students of this data set and decoding the best, or not told apart from the best (see `_marked`)."""


@dataclass(slots=True)
class ComparisonRow:
    run: str
    """Empty unless two records measured the same model in the same way with different outcomes."""
    model: str
    data: str
    decoding: str
    """In words."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    paired: list[Difference] = field(default_factory=list)
    """Differences over the very rows and decoding of this row."""
    cells: dict[str, Cell] = field(default_factory=dict)
    """By metric name; a metric that was not measured has no cell."""

    @property
    def setting(self) -> str:
        """ "dolly_test, greedy, up to 256 tokens": rows of one setting can be compared."""
        return ", ".join(part for part in (self.data, self.decoding) if part)


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
    rows = _rows(records)
    settings = list(dict.fromkeys((row.data, row.decoding) for row in rows))
    models = model_order(records)
    rows.sort(key=lambda row: (settings.index((row.data, row.decoding)), models.index(row.model)))
    marked = {name: _marked_everywhere(name, rows) for name in metric_columns(records)}
    for position, row in enumerate(rows):
        for name, measured in row.metrics.items():
            info = metric_info(name)
            value, interval = estimate(info, measured)
            row.cells[name] = Cell(value, interval, deviation(info, measured), position in marked[name])
    return rows


def by_setting(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    """The rows that can be compared, by their setting."""
    groups: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    return groups


def _rows(records: Sequence[Results]) -> list[ComparisonRow]:
    found: dict[tuple[str, str, str], list[ComparisonRow]] = {}
    for record, run in zip(records, run_labels(records), strict=True):
        for each in record.evaluations:
            words = decoding_words(each.decoding)
            same = found.setdefault((each.data, words, each.model), [])
            agreeing = [row for row in same if _agree(row.metrics, each.metrics)]
            row = agreeing[0] if agreeing else ComparisonRow(run, each.model, each.data, words)
            row.metrics = {**each.metrics, **row.metrics}
            row.paired += _paired(record, each.data, words, each.model)
            if not agreeing:
                same.append(row)
    for rows in found.values():
        if len(rows) == 1:
            rows[0].run = ""
    return [row for rows in found.values() for row in rows]


def _agree(ours: dict[str, Metric], theirs: dict[str, Metric]) -> bool:
    shared = ours.keys() & theirs.keys()
    return all(math.isclose(ours[name].value, theirs[name].value, rel_tol=1e-6, abs_tol=1e-9) for name in shared)


def _paired(record: Results, data: str, decoding: str, model: str) -> list[Difference]:
    """The record's differences of `model` on `data`, if they can only be about this decoding."""
    decodings = {decoding_words(each.decoding) for each in record.evaluations if each.data == data}
    names = {f"{data}, {decoding}", *([data] if decodings == {decoding} else [])}
    return [each for each in record.differences if each.data in names and model in (each.model, each.baseline)]


def _marked_everywhere(name: str, rows: list[ComparisonRow]) -> set[int]:
    groups: dict[tuple[str, str], dict[int, ComparisonRow]] = {}
    for position, row in enumerate(rows):
        if not is_teacher(row.model) and name in row.metrics:
            groups.setdefault((row.data, row.decoding), {})[position] = row
    better = metric_info(name).better
    return set().union(*(_marked(name, better, group) for group in groups.values())) if better else set()


def _marked(name: str, better: Better, students: dict[int, ComparisonRow]) -> set[int]:
    """Positions of the best student and of those that cannot be told apart from it.

    Empty where that says nothing: fewer than two students, a metric without an interval, or no student told apart.
    """
    metrics = {position: row.metrics[name] for position, row in students.items()}
    if len(students) < 2 or not all(_has_interval(each) for each in metrics.values()):
        return set()
    pick = min if better == "lower" else max
    lead = pick(metrics, key=lambda position: metrics[position].value)
    tied = {position for position in students if not _told_apart(name, students[lead], students[position])}
    return tied if len(tied) < len(students) else set()


def _has_interval(measured: Metric) -> bool:
    ends = (measured.low, measured.value, measured.high)
    return all(end is not None and math.isfinite(end) for end in ends)


def _told_apart(name: str, lead: ComparisonRow, other: ComparisonRow) -> bool:
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


@dataclass(frozen=True, slots=True)
class Cost:
    model: str
    parameters: int | None
    share: float | None
    """Of the teacher's parameters, in 0..1; None without a teacher and for a teacher."""
    training: Training | None


def costs(records: Sequence[Results]) -> list[Cost]:
    """One row per model of the `unified` records that has a size or a cost of training, teachers first."""
    sizes: dict[str, ModelRecord] = {}
    training: dict[str, Training] = {}
    for record in records:
        sizes, training = {**record.models, **sizes}, {**record.training, **training}
    teacher = sizes[TEACHER].parameters if TEACHER in sizes else 0
    found = []
    for label in sorted(dict.fromkeys([*sizes, *training]), key=lambda label: not is_teacher(label)):
        size = sizes[label].parameters if label in sizes else None
        share = size / teacher if size is not None and teacher and not is_teacher(label) else None
        found.append(Cost(label, size, share, training.get(label)))
    return found


def cost_table(records: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a column without a value for any model is left out."""
    heads = ["Model", "Parameters", "Share of the teacher", "Method", "Steps", "Time", "Tokens/s", "Peak memory"]
    lines = [_cost_cells(cost) for cost in costs(records)]
    kept = [column for column in range(len(heads)) if any(line[column] for line in lines)]
    return [heads[column] for column in kept], [[line[column] or DASH for column in kept] for line in lines]


def _cost_cells(cost: Cost) -> list[str]:
    size = "" if cost.parameters is None else millions(cost.parameters)
    cells = [cost.model, size, "" if cost.share is None else f"{cost.share * 100:.0f} %"]
    trained = cost.training
    if trained is None:
        return [*cells, *[""] * 5]
    speed = "" if trained.tokens_per_second is None else number(trained.tokens_per_second, 0)
    memory = f"{trained.peak_memory_bytes / 2**30:.1f} GiB"
    return [*cells, trained.method, f"{trained.steps:,}", duration(trained.seconds), speed, memory]
