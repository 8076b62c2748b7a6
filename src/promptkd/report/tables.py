"""The tables: evaluations (one row per model, data set and decoding), and what the models cost to train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from promptkd.report.differences import verdict
from promptkd.report.formatting import DASH, decoding_words, duration, estimate, joined, manner, millions, number
from promptkd.report.labels import TEACHER, is_teacher, run_labels
from promptkd.report.metrics import in_order, metric_info
from promptkd.results import BEFORE, Difference, Metric, Results, ToldApart, Training

_COST_HEADS = ("Model", "Parameters", "Share of the teacher", "Method", "Steps", "Time", "Tokens/s", "Peak memory")


class Cell(NamedTuple):
    value: str
    interval: str | None
    deviation: str | None  # "± 0.4": the standard deviation between the seeds
    best: bool  # see `_best`


@dataclass(slots=True, eq=False)
class ComparisonRow:
    run: str  # empty unless two records measured the same model in the same way with different outcomes
    model: str
    data: str
    decoding: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    paired: list[Difference] = field(default_factory=list)  # differences over the very rows and decoding of this row
    apart: dict[str, ToldApart] = field(default_factory=dict)  # by metric, the same of all pairs of a study's methods
    prompts: dict[int, str] = field(default_factory=dict)  # by row, where the record holds the answers
    cells: dict[str, Cell] = field(default_factory=dict)  # by metric name; a metric that was not measured has no cell

    @property
    def setting(self) -> str:
        return joined(self.data, self.decoding)


def metric_columns(records: Sequence[Results]) -> list[str]:
    return in_order(name for record in records for evaluation in record.evaluations for name in evaluation.metrics)


def model_order(records: Sequence[Results]) -> list[str]:
    """Every model that was measured: teachers, students before training, then in the order of the records."""
    measured = [each.model for record in records for each in record.evaluations]
    measured += [each.model for record in records for each in record.curves]
    return sorted(dict.fromkeys(measured), key=lambda label: (not is_teacher(label), label != BEFORE))


def comparison_table(records: Sequence[Results]) -> list[ComparisonRow]:
    """One row per model, data set and decoding of the `unified` records, or several where the records disagree."""
    rows = _rows(records)
    for row in rows:
        row.metrics = {name: _within_bounds(name, own) for name, own in row.metrics.items()}
    settings = list(dict.fromkeys((row.data, row.decoding) for row in rows))
    models = model_order(records)
    rows.sort(key=lambda row: (settings.index((row.data, row.decoding)), models.index(row.model)))
    for group in by_setting(rows).values():
        best = {name: _best(name, group) for name in metric_columns(records)}
        for row in group:
            for name, own in row.metrics.items():
                info = metric_info(name)
                spread = None if own.deviation is None else f"± {estimate(info, Metric(value=own.deviation))[0]}"
                row.cells[name] = Cell(*estimate(info, own), spread, row in best[name])
    return rows


def _within_bounds(name: str, measured: Metric) -> Metric:
    """With its interval cut where the metric ends: Student's t over few seeds reaches beyond."""
    least, most = metric_info(name).bounds
    if measured.low is None or measured.high is None or not least <= measured.value <= most:
        return measured
    return measured.model_copy(update={"low": max(measured.low, least), "high": min(measured.high, most)})


def by_setting(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    settings = dict.fromkeys(row.setting for row in rows)
    return {setting: [row for row in rows if row.setting == setting] for setting in settings}


def _rows(records: Sequence[Results]) -> list[ComparisonRow]:
    found: dict[tuple[str, str, str], list[ComparisonRow]] = {}
    for record, run in zip(records, run_labels(records), strict=True):
        for each in record.evaluations:
            words, own_manner = decoding_words(each.decoding), manner(each.decoding)
            same = found.setdefault((each.data, words, each.model), [])
            row = next((row for row in same if _agree(row.metrics, each.metrics)), None)
            if row is None:
                row = ComparisonRow(run, each.model, each.data, words)
                same.append(row)
            row.metrics = {**each.metrics, **row.metrics}
            row.prompts |= {sample.row: sample.prompt for sample in each.samples}
            # a difference on the data alone is about this decoding where the record has no other
            decodings = {decoding_words(other.decoding) for other in record.evaluations if other.data == each.data}
            names = {f"{each.data}, {words}", *([each.data] if len(decodings) == 1 else [])}
            alike = [one.decoding for one in record.evaluations if one.data == each.data]
            alike = [one for one in alike if manner(one) == own_manner]
            names |= {f"{each.data}, {own_manner}"} if len(set(map(decoding_words, alike))) == 1 else set()
            about = [difference for difference in record.differences if difference.data in names]
            row.paired += [difference for difference in about if each.model in (difference.model, difference.baseline)]
            row.apart |= {
                one.metric: one for one in record.told_apart if one.data in names and each.model in one.models
            }
    for only in (rows[0] for rows in found.values() if len(rows) == 1):
        only.run = ""
    return [row for rows in found.values() for row in rows]


def _agree(ours: dict[str, Metric], theirs: dict[str, Metric]) -> bool:
    shared = ours.keys() & theirs.keys()
    return all(math.isclose(ours[name].value, theirs[name].value, rel_tol=1e-6, abs_tol=1e-9) for name in shared)


def _best(name: str, rows: list[ComparisonRow]) -> list[ComparisonRow]:
    """The best student and those not told apart from it; empty for one student, no interval, or none told apart."""
    better, students = metric_info(name).better, _students(name, rows)
    if better is None or len(students) < 2 or not _same_prompts(rows):
        return []
    pick = min if better == "lower" else max
    lead = pick(students, key=lambda row: row.metrics[name].value)
    tied = [row for row in students if row is lead or not _told_apart(name, lead, row)]
    return tied if len(tied) < len(students) else []


def _same_prompts(rows: Sequence[ComparisonRow]) -> bool:
    """Whether all students read the same prompts, so far as the records hold them; a teacher may have a context."""
    first: dict[int, str] = {}
    for row in rows:
        if not is_teacher(row.model):
            if any(first.get(at, prompt) != prompt for at, prompt in row.prompts.items()):
                return False
            first |= row.prompts
    return True


def prompts_sentences(rows: Sequence[ComparisonRow]) -> list[str]:
    """On what the students of a table read other prompts, which marks none of them as the best."""
    apart = [setting for setting, own in by_setting(rows).items() if not _same_prompts(own)]
    told = "the models read other prompts (by another template), so that no value is marked as the best"
    return [f"On {setting}, {told}." for setting in apart]


def groups(name: str, rows: Sequence[ComparisonRow]) -> list[list[ComparisonRow]]:
    """The largest groups of students of which no two are told apart in a metric, from the best down.

    Empty where neither direction is better, for one student, other prompts, and where an interval is missing.
    """
    better, students = metric_info(name).better, _students(name, rows)
    if better is None or len(students) < 2 or not _same_prompts(rows):
        return []
    students.sort(key=lambda row: row.metrics[name].value, reverse=better == "higher")
    apart = {
        (one, other)
        for one in range(len(students))
        for other in range(one + 1, len(students))
        if _told_apart(name, students[one], students[other])
    }
    found: list[set[int]] = [set(range(len(students)))]
    for one, other in sorted(apart):  # each pair splits every group that holds both
        split = [
            part for group in found for part in ([group - {one}, group - {other}] if {one, other} <= group else [group])
        ]
        found = [
            group
            for at, group in enumerate(split)
            if not any(group < each for each in split) and group not in split[:at]
        ]
    return [[students[at] for at in sorted(group)] for group in sorted(found, key=sorted)]


def _students(name: str, rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Those that compete: of a study its methods; else all but teachers, if each has an interval."""
    methods = [row for row in rows if name in row.apart and math.isfinite(row.metrics[name].value)]
    if methods:
        return methods
    students = [row for row in rows if name in row.metrics and not is_teacher(row.model)]
    return students if all(math.isfinite(end) for row in students for end in _ends(name, row)) else []


def _told_apart(name: str, lead: ComparisonRow, other: ComparisonRow) -> bool:
    """By the test of all pairs or the paired difference where a record holds it, else by intervals without overlap."""
    test, pair = lead.apart.get(name), (lead.model, other.model)
    if test is not None and test == other.apart.get(name):  # not so of the methods of two studies
        return pair in test.pairs or pair[::-1] in test.pairs
    for difference in lead.paired:
        if difference.metric == name and {difference.model, difference.baseline} == {lead.model, other.model}:
            return verdict(difference) == ("better" if difference.model == lead.model else "worse")
    (low, _, high), (other_low, _, other_high) = _ends(name, lead), _ends(name, other)
    return high < other_low or other_high < low


def _ends(name: str, row: ComparisonRow) -> tuple[float, float, float]:
    """Lower end, value and upper end; NaN for an end that was not recorded."""
    measured = row.metrics[name]
    low, high = (math.nan if end is None else end for end in (measured.low, measured.high))
    return low, measured.value, high


class Cost(NamedTuple):
    model: str
    parameters: int | None
    training: Training | None


def costs(records: Sequence[Results]) -> list[Cost]:
    """One row per model of the `unified` records that has a size or a cost of training, teachers first.

    Beside a study's comparison its runs have none: it holds the methods, and the models that it measured.
    """
    records = [record for record in records if _is_of_study(record) and record.training] or records
    sizes: dict[str, int] = {}
    training: dict[str, Training] = {}
    for record in records:
        sizes = {label: model.parameters for label, model in record.models.items()} | sizes
        training = record.training | training
    labels = sorted(dict.fromkeys([*sizes, *training]), key=lambda label: not is_teacher(label))
    return [Cost(label, sizes.get(label), training.get(label)) for label in labels]


def _is_of_study(record: Results) -> bool:
    """Whether it is the comparison of a study, which is of kind "compare" where there is a single seed."""
    return record.kind == "study" or (record.kind == "compare" and "methods" in record.config)


def cost_table(records: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a column without a value for any model is left out."""
    found = costs(records)
    of_teacher = next((cost.parameters for cost in found if cost.model == TEACHER), None)
    lines = [_cost_cells(cost, of_teacher) for cost in found]
    kept = [column for column in range(len(_COST_HEADS)) if any(line[column] for line in lines)]
    return [_COST_HEADS[column] for column in kept], [[line[column] or DASH for column in kept] for line in lines]


def _cost_cells(cost: Cost, of_teacher: int | None) -> list[str]:
    size, trained = cost.parameters, cost.training
    share = f"{size / of_teacher * 100:.0f} %" if size is not None and of_teacher and not is_teacher(cost.model) else ""
    cells = [cost.model, "" if size is None else millions(size), share]
    if trained is None:
        return [*cells, *[""] * 5]
    speed = "" if trained.tokens_per_second is None else number(trained.tokens_per_second, 0)
    memory = f"{trained.peak_memory_bytes / 2**30:.1f} GiB"
    return [*cells, trained.method, f"{trained.steps:,}", duration(trained.seconds), speed, memory]
