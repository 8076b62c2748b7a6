"""Answers judged by a language model: what its verdicts come to.

Score: ratio = 100 Σ score(model's answer) / Σ score(reference), both in 1..10 and from the same verdicts; the feedback
score of MiniLLM (Gu et al. 2024, arXiv 2306.08543) and PromptKD. Which of the two answers is shown first is drawn from
the number of the row, the same for every model.

Pairwise: two questions per row, one in each order. A win is a row whose two verdicts both name the model; a tie is one
whose verdicts both say so, or disagree. How often they disagree shows how far position decides.

A row with a verdict that cannot be read enters no mean, and the share of such verdicts is reported.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from promptkd.evaluation.statistics import mean_interval, paired_difference, token_mean_interval
from promptkd.judge.questions import Answers, Key
from promptkd.judge.verdicts import Verdict
from promptkd.results import Difference, Evaluation, Metric, RowResult

Scores = dict[int, dict[str, float]]  # by row and name
_MEANS = ("judge_score", "judge_reference_score", "win_rate", "tie_rate", "flip_rate", "unparsable_share")


def judge_results(
    models: Mapping[str, Answers], verdicts: Mapping[Key, Verdict], data: str, asked: dict[str, Any]
) -> tuple[list[Evaluation], list[Difference]]:
    """What the verdicts say of one model against the references, or of two models, each with the scores of its rows.

    `Verdict.model` speaks of the first model; `asked`, how the judge was asked, is the `decoding` of the evaluations.
    """
    if len(models) == 1:
        ((label, answers),) = models.items()
        scores = {row: _row_scores(verdict) for (row, _), verdict in sorted(verdicts.items())}
        return [_evaluation(label, data, asked, answers, scores)], []
    evaluations, wins = [], []
    asked = {**asked, "between": sorted(models)}
    for of_other, (label, answers) in enumerate(models.items()):
        scores = {row: _row_rates(verdicts[row, True], verdicts[row, False], bool(of_other)) for row in answers}
        evaluations.append(_evaluation(label, data, asked, answers, scores))
        wins.append([each["win_rate"] for each in scores.values() if "win_rate" in each])
    if not wins[0]:
        return evaluations, []
    model, other = models
    won = paired_difference(wins[0], wins[1])
    difference = Difference(model=model, baseline=other, metric="win_rate", difference=won, better="higher", data=data)
    return evaluations, [difference]


def _row_scores(verdict: Verdict) -> dict[str, float]:
    unread = {"unparsable_share": float(verdict.model is None)}
    if verdict.model is None or verdict.other is None:
        return unread
    return unread | {"judge_score": verdict.model, "judge_reference_score": verdict.other}


def _row_rates(one: Verdict, two: Verdict, of_other: bool) -> dict[str, float]:
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


def _evaluation(label: str, data: str, asked: dict[str, Any], answers: Answers, scores: Scores) -> Evaluation:
    """Means over the rows that have a score, and the ratio of the judge's scores in %."""
    columns = {name: [each[name] for each in scores.values() if name in each] for name in _MEANS}
    metrics = {name: mean_interval(values) for name, values in columns.items() if values}
    if "judge_score" in metrics:
        model, reference = (np.array(columns[name]) for name in _MEANS[:2])
        metrics = {"judge_ratio": token_mean_interval(100 * model, reference), **metrics}
    samples = [RowResult(**vars(answers[row]), scores=each) for row, each in scores.items()]
    return Evaluation(model=label, data=data, decoding=asked, metrics=metrics, samples=samples)


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


def token_cost(verdicts: Collection[Verdict]) -> dict[str, Metric]:
    """Tokens of questions and verdicts as far as the endpoint counts them; `rows` is how many it counted."""
    used = [(each.prompt_tokens, each.completion_tokens) for each in verdicts]
    counted = [(prompt, completion) for prompt, completion in used if prompt is not None and completion is not None]
    names = ("judge_prompt_tokens", "judge_completion_tokens")
    sums = zip(names, map(sum, zip(*counted, strict=True)), strict=True) if counted else ()
    return {name: Metric(value=value, rows=len(counted)) for name, value in sums}
