"""Answers judged by a language model: what its verdicts come to.

Score: ratio = 100 Σ score(model's answer) / Σ score(reference), both in 1..10 and from the same verdicts; the feedback
score of MiniLLM (Gu et al. 2024, arXiv 2306.08543) and PromptKD. One question per row. Which of the two answers is
shown first is drawn from the number of the row, so that a judge's taste for a position favors neither, and is the same
for every model.

Pairwise: two questions per row, one in each order. A win is a row whose two verdicts both name the model; a tie is one
whose verdicts both say so, or disagree. How often they disagree shows how far position decides.

Verdicts that cannot be read enter no mean: a row with one is left out, and its share is reported.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from promptkd.evaluation.statistics import mean_interval, paired_difference, token_mean_interval
from promptkd.judge.questions import JudgedAnswer, Key
from promptkd.judge.verdicts import Verdict
from promptkd.results import Difference, Evaluation, Metric, RowResult

Scores = dict[int, dict[str, float]]
"""Of each row, by its number."""


def judge_results(
    models: Mapping[str, Mapping[int, JudgedAnswer]],
    verdicts: Mapping[Key, Verdict],
    *,
    data: str,
    asked: dict[str, Any],
) -> tuple[list[Evaluation], list[Difference]]:
    """What the verdicts say of one model against the references, or of two models, each with the scores of its rows.

    Args:
        models: one or two models' answers, by label; `Verdict.model` speaks of the first.
        data: label of the data set.
        asked: how the judge was asked, the `decoding` of the evaluations.
    """
    evaluations: list[Evaluation] = []
    for label, answers in models.items():
        if len(models) == 1:
            scores = {row: _row_scores(verdict) for (row, _), verdict in sorted(verdicts.items())}
        else:
            scores = {
                row: _row_rates(verdicts[row, True], verdicts[row, False], of_other=bool(evaluations))
                for row in answers
            }
        evaluations.append(
            Evaluation(
                model=label,
                data=data,
                decoding=asked if len(models) == 1 else {**asked, "between": sorted(models)},
                metrics=_metrics(scores),
                samples=[_sample(answers[row], each) for row, each in scores.items()],
            )
        )
    return evaluations, _win_difference(*evaluations) if len(models) == 2 else []


def _row_scores(verdict: Verdict) -> dict[str, float]:
    unread = {"unparsable_share": float(verdict.model is None)}
    if verdict.model is None or verdict.other is None:
        return unread
    return unread | {"judge_score": verdict.model, "judge_reference_score": verdict.other}


def _row_rates(one: Verdict, two: Verdict, *, of_other: bool) -> dict[str, float]:
    """Of a row between two models, as the first or the other of them sees it."""
    shares = [each.other if of_other else each.model for each in (one, two)]
    unread = {"unparsable_share": sum(share is None for share in shares) / 2}
    if None in shares:
        return unread
    return {
        "win_rate": float(shares == [1.0, 1.0]),
        "tie_rate": float(shares not in ([1.0, 1.0], [0.0, 0.0])),
        "flip_rate": float(shares[0] != shares[1]),
        **unread,
    }


def _metrics(scores: Scores) -> dict[str, Metric]:
    """Means over the rows that have a score, and the ratio of the judge's scores in %."""
    names = ("judge_score", "judge_reference_score", "win_rate", "tie_rate", "flip_rate", "unparsable_share")
    columns = {name: [each[name] for each in scores.values() if name in each] for name in names}
    metrics = {name: mean_interval(values) for name, values in columns.items() if values}
    if "judge_score" not in metrics:
        return metrics
    model, reference = (np.array(columns[name]) for name in names[:2])
    return {"judge_ratio": token_mean_interval(100 * model, reference), **metrics}


def _sample(answer: JudgedAnswer, scores: dict[str, float]) -> RowResult:
    return RowResult(
        row=answer.row,
        prompt=answer.prompt,
        references=list(answer.references),
        response=answer.response,
        scores=scores,
    )


def _win_difference(model: Evaluation, other: Evaluation) -> list[Difference]:
    """Wins less the other's wins; none where no row has both verdicts."""
    wins = [
        [sample.scores["win_rate"] for sample in each.samples if "win_rate" in sample.scores] for each in (model, other)
    ]
    if not wins[0]:
        return []
    return [
        Difference(
            model=model.model,
            baseline=other.model,
            metric="win_rate",
            difference=paired_difference(wins[0], wins[1]),
            better="higher",
            data=model.data,
        )
    ]


def judge_notes(verdicts: Collection[Verdict], *, judge: str) -> list[str]:
    """What a reader of the metrics must know: who judged, and which verdicts are missing."""
    served = sorted({each.served_model for each in verdicts if each.served_model})
    refused = [each.refused for each in verdicts if each.refused]
    unread = sum(each.model is None for each in verdicts)
    notes = [f"Judged by {judge}" + (f", which answered as {', '.join(served)}." if served else ".")]
    if unread:
        notes.append(f"{unread} of {len(verdicts)} verdicts could not be read; their rows enter no other metric.")
    if refused:
        notes.append(f"The endpoint refused {len(refused)} of {len(verdicts)} requests, the first for: {refused[0]}.")
    return notes


def token_cost(verdicts: Iterable[Verdict]) -> dict[str, Metric]:
    """Tokens of questions and verdicts as far as the endpoint counts them; `rows` is how many it counted."""
    counted = [
        {"judge_prompt_tokens": each.prompt_tokens, "judge_completion_tokens": each.completion_tokens}
        for each in verdicts
        if each.prompt_tokens is not None and each.completion_tokens is not None
    ]
    names = counted[0] if counted else ()
    return {name: Metric(value=sum(each[name] for each in counted), rows=len(counted)) for name in names}
