"""Which evaluations of several records pair up, whether they were measured alike, and their scores row by row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from promptkd.errors import RequestError
from promptkd.evaluation.statistics import Floats
from promptkd.results import DataRecord, Evaluation, Results, RowResult

Key = tuple[int, int | None]  # a row's index in its data, and the seed of its answer (None if it was decoded greedily)
Answers = dict[Key, RowResult]


def teachers_of(record: Results) -> frozenset[str]:
    """The teachers that a record names: their hashes (or paths), and the contexts that they read."""
    models = [each for label, each in record.models.items() if (label + " ").startswith("teacher ")]
    return frozenset((each.sha256 or each.path) + each.context for each in models)


@dataclass(frozen=True)
class Candidate:
    """One model as one record measured it."""

    label: str
    record: Results
    model: str  # its name in the record
    is_reference: bool = False  # shown beside those that are compared, and not tested

    @property
    def teachers(self) -> frozenset[str]:
        return teachers_of(self.record)


@dataclass(frozen=True)
class Measurement:
    """A candidate on one data set under one decoding."""

    evaluation: Evaluation
    data: DataRecord | None
    answers: Answers

    @property
    def rows(self) -> set[int]:
        return {row for row, _ in self.answers}

    @property
    def has_rouge(self) -> bool:
        return any("rouge_l" in each.scores for each in self.answers.values())

    @property
    def sha256(self) -> str:
        return self.data.sha256 if self.data else ""


class Column(NamedTuple):
    """One metric of one model over the rows of a comparison; the metric is Σ sums / Σ counts."""

    sums: Floats  # per row the sum over its tokens and seeds, or its mean over the seeds. Shape (rows,).
    counts: Floats  # per row its tokens over all seeds, or 1


@dataclass(frozen=True)
class Setting:
    """One data set under one decoding, and the candidates that were measured on it."""

    data: str  # label of the data set, with the decoding where the set was decoded in two ways
    source: str  # label of the data set alone
    measured: dict[str, Measurement]  # by the candidate's label

    def rows(self) -> set[int]:
        """Rows that every candidate answered: of the same index and, where the data may differ, of the same prompt."""
        shared = set.intersection(*(each.rows for each in self.measured.values()))
        hashes = {each.sha256 for each in self.measured.values()}
        if len(hashes) == 1 and "" not in hashes:
            return shared
        prompts = [{row: each.prompt for (row, _), each in m.answers.items()} for m in self.measured.values()]
        return {row for row in shared if len({each[row] for each in prompts}) == 1}

    def metrics(self) -> list[str]:
        """Every metric that rows of at least two candidates have."""
        held = [[answer.scores for answer in each.answers.values()] for each in self.measured.values()]
        holders = Counter(name for scores in held for name in dict.fromkeys(name for own in scores for name in own))
        return [name for name, count in holders.items() if count > 1]

    def columns(self, metric: str) -> dict[str, Column]:
        """The metric by row, for each candidate that has it, over the shared rows where all of these have it.

        A row's answers are combined first. Where the seeds are the same, an answer counts only if every candidate's of
        that seed has the metric. Raises `RequestError` if it is a mean over tokens for one and over rows for another.
        """
        rows = self.rows()
        scored: dict[str, Answers] = {}
        for label, each in self.measured.items():
            held = {key: answer for key, answer in each.answers.items() if key[0] in rows and metric in answer.scores}
            if held := {key: answer for key, answer in held.items() if answer.tokens.get(metric, 1) > 0}:
                scored[label] = held
        if not scored:
            return {}
        if len({frozenset(seed for _, seed in each.answers) for each in self.measured.values()}) == 1:
            common = sorted(set.intersection(*map(set, scored.values())))
            scored = {label: {key: answers[key] for key in common} for label, answers in scored.items()}
        weighted = {metric in answer.tokens for answers in scored.values() for answer in answers.values()}
        if len(weighted) > 1:
            told = f"{metric} on {self.data} is a mean over tokens in one record and a mean over rows in another."
            raise RequestError(f"{told} Evaluate all models again with this version.")
        kept = sorted(set.intersection(*({row for row, _ in answers} for answers in scored.values())))
        return {label: _column(metric, answers, kept) for label, answers in scored.items()}

    def differing(self) -> list[str]:
        """A sentence for each candidate that was not measured as the first was."""
        (first, reference), *others = self.measured.items()
        found = {label: parts for label, each in others if (parts := _differing(reference, each))}
        return [f"{first} and {label} differ on {self.data} in {'; '.join(found[label])}." for label in found]


def _column(metric: str, answers: Answers, rows: list[int]) -> Column:
    by_row: dict[int, list[RowResult]] = {row: [] for row in rows}
    for (row, _), answer in answers.items():
        if row in by_row:
            by_row[row].append(answer)
    sums, counts = np.zeros(len(rows)), np.ones(len(rows))
    for at, held in enumerate(by_row.values()):
        if metric in held[0].tokens:
            sums[at] = sum(each.scores[metric] * each.tokens[metric] for each in held)
            counts[at] = sum(each.tokens[metric] for each in held)
        else:
            sums[at] = sum(each.scores[metric] for each in held) / len(held)
    return Column(sums, counts)


def _differing(ours: Measurement, theirs: Measurement) -> list[str]:
    differing = []
    if ours.sha256 and theirs.sha256 and ours.sha256 != theirs.sha256:
        differing.append(f"data (sha256 {ours.sha256[:8]} and {theirs.sha256[:8]})")
    if ours.rows != theirs.rows:
        differing.append(f"rows ({len(ours.rows)} and {len(theirs.rows)}, {len(ours.rows & theirs.rows)} in both)")
    pairs = [(key[0], answer, theirs.answers[key]) for key, answer in ours.answers.items() if key in theirs.answers]
    if prompts := {row for row, one, other in pairs if one.prompt != other.prompt}:
        differing.append(f"prompts (of {len(prompts)} rows, row {min(prompts)} first; another template?)")
    if references := {row for row, one, other in pairs if one.references != other.references}:
        differing.append(f"references (of {len(references)} rows, row {min(references)} first)")
    mine, other = _decoding_of(ours.evaluation), _decoding_of(theirs.evaluation)
    names = [name for name in dict.fromkeys([*mine, *other]) if mine.get(name) != other.get(name)]
    differing += [f"{name} ({_written(mine.get(name))} and {_written(other.get(name))})" for name in names]
    tokens = [each.evaluation.rouge_tokenizer for each in (ours, theirs) if each.has_rouge]
    if len(set(tokens)) > 1:
        differing.append(f"the tokens of ROUGE ({' and '.join(tokens)})")
    if not names and ours.rows == theirs.rows and ours.answers.keys() != theirs.answers.keys():
        both = len(ours.answers.keys() & theirs.answers.keys())
        differing.append(f"answers ({len(ours.answers)} and {len(theirs.answers)}, {both} in both)")
    return differing


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def settings_of(candidates: Sequence[Candidate]) -> list[Setting]:
    """What at least two candidates were measured on; raises `RequestError` for a duplicate measurement or row."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for candidate in candidates:
        own = [each for each in candidate.record.evaluations if each.model == candidate.model and each.samples]
        for evaluation in own:
            manner = "greedy" if evaluation.decoding.get("temperature") == 0 else "sampled"
            manner = manner if "temperature" in evaluation.decoding else "as recorded"
            measured = found.setdefault((evaluation.data, manner), {})
            if candidate.label in measured:
                twice = f"{candidate.label} was measured on {evaluation.data} twice in one record"
                advice = "it is not clear what is to be compared. Give records with one evaluation of each data set."
                raise RequestError(f"{twice}, so {advice}")
            data = candidate.record.data.get(evaluation.data)
            measured[candidate.label] = Measurement(evaluation, data, _answers(candidate.label, evaluation))
    shared = {key: measured for key, measured in found.items() if len(measured) > 1}
    sources = [source for source, _ in shared]
    labels = [f"{source}, {manner}" if sources.count(source) > 1 else source for source, manner in shared]
    return [Setting(*each) for each in zip(labels, sources, shared.values(), strict=True)]


def _answers(label: str, evaluation: Evaluation) -> Answers:
    seeds = _decoding_of(evaluation).get("seeds") or [None]
    only_seed = seeds[0] if len(seeds) == 1 else None  # records of a run hold it in the decoding alone
    answers: Answers = {}
    for answer in evaluation.samples:
        key = (answer.row, only_seed if answer.seed is None else answer.seed)
        if key in answers:
            raise RequestError(f"The evaluation of {label} on {evaluation.data} holds row {answer.row} twice.")
        answers[key] = answer
    return answers


def _decoding_of(evaluation: Evaluation) -> dict[str, Any]:
    """The settings that decide the answers."""
    settings = evaluation.decoding.copy()
    if "seed" in settings:
        settings["seeds"] = [settings.pop("seed")]
    unused = ["batch_size", *(("seeds", "top_p", "top_k") if settings.get("temperature") == 0 else ())]
    return {name: value for name, value in settings.items() if name not in unused}
