"""Several records read as one story: the same model and data set have the same label in all of them."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from promptkd.report.decoding import decoding_words
from promptkd.report.labels import data_names, is_teacher, model_names
from promptkd.results import Results

__all__ = ["run_labels", "unified"]

_MOST_NAMED = 3
_OF_ONE_MODEL = ("prune", "sft", "distill", "generate", "evaluate", "exposure-bias")
_Value = TypeVar("_Value")


def unified(records: Sequence[Results]) -> list[Results]:
    """The same records with every label of a model and of a data set rewritten to the one that all of them share.

    A difference without a data set is given the only one that its record measures. One on a data set that was decoded
    in two ways names the decoding.
    """
    models, data = model_names(records), data_names(records)
    return [
        _relabelled(
            record,
            {label: name for (place, label), name in models.items() if place == at},
            {label: name for (place, label), name in data.items() if place == at},
        )
        for at, record in enumerate(records)
    ]


def run_labels(records: Sequence[Results]) -> list[str]:
    """ "evaluate · promptkd · dolly_test" for each of the `unified` records; empty for a single one.

    Those of the same words are told apart by their times, and if need be by numbers.
    """
    if len(records) < 2:
        return [""] * len(records)
    words = [_run_words(record) for record in records]
    timed = [
        f"{label} · {record.created}" if words.count(label) > 1 else label
        for label, record in zip(words, records, strict=True)
    ]
    return [
        f"{label} ({timed[: at + 1].count(label)})" if timed.count(label) > 1 else label
        for at, label in enumerate(timed)
    ]


def _run_words(record: Results) -> str:
    measured = list(dict.fromkeys(evaluation.model for evaluation in record.evaluations))
    models = [label for label in record.models if not is_teacher(label)] or list(record.models) or measured
    data = list(dict.fromkeys(evaluation.data for evaluation in record.evaluations))
    parts = [record.kind, _few(models[:1] if record.kind in _OF_ONE_MODEL else models)]
    if record.kind in ("evaluate", "judge"):
        parts.append(_few(data))
    return " · ".join(part for part in parts if part)


def _few(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )


def _relabelled(record: Results, models: dict[str, str], data: dict[str, str]) -> Results:
    sets = list(dict.fromkeys(each.data for each in record.evaluations)) or list(record.data)
    only = sets[0] if len(sets) == 1 else ""
    settings = {label: _setting(record, label, data) for label in data}
    return record.model_copy(
        update={
            "models": _renamed(record.models.items(), models),
            "data": _renamed(record.data.items(), data),
            "training": _renamed(record.training.items(), models),
            "evaluations": [
                each.model_copy(update={"model": models[each.model], "data": data[each.data]})
                for each in record.evaluations
            ],
            "curves": [
                each.model_copy(update={"model": models[each.model], "data": data[each.data]}) for each in record.curves
            ],
            "differences": [
                each.model_copy(
                    update={
                        "model": models[each.model],
                        "baseline": models[each.baseline],
                        "data": settings.get(each.data or only, ""),
                    }
                )
                for each in record.differences
            ],
        }
    )


def _setting(record: Results, label: str, data: dict[str, str]) -> str:
    """The data set's name, with the decoding where the record has a label for each decoding of it."""
    decodings = {decoding_words(each.decoding) for each in record.evaluations if each.data == label}
    alone = list(data.values()).count(data[label]) == 1
    return data[label] if alone or len(decodings) != 1 else f"{data[label]}, {decodings.pop()}"


def _renamed(items: Iterable[tuple[str, _Value]], names: dict[str, str]) -> dict[str, _Value]:
    return {names[label]: value for label, value in items}
