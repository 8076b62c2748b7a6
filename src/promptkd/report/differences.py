"""Paired differences: the verdict on each, and what they allow one to say of a pair of models, in sentences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from promptkd.report.formatting import estimate, joined, listed, probability, typed
from promptkd.report.labels import run_labels
from promptkd.report.metrics import MetricInfo, in_order, metric_info
from promptkd.results import LEVEL, Difference, Results

# tied: the interval holds zero, or a test does not rule chance out; open: no interval, so nothing can be said
Verdict = Literal["better", "worse", "tied", "open"]
_MOST_WITH_NUMBERS = 8
_MODELS_OF_A_TABLE = 5  # so many, compared with one baseline, are lines of one table rather than a table each


class Pair(NamedTuple):
    data: str
    model: str
    baseline: str


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    run: str
    pair: Pair
    source: Difference
    info: MetricInfo
    verdict: Verdict
    value: str  # signed, model less baseline
    interval: str | None

    @property
    def change(self) -> Literal["lower", "higher", ""]:
        """Where the interval lies; "" when tied or open."""
        return "" if self.verdict in ("tied", "open") else "higher" if self.source.difference.value > 0 else "lower"

    @property
    def words(self) -> str:
        unsettled = {"tied": "cannot be told apart", "open": "no interval"}
        return unsettled.get(self.verdict, f"{self.change}, {self.verdict}")


def verdict(difference: Difference) -> Verdict:
    """A claim needs an interval that lies, with the value, on one side of zero.

    Where it was tested, its adjusted p must be at most `LEVEL` too: the interval does not account for other tests.
    """
    value, low, high = difference.difference.value, difference.difference.low, difference.difference.high
    if low is None or high is None or not (math.isfinite(value) and low <= high):
        return "open"
    if difference.p_adjusted is not None and not difference.p_adjusted <= LEVEL and low <= value <= high:
        return "tied"
    if (low > 0 and value > 0) or (high < 0 and value < 0):
        return "better" if (value > 0) == (difference.better == "higher") else "worse"
    return "tied" if low <= 0 <= high else "open"


def difference_table(records: Sequence[Results]) -> list[DifferenceRow]:
    """The recorded differences of the `unified` records; `run` is empty where only one record compares a pair."""
    rows = []
    for run, record in zip(run_labels(records), records, strict=True):
        for each in record.differences:
            pair, info = Pair(each.data, each.model, each.baseline), metric_info(each.metric)
            texts = estimate(info, each.difference, signed=True)
            rows.append(DifferenceRow(run, pair, each, info, verdict(each), *texts))
    runs = Counter(pair for pair, _ in {(row.pair, row.run) for row in rows})
    return [row if runs[row.pair] > 1 else replace(row, run="") for row in rows]


def paired(rows: Sequence[DifferenceRow]) -> dict[Pair, list[DifferenceRow]]:
    return {pair: [row for row in rows if row.pair == pair] for pair in dict.fromkeys(row.pair for row in rows)}


class DifferenceColumns(NamedTuple):
    """The models that were compared with one baseline on one data set, a line each, and a column per metric."""

    baseline: str
    run: str
    infos: list[MetricInfo]
    lines: list[tuple[str, dict[str, DifferenceRow]]]


def difference_columns(found: Mapping[tuple[str, str, str], Sequence[DifferenceRow]]) -> list[DifferenceColumns]:
    """Tables for the pairs of one data set (model, baseline and run), empty where none of them has enough models."""
    tables: dict[tuple[str, str], list[tuple[str, dict[str, DifferenceRow]]]] = {}
    for (model, baseline, run), rows in found.items():
        tables.setdefault((baseline, run), []).append((model, {row.source.metric: row for row in rows}))
    if all(len(lines) < _MODELS_OF_A_TABLE for lines in tables.values()):
        return []
    made = []
    for (baseline, run), lines in tables.items():
        infos = list(map(metric_info, in_order(name for _, held in lines for name in held)))
        made.append(DifferenceColumns(baseline, run, infos, lines))
    return made


def comparison_sentences(rows: Sequence[DifferenceRow]) -> dict[Pair, str]:
    """What can be said of every pair in `rows`, with numbers. The data set is named where there are several.

    What several runs measured of a pair is told once where it is the same, else run by run.
    """
    pairs = paired(rows)
    named = len({pair.data for pair in pairs}) > 1
    where = {pair: f"On {pair.data}: " if named and pair.data else "" for pair in pairs}
    return {pair: where[pair] + _of_each_run(pair, found) for pair, found in pairs.items()}


def _of_each_run(pair: Pair, rows: list[DifferenceRow]) -> str:
    by_run = {run: _with_numbers(pair, [row for row in rows if row.run == run]) for run in {row.run: 0 for row in rows}}
    if len(set(by_run.values())) == 1:
        return next(iter(by_run.values()))
    return " ".join(f"In {run}: {told}" for run, told in by_run.items())


def _with_numbers(pair: Pair, rows: list[DifferenceRow]) -> str:
    """What the intervals tell apart, then what they do not, then what has none."""
    told = []
    for row in (row for row in rows if row.change):
        size, interval = estimate(row.info, row.source.difference, flip=row.change == "lower")
        amount = joined(size, interval, row.info.difference_unit, by=" ")
        told.append(f"{row.change} {row.info.phrase} by {amount} (a {'gain' if row.verdict == 'better' else 'loss'})")
    brief, tied = len(rows) > _MOST_WITH_NUMBERS, []
    for row in (row for row in rows if row.verdict == "tied"):
        found, p = row.source.difference, row.source.p_adjusted
        excludes_zero = (found.low or 0) > 0 or (found.high or 0) < 0  # and yet the test says that it may be chance
        chance = f", adjusted p {probability(p)}" if excludes_zero and p is not None else ""
        tied.append(row.info.phrase + ("" if brief else f" ({row.value} {row.interval}{chance})"))
    parts = [f"Compared with {pair.baseline}, {pair.model} has {listed(told)}."] if told else []
    if tied:
        subject = "The two" if parts else f"{pair.model} and {pair.baseline}"
        parts.append(f"{subject} cannot be told apart on {listed(tied)}.")
    if unknown := [f"{row.info.phrase} ({row.value})" for row in rows if row.verdict == "open"]:
        between = "" if parts else f" between {pair.model} and {pair.baseline}"
        parts.append(f"No usable interval was recorded{between} for {listed(unknown)}, so nothing is claimed there.")
    return " ".join(parts)


def compared_pairs(record: Results) -> dict[Pair, list[DifferenceRow]]:
    """The differences of one record by pair, each pair's in the order of the metrics."""
    order = in_order(each.metric for each in record.differences)
    pairs = paired(difference_table([record]))
    return {pair: sorted(rows, key=lambda row: order.index(row.source.metric)) for pair, rows in pairs.items()}


def compared_sentences(record: Results) -> list[str]:
    """What can be said of every pair on every data set, without numbers: the notes of a comparison's record."""
    return [f"On {pair.data}: {compared_sentence(pair, rows)}" for pair, rows in compared_pairs(record).items()]


def compared_sentence(pair: Pair, rows: Sequence[DifferenceRow]) -> str:
    phrases = {word: [row.info.phrase for row in rows if row.verdict == word] for word in get_args(Verdict)}
    told = [f"{word} on {listed(phrases[word])}" for word in ("better", "worse") if phrases[word]]
    parts = [f"{pair.model} is {' and '.join(told)} than {pair.baseline}."] if told else []
    if phrases["tied"]:
        them = "them" if told else f"{pair.model} and {pair.baseline}"
        parts.append(f"Cannot tell {them} apart on {listed(phrases['tied'])}.")
    if phrases["open"]:
        parts.append(f"No interval, and so no claim, on {listed(phrases['open'])}.")
    return typed(" ".join(parts))
