"""Which evaluations of several records belong together, and their scores row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import RequestError
from promptkd.results import DataRecord, Evaluation, Results, RowResult

__all__ = ["Candidate", "Column", "Measurement", "Setting", "decoding_of", "settings_of"]

Floats = NDArray[np.float64]
Key = tuple[int, int | None]
"""A row's index in its data, and the seed of its answer (None if it was decoded greedily)."""

_SPEED_ALONE = frozenset({"batch_size"})
_SAMPLING = frozenset({"seeds", "top_p", "top_k"})


@dataclass(frozen=True)
class Candidate:
    """One model as one record measured it."""

    label: str
    """What it is called in the comparison."""
    record: Results
    model: str
    """What the record calls it."""


@dataclass(frozen=True)
class Measurement:
    """A candidate on one data set under one decoding."""

    evaluation: Evaluation
    data: DataRecord | None
    answers: dict[Key, RowResult]

    @property
    def rows(self) -> set[int]:
        return {row for row, _ in self.answers}

    @property
    def sha256(self) -> str:
        return self.data.sha256 if self.data else ""


@dataclass(frozen=True)
class Column:
    """One metric of one model over the rows of a comparison; the metric is Σ sums / Σ counts."""

    sums: Floats
    """Of a row: sum over its tokens and seeds, or its mean over the seeds. Shape (rows,)."""
    counts: Floats
    """Of a row: tokens over all seeds, or 1."""


@dataclass(frozen=True)
class Setting:
    """One data set under one decoding, and the candidates that were measured on it."""

    data: str
    """Label of the data set, with the decoding where the set was decoded in two ways."""
    source: str
    """Label of the data set alone."""
    measured: dict[str, Measurement]
    """By the candidate's label."""

    def rows(self) -> set[int]:
        """Rows that every candidate answered: of the same index, and where the data may differ, of the same prompt."""
        first, *others = self.measured.values()
        shared = set.intersection(*(each.rows for each in self.measured.values()))
        if first.sha256 and all(each.sha256 == first.sha256 for each in others):
            return shared
        prompts = [{row: answer.prompt for (row, _), answer in each.answers.items()} for each in (first, *others)]
        return {row for row in shared if len({each[row] for each in prompts}) == 1}

    def metrics(self) -> list[str]:
        """Every metric that rows of at least two candidates have."""
        held = [
            dict.fromkeys(name for answer in each.answers.values() for name in answer.scores)
            for each in self.measured.values()
        ]
        return [name for name in dict.fromkeys(n for each in held for n in each) if sum(name in e for e in held) > 1]

    def columns(self, metric: str) -> dict[str, Column]:
        """The metric by row, for each candidate that has it, over the shared rows where all of these have it.

        A row's answers are brought together first: their tokens are added up, or their scores averaged. Where the
        seeds are the same, an answer counts only if every candidate's answer of that seed has the metric.

        Raises:
            RequestError: if the metric is a mean over tokens for one candidate and a mean over rows for another.
        """
        rows = self.rows()
        scored = {
            label: {
                key: answer
                for key, answer in each.answers.items()
                if key[0] in rows and metric in answer.scores and answer.tokens.get(metric, 1) > 0
            }
            for label, each in self.measured.items()
        }
        scored = {label: answers for label, answers in scored.items() if answers}
        if len({frozenset(seed for _, seed in each.answers) for each in self.measured.values()}) == 1:
            common = set.intersection(*(set(answers) for answers in scored.values())) if scored else set()
            scored = {label: {key: answers[key] for key in sorted(common)} for label, answers in scored.items()}
        weighted = {metric in answer.tokens for answers in scored.values() for answer in answers.values()}
        if len(weighted) > 1:
            raise RequestError(
                f"{metric} on {self.data} is a mean over tokens in one record and a mean over rows in another. "
                "Evaluate all models anew with this version."
            )
        kept = set.intersection(*({row for row, _ in answers} for answers in scored.values())) if scored else set()
        return {label: _column(metric, answers, sorted(kept), weighted == {True}) for label, answers in scored.items()}


def _column(metric: str, answers: dict[Key, RowResult], rows: list[int], weighted: bool) -> Column:
    by_row: dict[int, list[RowResult]] = {row: [] for row in rows}
    for (row, _), answer in answers.items():
        if row in by_row:
            by_row[row].append(answer)
    if weighted:
        counts = [float(sum(each.tokens[metric] for each in by_row[row])) for row in rows]
        sums = [sum(each.scores[metric] * each.tokens[metric] for each in by_row[row]) for row in rows]
    else:
        counts = [1.0] * len(rows)
        sums = [sum(each.scores[metric] for each in by_row[row]) / len(by_row[row]) for row in rows]
    return Column(np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64))


def settings_of(candidates: Sequence[Candidate]) -> list[Setting]:
    """What at least two candidates were measured on.

    Raises:
        RequestError: if a candidate was measured twice in one way, or an evaluation holds a row twice.
    """
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for candidate in candidates:
        for evaluation in candidate.record.evaluations:
            if evaluation.model != candidate.model or not evaluation.samples:
                continue
            measured = found.setdefault((evaluation.data, _manner(evaluation)), {})
            if candidate.label in measured:
                raise RequestError(
                    f"{candidate.label} was measured on {evaluation.data} twice in one record, so it is not clear what "
                    "is to be compared. Give records with one evaluation of each data set."
                )
            measured[candidate.label] = _measurement(candidate, evaluation)
    shared = {key: measured for key, measured in found.items() if len(measured) > 1}
    sources = [source for source, _ in shared]
    return [
        Setting(f"{source}, {manner}" if sources.count(source) > 1 else source, source, measured)
        for (source, manner), measured in shared.items()
    ]


def _manner(evaluation: Evaluation) -> str:
    if "temperature" not in evaluation.decoding:
        return "as recorded"
    return "greedy" if evaluation.decoding["temperature"] == 0 else "sampled"


def _measurement(candidate: Candidate, evaluation: Evaluation) -> Measurement:
    seeds = decoding_of(evaluation).get("seeds") or [None]
    only_seed = seeds[0] if len(seeds) == 1 else None  # records of a run leave it to the decoding
    answers: dict[Key, RowResult] = {}
    for answer in evaluation.samples:
        key = (answer.row, only_seed if answer.seed is None else answer.seed)
        if key in answers:
            raise RequestError(
                f"The evaluation of {candidate.label} on {evaluation.data} holds row {answer.row} twice."
            )
        answers[key] = answer
    return Measurement(evaluation, candidate.record.data.get(evaluation.data), answers)


def decoding_of(evaluation: Evaluation) -> dict[str, Any]:
    """What decides the answers: without the batch size, and greedily without what sampling alone depends on."""
    settings = {name: value for name, value in evaluation.decoding.items() if name not in _SPEED_ALONE}
    if "seed" in settings:
        settings["seeds"] = [settings.pop("seed")]
    if settings.get("temperature") == 0:
        return {name: value for name, value in settings.items() if name not in _SAMPLING}
    return settings
