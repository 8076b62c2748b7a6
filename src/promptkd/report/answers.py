"""The same requests, answered by every model: what the browser of rows shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from promptkd.report.decoding import decoding_words
from promptkd.report.metrics import in_order, metric, score
from promptkd.report.story import run_labels
from promptkd.report.tables import model_order
from promptkd.results import Results, RowResult
from promptkd.visible import visible

__all__ = ["Answer", "Request", "RowSet", "View", "answering_models", "browser_data", "first_requests", "row_sets"]

FIRST_REQUESTS = 10
_DIGITS = 4
_Place = tuple[int, str]
"""Row and prompt: answers stand side by side only under the very prompt that they were given."""


@dataclass(slots=True)
class View:
    """One decoding of a data set: greedy, or one seed."""

    label: str
    setting: str
    """The decoding without its seed: views of one setting are samples of the same distribution."""
    answers: dict[str, dict[_Place, RowResult]] = field(default_factory=dict)
    """By model."""


@dataclass(slots=True)
class RowSet:
    """All recorded requests of a data set, and every answer to them."""

    data: str
    references: dict[_Place, list[str]] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)

    @property
    def places(self) -> list[_Place]:
        """The requests in the order of their rows."""
        return sorted(self.references, key=lambda place: place[0])


@dataclass(frozen=True, slots=True)
class Answer:
    model: str
    text: str
    scores: list[str]


@dataclass(frozen=True, slots=True)
class Request:
    data: str
    row: int
    prompt: str
    references: list[str]
    answers: list[Answer]


def row_sets(records: Sequence[Results]) -> list[RowSet]:
    """Every answer in the `unified` records, by data set, decoding and model."""
    found: dict[str, RowSet] = {}
    for record, run in zip(records, run_labels(records), strict=True):
        for each in record.evaluations:
            for sample in each.samples:
                rows = found.setdefault(each.data, RowSet(each.data))
                rows.references.setdefault((sample.row, sample.prompt), sample.references)
                view = _view(rows, each.decoding, sample.seed)
                _add(view, each.model, run, sample)
    return list(found.values())


def _view(rows: RowSet, decoding: dict[str, Any], seed: int | None) -> View:
    without = {name: value for name, value in decoding.items() if name not in ("seed", "seeds")}
    seeded = [] if seed is None else [f"seed {seed}"]
    label = ", ".join([*seeded, *filter(None, [decoding_words(without)])]) or "as recorded"
    for view in rows.views:
        if view.label == label:
            return view
    rows.views.append(View(label, decoding_words(without) or label))
    return rows.views[-1]


def _add(view: View, model: str, run: str, sample: RowResult) -> None:
    """Join the scores of one answer; another answer of the same model to the same request stands under its run."""
    place = sample.row, sample.prompt
    held = view.answers.setdefault(model, {}).setdefault(place, sample)
    if held.response == sample.response:
        merged = held.model_copy(update={"scores": {**sample.scores, **held.scores}})
        view.answers[model][place] = merged
    else:
        view.answers.setdefault(f"{model}, {run}" if run else f"{model}, again", {})[place] = sample


def answering_models(records: Sequence[Results], sets: Sequence[RowSet]) -> list[str]:
    """`model_order`, and behind it those that stand under their run (see `_add`)."""
    views = [view for rows in sets for view in rows.views]
    return list(dict.fromkeys([*model_order(records), *(model for view in views for model in view.answers)]))


def first_requests(sets: Sequence[RowSet], models: Sequence[str], limit: int = FIRST_REQUESTS) -> list[Request]:
    """The first requests of the first data set under its first decoding, for readers without scripts."""
    if not sets:
        return []
    rows = sets[0]
    view = rows.views[0]
    return [
        Request(rows.data, place[0], place[1], rows.references[place], _answers(view, place, models))
        for place in rows.places[:limit]
    ]


def _answers(view: View, place: _Place, models: Sequence[str]) -> list[Answer]:
    held = [(model, view.answers[model].get(place)) for model in models if model in view.answers]
    return [
        Answer(model, sample.response, [score(name, sample.scores[name]) for name in in_order(sample.scores)])
        for model, sample in held
        if sample is not None
    ]


def browser_data(records: Sequence[Results], sets: Sequence[RowSet], models: Sequence[str]) -> dict[str, Any]:
    """What the page's script browses: every prompt and reference once, answers and scores in columns by request.

    Metrics, [label, unit, better, decimals, yes-value] each, and models are named by position. Scores are in the
    metric's unit, null where there is none.
    """
    names = in_order(
        name for record in records for each in record.evaluations for row in each.samples for name in row.scores
    )
    return {
        "metrics": [_figure(name) for name in names],
        "sets": [_set(rows, models, names) for rows in sets],
    }


def _figure(name: str) -> list[Any]:
    figure = metric(name)
    yes = None if figure.whole is None else figure.whole * figure.scale
    return [visible(figure.label), figure.unit, figure.better, figure.decimals, yes]


def _set(rows: RowSet, models: Sequence[str], names: list[str]) -> dict[str, Any]:
    places = rows.places
    return {
        "data": visible(rows.data),
        "row": [row for row, _ in places],
        "prompt": [visible(prompt) for _, prompt in places],
        "references": [[visible(text) for text in rows.references[place]] for place in places],
        "views": [_columns(view, places, models, names) for view in rows.views],
    }


def _columns(view: View, places: list[_Place], models: Sequence[str], names: list[str]) -> dict[str, Any]:
    answers = []
    for position, model in enumerate(models):
        held = view.answers.get(model)
        if held is None:
            continue
        samples = [held.get(place) for place in places]
        scored = [name for name in names if any(sample and name in sample.scores for sample in samples)]
        answers.append(
            {
                "model": position,
                "text": [None if sample is None else visible(sample.response) for sample in samples],
                "scores": {names.index(name): [_score(name, sample) for sample in samples] for name in scored},
            }
        )
    return {"label": visible(view.label), "setting": visible(view.setting), "answers": answers}


def _score(name: str, sample: RowResult | None) -> float | None:
    if sample is None or not math.isfinite(sample.scores.get(name, math.nan)):
        return None
    value = float(f"{sample.scores[name] * metric(name).scale:.{_DIGITS}g}")
    return int(value) if value.is_integer() else value
