"""The same requests with every model's answers: the data of the page's browser of rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from promptkd.report.formatting import decoding_words, joined
from promptkd.report.labels import run_labels
from promptkd.report.metrics import in_order, metric_info
from promptkd.report.tables import model_order
from promptkd.results import Results, RowResult
from promptkd.visible import visible

_Place = tuple[int, str]  # row and prompt: answers are shown together only under the very prompt that they were given


@dataclass(slots=True)
class View:
    """One decoding of a data set: greedy, or one seed. Views of one setting sample the same distribution."""

    label: str
    setting: str  # the decoding without its seed
    answers: dict[str, dict[_Place, RowResult]] = field(default_factory=dict)  # by model

    def add(self, model: str, run: str, sample: RowResult) -> None:
        """Join the scores of one answer; another answer of the same model to the same request goes under its run."""
        place = sample.row, sample.prompt
        held = self.answers.setdefault(model, {}).setdefault(place, sample)
        if held.response == sample.response:
            self.answers[model][place] = held.model_copy(update={"scores": {**sample.scores, **held.scores}})
        else:
            self.answers.setdefault(f"{model}, {run}" if run else f"{model}, again", {})[place] = sample


@dataclass(slots=True)
class RowSet:
    data: str
    references: dict[_Place, list[str]] = field(default_factory=dict)
    asked: dict[_Place, list[tuple[str, str]]] = field(default_factory=dict)  # roles and texts; one without a role
    views: dict[str, View] = field(default_factory=dict)  # by label

    @property
    def places(self) -> list[_Place]:
        return sorted(self.references, key=lambda place: place[0])


def row_sets(records: Sequence[Results]) -> list[RowSet]:
    """Every answer in the `unified` records, by data set, decoding and model."""
    found: dict[str, RowSet] = {}
    for record, run in zip(records, run_labels(records), strict=True):
        for each in record.evaluations:
            setting = decoding_words({key: how for key, how in each.decoding.items() if key not in ("seed", "seeds")})
            for sample in each.samples:
                rows = found.setdefault(each.data, RowSet(each.data))
                place = (sample.row, sample.prompt)
                rows.references.setdefault(place, sample.references)
                rows.asked.setdefault(place, _asked(sample))
                label = joined("" if sample.seed is None else f"seed {sample.seed}", setting) or "as recorded"
                rows.views.setdefault(label, View(label, setting or label)).add(each.model, run, sample)
    return list(found.values())


def _asked(sample: RowResult) -> list[tuple[str, str]]:
    """The request as a reader sees it; the role of a single turn by the user goes without saying."""
    turns = sample.request or [("", sample.prompt)]
    return [("", turns[0][1])] if len(turns) == 1 and turns[0][0] == "user" else turns


def answering_models(records: Sequence[Results], sets: Sequence[RowSet]) -> list[str]:
    """`model_order`, followed by the models whose second answers go under their run (see `View.add`)."""
    views = [view for rows in sets for view in rows.views.values()]
    return list(dict.fromkeys([*model_order(records), *(model for view in views for model in view.answers)]))


def browser_data(records: Sequence[Results], sets: Sequence[RowSet], models: Sequence[str]) -> dict[str, Any]:
    """What the page's script browses: every prompt and reference once, answers and scores in columns by request.

    Metrics, [label, unit, better, decimals, value of a yes] each, and models are named by position.
    """
    samples = [sample for record in records for each in record.evaluations for sample in each.samples]
    names = in_order(name for sample in samples for name in sample.scores)
    metrics = [
        [visible(info.label), info.unit, info.better, info.decimals, info.yes and info.yes * info.scale]
        for info in map(metric_info, names)
    ]
    return {"metrics": metrics, "sets": [_set(rows, models, names) for rows in sets]}


def _set(rows: RowSet, models: Sequence[str], names: list[str]) -> dict[str, Any]:
    places, views = rows.places, []
    for view in rows.views.values():
        found = [(at, view.answers[model]) for at, model in enumerate(models) if model in view.answers]
        answers = [{"model": at, **_columns([own.get(place) for place in places], names)} for at, own in found]
        views.append({"label": visible(view.label), "setting": visible(view.setting), "answers": answers})
    return {
        "data": visible(rows.data),
        "row": [row for row, _ in places],
        "asked": [[[visible(role), visible(text)] for role, text in rows.asked[place]] for place in places],
        "references": [[visible(text) for text in rows.references[place]] for place in places],
        "views": views,
    }


def _columns(samples: list[RowResult | None], names: list[str]) -> dict[str, Any]:
    held = [sample.scores if sample else {} for sample in samples]
    scored = [(at, name) for at, name in enumerate(names) if any(name in scores for scores in held)]
    return {
        "text": [visible(sample.response) if sample else None for sample in samples],
        "scores": {at: [_shown(name, scores.get(name, math.nan)) for scores in held] for at, name in scored},
    }


def _shown(name: str, score: float) -> float | None:
    if not math.isfinite(score):
        return None
    value = float(f"{score * metric_info(name).scale:.4g}")
    return int(value) if value.is_integer() else value
