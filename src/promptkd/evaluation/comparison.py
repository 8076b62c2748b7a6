"""Paired differences between models that were measured alike, with intervals, tests, correction and effect sizes.

All answers to one request (one per seed) are combined first. A difference is claimed where p of the sign-flip test,
adjusted by Holm over the whole comparison, is at most 0.05 and the 95 % bootstrap interval over rows excludes zero.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal

import numpy as np

from promptkd.errors import RequestError
from promptkd.evaluation import statistics
from promptkd.evaluation.measure import OF_REFERENCES
from promptkd.evaluation.pairing import Candidate, Column, Setting, settings_of
from promptkd.evaluation.statistics import DEFAULT, Bootstrap, Floats
from promptkd.results import Better, DataRecord, Difference, Evaluation, ToldApart, metric_named

Pairs = Literal["baseline", "all", "last"]
TO_TEACHER = "kl_to_teacher"

_LEAST_ROWS = 6  # with fewer, even the smallest p of a sign-flip test, 2 / 2^rows, lies above 0.05


def other_teachers(labels: Sequence[str], than: str) -> str:
    """That the KL of these models was left out, since it is to another teacher `than` that of one."""
    records = "its record names" if len(labels) == 1 else "their records name"
    told = f"{TO_TEACHER} of {', '.join(labels)} was not compared: {records} another teacher, or context, than"
    return f"{told} that of {than}."


@dataclass
class Comparison:
    differences: list[Difference] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)  # over the rows that were compared, without these rows
    told_apart: list[ToldApart] = field(default_factory=list)  # of all pairs of a study's methods
    data: dict[str, DataRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> set[str]:
        return {name for each in self.evaluations for name in each.metrics}


def compare(
    candidates: Sequence[Candidate],
    better: Callable[[str], Better | None],
    *,
    baseline: str | None = None,
    pairs: Pairs = "baseline",
    metrics: Sequence[str] = (),
    allow_different: bool = False,
    bootstrap: Bootstrap = DEFAULT,
    draws: int = 9999,
) -> Comparison:
    """Compare candidates on the data sets they share.

    Args:
        pairs: every candidate with the baseline (by default the first), every other, or the last with each before it.
        better: which direction of a metric is better; a metric of neither (None) is left out, and that is noted.
        metrics: by default all that rows have scores of.
        allow_different: compare what is shared although data or decoding differ, and note in what.
        bootstrap: of the intervals; its seed is that of the sign-flip test too.
        draws: of the sign-flip test, raised where many differences are tested together.

    Raises `RequestError` for fewer than two candidates, a duplicate or unknown label, measurements that are not alike,
    and no data set, row or metric in common.
    """
    ordered = _checked(candidates, baseline)
    settings, made = settings_of(ordered), Comparison()
    made.notes += _alike(settings, ordered, allow_different)
    names = known_metrics(settings, metrics)
    tested_ones = [each for each in ordered if not each.is_reference]
    others = [each.label for each in tested_ones if each.teachers != tested_ones[0].teachers]
    if TO_TEACHER in names and others:
        made.notes.append(other_teachers(others, tested_ones[0].label))
    every = list(combinations([each.label for each in tested_ones], 2))  # (baseline, model)
    of_last = [pair for pair in every if pair[1] == tested_ones[-1].label]
    compared = {"baseline": every[: len(tested_ones) - 1], "all": every, "last": of_last}[pairs]
    tested: list[tuple[Difference, tuple[Floats, ...]]] = []
    done: set[tuple[str, str, str, str]] = set()  # data set, metric of its references, however decoded, and the pair
    for setting in settings:
        again = {name for source, name, *_ in done if source == setting.source}
        left = {
            name
            for name, pair in product(again, compared)
            if setting.measured.keys() >= {*pair} and (setting.source, name, *pair) not in done
        }
        wanted = [name for name in setting.metrics() if name in names and (name not in again or name in left)]
        scored = ((name, setting.columns(name)) for name in wanted)
        columns = {name: held for name, held in scored if any(len(each.sums) for each in held.values())}
        if TO_TEACHER in columns:
            alike = {label: column for label, column in columns[TO_TEACHER].items() if label not in others}
            columns[TO_TEACHER] = alike if len(others) < len(tested_ones) - 1 else {}  # of one, nothing is compared
        for (base, model), (name, held) in product(compared, columns.items()):
            direction, at = better(name), (setting.source, name, base, model)
            if direction is not None and base in held and model in held and at not in done:
                both = (*held[model], *held[base])
                found = statistics.paired_token_difference(*both, bootstrap)
                kept = direction == "higher" and f"{base} ".startswith(
                    "teacher "
                )  # what a student keeps of its teacher
                difference = Difference(
                    model=model, baseline=base, metric=name, data=setting.data, better=direction, difference=found
                )
                difference.ratio = statistics.paired_token_ratio(*both, bootstrap) if kept else None
                tested.append((difference, both))
                done |= {at} if name in OF_REFERENCES else set()
        made.evaluations += evaluations_of(setting, columns, setting.measured, bootstrap)
        first = next(iter(setting.measured.values()))
        if first.data is not None:
            made.data[setting.data] = first.data
    if not tested and len(tested_ones) > 1:
        shared = f"the runs share {sum(len(each.rows()) for each in settings)} rows, with scores of"
        expected = "Expected at least one row, and a metric of which more or less is better."
        raise RequestError(f"Nothing to compare: {shared} {', '.join(names) or 'none'}. {expected}")
    draws = max(draws, 100 * len(tested) - 1)  # the smallest p, 1 / (draws + 1), can reach 0.01 after the correction
    made.differences = [each for each, _ in tested]
    finite = [(each, statistics.row_contributions(*both)) for each, both in tested if np.isfinite(both).all()]
    p_values = [statistics.sign_flip_test(parts, draws=draws, seed=bootstrap.seed) for _, parts in finite]
    for (each, parts), p, adjusted in zip(finite, p_values, statistics.holm(p_values), strict=True):
        each.p_value, each.p_adjusted, each.effect_size = p, adjusted, statistics.effect_size(parts)
    made.notes += _notes(settings, made.differences, ordered)
    if neither := [metric for metric in names if better(metric) is None]:
        made.notes.append(f"Not tested, for neither direction is better: {', '.join(neither)}.")
    return made


def _checked(candidates: Sequence[Candidate], baseline: str | None) -> list[Candidate]:
    labels = [each.label for each in candidates]
    known = [each.label for each in candidates if not each.is_reference]
    if len(candidates) < 2 or not known:
        raise RequestError(f"A comparison takes two models or more. Got {', '.join(labels) or 'none'}.")
    if duplicates := sorted({label for label in labels if labels.count(label) > 1}):
        got = f"Got {', '.join(duplicates)} twice; name a run by LABEL=RUN."
        raise RequestError(f"Each model must have a label of its own. {got}")
    if baseline is not None and baseline not in known:
        raise RequestError(f"The baseline must be one of {', '.join(known)}. Got {baseline}.")
    return sorted(candidates, key=lambda each: each.label != (baseline or known[0]))


def _alike(settings: Sequence[Setting], candidates: Sequence[Candidate], allow_different: bool) -> list[str]:
    """Notes on what differs; raises where that is not allowed, or where nothing is shared."""
    if not settings:
        sets = {c.label: [e.data for e in c.record.evaluations if e.model == c.model and e.samples] for c in candidates}
        held = [f"{label} has rows of {', '.join(dict.fromkeys(data)) or 'none'}" for label, data in sets.items()]
        raise RequestError(f"The runs share no data set: {'; '.join(held)}.")
    differing = [sentence for setting in settings for sentence in setting.differing()]
    if differing and not allow_different:
        told = " ".join(differing)
        raise RequestError(f"{told} Measure them alike, or compare the rows that all have by --allow-different.")
    return [f"Compared although {sentence}" for sentence in differing]


def known_metrics(settings: Sequence[Setting], asked: Sequence[str]) -> list[str]:
    """The metrics that were measured, or those of them that were asked for. `RequestError` for others."""
    every = list(dict.fromkeys(metric for setting in settings for metric in setting.metrics()))
    named = {metric: metric_named(metric, every) for metric in asked}
    if unknown := [metric for metric, found in named.items() if found is None]:
        expected = f"Expected metrics that rows of two models have scores of: {', '.join(every) or 'none'}."
        raise RequestError(f"{expected} Got {', '.join(unknown)}.")
    return [metric for metric in every if metric in named.values() or not named]


def evaluations_of(
    setting: Setting, columns: dict[str, dict[str, Column]], labels: Iterable[str], bootstrap: Bootstrap = DEFAULT
) -> list[Evaluation]:
    """Of the candidates with these labels, the metrics over the rows of `columns`, without the rows themselves."""
    made = []
    for label, measured in ((label, setting.measured[label]) for label in labels if label in setting.measured):
        held = {metric: by_label[label] for metric, by_label in columns.items() if label in by_label}
        metrics = {metric: statistics.token_mean_interval(*column, bootstrap) for metric, column in held.items()}
        own = {"model": label, "data": setting.data, "metrics": metrics, "samples": []}
        made.append(measured.evaluation.model_copy(update=own))
    return made


def _notes(settings: Sequence[Setting], differences: list[Difference], candidates: Sequence[Candidate]) -> list[str]:
    tested = f"{len(differences)} differences were tested together and p is adjusted for that."
    covered = "Both cover the rows and their decoding seeds, not the spread between training seeds."
    notes = [f"{tested} One is claimed where p is at most 0.05 and the interval excludes zero. {covered}"]
    for setting in settings:
        rows, held = setting.rows(), {row for each in setting.measured.values() for row in each.rows}
        if len(rows) < len(held):
            notes.append(f"On {setting.data} the {len(rows)} rows that all have were compared, of {len(held)}.")
        scored = {each.metric: each.difference.rows or 0 for each in differences if each.data == setting.data}
        if fewer := [f"{metric} {count}" for metric, count in scored.items() if count < len(rows)]:
            notes.append(f"On {setting.data} not every row has every score: {', '.join(fewer)} of {len(rows)} rows.")
        if few := [metric for metric, count in scored.items() if count < _LEAST_ROWS]:
            notes.append(f"On {setting.data} there are too few rows to tell any two models apart on {', '.join(few)}.")
        if absent := [each.label for each in candidates if each.label not in setting.measured]:
            notes.append(f"{setting.data} was not measured for {', '.join(absent)}.")
    return notes
