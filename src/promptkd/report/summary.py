"""Sentences that say what the records support, and no more."""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.report.cost import millions
from promptkd.report.differences import difference_table
from promptkd.report.labels import TEACHER, is_teacher
from promptkd.report.metrics import estimate, in_order, metric
from promptkd.report.sentences import Pair, comparison_sentences, listed
from promptkd.report.tables import ComparisonRow, comparison_table, model_order
from promptkd.results import Evaluation, ModelRecord, Results

__all__ = ["Summary", "summarise"]

MOST_SENTENCES = 6


@dataclass(frozen=True, slots=True)
class Summary:
    introduction: str
    """Which models, on which data."""
    lead: str
    """What the distilled student gained or lost; empty where nothing was measured."""
    others: tuple[str, ...]
    """What to say of other pairs that were compared."""
    untold: int
    """How many more pairs were compared, of which the table tells."""


def summarise(records: Sequence[Results]) -> Summary:
    """One summary of all `unified` records."""
    evaluations = [evaluation for record in records for evaluation in record.evaluations]
    sentences = comparison_sentences(difference_table(records))
    subject = _subject(records, evaluations, list(sentences))
    stages = list(dict.fromkeys(evaluation.model for evaluation in evaluations))
    own = [pair for pair in sentences if pair[1] == subject]
    # The nearest earlier stage says what the last stage did; the teacher comes last.
    own.sort(key=lambda pair: (is_teacher(pair[2]), -stages.index(pair[2]) if pair[2] in stages else 0))
    first = own[0] if own else None
    others = [sentence for pair, sentence in sentences.items() if pair != first]
    return Summary(
        _introduction(records, evaluations, subject),
        sentences[first] if first else _measured(records, evaluations),
        tuple(others[:MOST_SENTENCES]),
        max(0, len(others) - MOST_SENTENCES),
    )


def _subject(records: Sequence[Results], evaluations: list[Evaluation], pairs: list[Pair]) -> str | None:
    """The model that the story is about: the last stage of one record, else the one that was compared most."""
    students = [evaluation.model for evaluation in evaluations if not is_teacher(evaluation.model)]
    compared = [model for _, model, _ in pairs]
    if len(records) == 1 and students and (students[-1] in compared or not compared):
        return students[-1]
    if compared:
        return max(dict.fromkeys(compared), key=compared.count)
    return students[-1] if len(set(students)) == 1 else None


def _introduction(records: Sequence[Results], evaluations: list[Evaluation], subject: str | None) -> str:
    if not evaluations:
        return (
            f"This {records[0].kind} run holds no evaluation."
            if len(records) == 1
            else f"These {len(records)} records hold no evaluation."
        )
    sizes = {label: model for record in records for label, model in record.models.items()}
    labels = model_order(records) if len(records) > 1 else list(dict.fromkeys(each.model for each in evaluations))
    where = listed(list(dict.fromkeys(_data_words(evaluation) for evaluation in evaluations)))
    if len(labels) == 1:
        return f"One model, {labels[0]}{_size(sizes, labels[0])}, was measured on {where}."
    if subject is None or subject not in sizes or TEACHER not in sizes:
        return f"{_count(len(labels))} models, {listed(labels)}, were measured on {where}."
    share = sizes[subject].parameters / sizes[TEACHER].parameters
    others = [label for label in labels if label not in (subject, TEACHER)]
    beside = f", beside {listed(others)}," if others else ""
    return (
        f"{subject}{_size(sizes, subject)}, a student with {share * 100:.0f} % of the parameters of its "
        f"teacher{_size(sizes, TEACHER)}, was measured{beside} on {where}."
    )


def _measured(records: Sequence[Results], evaluations: list[Evaluation]) -> str:
    """The figures themselves, where nothing was compared."""
    if len(evaluations) == 1:
        parts = []
        for name in in_order(evaluations[0].metrics):
            value, interval = estimate(metric(name), evaluations[0].metrics[name])
            written = f"{value} {interval}" if interval else value
            parts.append(f"{metric(name).phrase} {written} {metric(name).unit}".strip())
        return f"Measured: {listed(parts)}." if parts else ""
    return (
        f"{_headline(comparison_table(records))}No differences were recorded, so this page claims none."
        if evaluations
        else ""
    )


def _headline(rows: list[ComparisonRow]) -> str:
    """The first metric with a better direction, of ROUGE-L if there is, on the first data set for every model."""
    same = [row for row in rows if (row.data, row.decoding) == (rows[0].data, rows[0].decoding)]
    names = [name for row in same for name in row.cells]
    name = "rouge_l" if "rouge_l" in names else next((name for name in names if metric(name).better), None)
    if name is None:
        return ""
    found = [f"{row.cells[name].value} for {row.model}" for row in same if name in row.cells]
    decoding = f", {same[0].decoding}," if same[0].decoding else ""
    phrase = metric(name).phrase
    return f"On {same[0].data}{decoding} {phrase} is {listed(found)}. "


def _data_words(evaluation: Evaluation) -> str:
    rows = {measured.rows for measured in evaluation.metrics.values() if measured.rows is not None}
    counted = len(rows) == 1 and not evaluation.data.endswith(" rows)")
    return f"{evaluation.data} ({rows.pop()} rows)" if counted else evaluation.data


def _size(sizes: dict[str, ModelRecord], label: str) -> str:
    return f" ({millions(sizes[label].parameters)} parameters)" if label in sizes else ""


def _count(size: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[size] if size < len(words) else str(size)
