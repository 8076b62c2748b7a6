"""Sentences that say what the records support, and no more."""

from collections.abc import Sequence
from typing import NamedTuple

from promptkd.report.differences import Pair, comparison_sentences, difference_table
from promptkd.report.formatting import estimate, joined, listed, millions
from promptkd.report.labels import TEACHER, is_teacher
from promptkd.report.metrics import in_order, metric_info
from promptkd.report.overview import overview_of
from promptkd.report.tables import comparison_table, model_order
from promptkd.results import BEFORE, Evaluation, Results

_MOST_SENTENCES = 6
_COUNTS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


class Summary(NamedTuple):
    introduction: str  # which models, on which data
    lead: str  # what the distilled student gained or lost; empty where nothing was measured
    others: list[str]  # on the other pairs that were compared
    untold: int  # how many more pairs were compared


def summarize(records: Sequence[Results]) -> Summary:
    evaluations = [evaluation for record in records for evaluation in record.evaluations]
    sentences = comparison_sentences(difference_table(records))
    if len(sentences) > _MOST_SENTENCES and overview_of(records) is not None:  # a table says more than so many
        return Summary(_introduction(records, evaluations, None), "", [], 0)
    subject = _subject(records, evaluations, list(sentences))
    measured = list(dict.fromkeys(evaluation.model for evaluation in evaluations))

    def distance(pair: Pair) -> tuple[bool, int]:  # the nearest earlier stage shows the effect of the last one
        return is_teacher(pair.baseline), -measured.index(pair.baseline) if pair.baseline in measured else 0

    lead = min((pair for pair in sentences if pair.model == subject), key=distance, default=None)
    others = [sentence for pair, sentence in sentences.items() if pair != lead]
    introduction = _introduction(records, evaluations, subject)
    told = sentences[lead] if lead else _metrics(records, evaluations)
    return Summary(introduction, told, others[:_MOST_SENTENCES], max(0, len(others) - _MOST_SENTENCES))


def _subject(records: Sequence[Results], evaluations: list[Evaluation], pairs: list[Pair]) -> str | None:
    """The model that the summary is about: the last stage of one record, else the one that was compared most."""
    students = [each.model for each in evaluations if not is_teacher(each.model) and each.model != BEFORE]
    compared = [pair.model for pair in pairs]
    if len(records) == 1 and students and (students[-1] in compared or not compared):
        return students[-1]
    if compared:
        return max(dict.fromkeys(compared), key=compared.count)
    return students[-1] if len(set(students)) == 1 else None


def _introduction(records: Sequence[Results], evaluations: list[Evaluation], subject: str | None) -> str:
    if not evaluations:
        which = f"This {records[0].kind} run holds" if len(records) == 1 else f"These {len(records)} records hold"
        return f"{which} no evaluation."
    sizes = {label: model.parameters for record in records for label, model in record.models.items()}
    labels = model_order(records) if len(records) > 1 else list(dict.fromkeys(each.model for each in evaluations))
    where = listed(list(dict.fromkeys(map(_data_words, evaluations))))

    def with_size(label: str) -> str:
        return f"{label} ({millions(sizes[label])} parameters)" if label in sizes else label

    if len(labels) == 1:
        return f"One model, {with_size(labels[0])}, was measured on {where}."
    if subject is None or subject not in sizes or TEACHER not in sizes:
        count = _COUNTS[len(labels)] if len(labels) < len(_COUNTS) else str(len(labels))
        return f"{count} models, {listed(labels)}, were measured on {where}."
    share = sizes[subject] / sizes[TEACHER]
    others = [label for label in labels if label not in (subject, TEACHER)]
    beside = f", beside {listed(others)}," if others else ""
    size = f"a student with {share * 100:.0f} % of the parameters of its {with_size(TEACHER)}"
    return f"{with_size(subject)}, {size}, was measured{beside} on {where}."


def _metrics(records: Sequence[Results], evaluations: list[Evaluation]) -> str:
    """Where nothing was compared: every metric of a single evaluation, else one metric of every model."""
    if len(evaluations) < 2:
        measured = [(metric_info(name), each.metrics[name]) for each in evaluations for name in in_order(each.metrics)]
        parts = [joined(info.phrase, *estimate(info, value), info.unit, by=" ") for info, value in measured]
        return f"Measured: {listed(parts)}." if parts else ""
    first, *others = comparison_table(records)
    rows = [first, *(row for row in others if row.setting == first.setting)]
    names = [name for row in rows for name in row.cells]
    name = "rouge_l" if "rouge_l" in names else next((name for name in names if metric_info(name).better), "")
    found = [f"{row.cells[name].value} for {row.model}" for row in rows if name in row.cells]
    decoding = f", {first.decoding}," if first.decoding else ""
    headline = f"On {first.data}{decoding} {metric_info(name).phrase} is {listed(found)}. " if found else ""
    return f"{headline}No differences were recorded, so this page claims none."


def _data_words(evaluation: Evaluation) -> str:
    rows = {measured.rows for measured in evaluation.metrics.values()} - {None}
    counted = len(rows) == 1 and not evaluation.data.endswith(" rows)")
    return f"{evaluation.data} ({rows.pop()} rows)" if counted else evaluation.data
