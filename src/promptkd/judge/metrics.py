"""Answers judged by a language model: what it is asked, and what its verdicts come to.

Score: ratio = 100 Σ score(model's answer) / Σ score(reference), both in 1..10 and from the same verdicts; the feedback
score of MiniLLM (Gu et al. 2024, arXiv 2306.08543) and PromptKD. One question a row. Which of the two answers stands
first is drawn from the number of the row, so that a judge's taste for a position favours neither, and is the same for
every model.

Pairwise: two questions a row, one in each order. A win is a row whose two verdicts both name the model; a tie is one
whose verdicts both say so, or disagree. How often they disagree shows how far position decides.

Verdicts that cannot be read enter no mean: a row with one is left out, and its share is reported.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from promptkd.evaluation.statistics import mean_interval, paired_difference, token_mean_interval
from promptkd.judge.endpoint import Refusal, Reply
from promptkd.judge.prompt_template import Task
from promptkd.judge.questions import Answer
from promptkd.judge.verdict_log import Key, Verdict
from promptkd.judge.verdict_parsing import read_preference, read_scores
from promptkd.results import Difference, Evaluation, Metric, RowResult

_READERS: dict[Task, Callable[[str], tuple[float, float] | None]] = {"score": read_scores, "pairwise": read_preference}


def verdict_of(task: Task, key: Key, outcome: Reply | Refusal) -> Verdict:
    """The verdict that an endpoint's answer holds."""
    row, model_first = key
    if isinstance(outcome, Refusal):
        return Verdict(row=row, model_first=model_first, model=None, other=None, text="", refused=outcome.reason)
    first, second = _READERS[task](outcome.text) or (None, None)
    return Verdict(
        row=row,
        model_first=model_first,
        model=first if model_first else second,
        other=second if model_first else first,
        text=outcome.text,
        finish_reason=outcome.finish_reason,
        served_model=outcome.model,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
    )


def judge_results(
    models: Mapping[str, Mapping[int, Answer]], verdicts: Mapping[Key, Verdict], *, data: str, asked: dict[str, Any]
) -> tuple[list[Evaluation], list[Difference]]:
    """What the verdicts say of one model against the references, or of two models, each with the scores of its rows.

    Args:
        models: one or two models' answers, by label; `Verdict.model` speaks of the first.
        data: label of the data set.
        asked: how the judge was asked, the `decoding` of the evaluations.
    """
    if len(models) == 1:
        ((label, answers),) = models.items()
        metrics, samples = _scored(answers, [verdicts[key] for key in sorted(verdicts)])
        return [Evaluation(model=label, data=data, decoding=asked, metrics=metrics, samples=samples)], []
    asked = {**asked, "between": sorted(models)}
    evaluations = []
    for of_other, (label, answers) in enumerate(models.items()):
        metrics, samples = _compared(answers, verdicts, of_other=bool(of_other))
        evaluations.append(Evaluation(model=label, data=data, decoding=asked, metrics=metrics, samples=samples))
    return evaluations, _win_difference(*evaluations)


def _scored(answers: Mapping[int, Answer], verdicts: Sequence[Verdict]) -> tuple[dict[str, Metric], list[RowResult]]:
    """Mean scores, their ratio in % and the unparsable share; `verdicts` holds one a row."""
    read = [(each.model, each.other) for each in verdicts if each.model is not None and each.other is not None]
    metrics = {}
    if read:
        model, reference = (np.array(column) for column in zip(*read, strict=True))
        metrics["judge_ratio"] = token_mean_interval(100 * model, reference)
        metrics["judge_score"] = mean_interval(model)
        metrics["judge_reference_score"] = mean_interval(reference)
    samples = []
    for each in verdicts:
        scores = {"unparsable_share": float(each.model is None)}
        if each.model is not None and each.other is not None:
            scores |= {"judge_score": each.model, "judge_reference_score": each.other}
        samples.append(_sample(answers[each.row], scores))
    metrics["unparsable_share"] = mean_interval([sample.scores["unparsable_share"] for sample in samples])
    return metrics, samples


def _compared(
    answers: Mapping[int, Answer], verdicts: Mapping[Key, Verdict], *, of_other: bool
) -> tuple[dict[str, Metric], list[RowResult]]:
    """Win, tie, flip and unparsable shares of the model that gave `answers`: the first, or the other."""
    samples = [
        _sample(answer, _row_scores(verdicts[row, True], verdicts[row, False], of_other))
        for row, answer in answers.items()
    ]
    metrics = {}
    for name in ("win_rate", "tie_rate", "flip_rate", "unparsable_share"):
        values = [sample.scores[name] for sample in samples if name in sample.scores]
        if values:
            metrics[name] = mean_interval(values)
    return metrics, samples


def _row_scores(one: Verdict, two: Verdict, of_other: bool) -> dict[str, float]:
    shares = [each.other if of_other else each.model for each in (one, two)]
    unread = sum(share is None for share in shares) / 2
    if unread:
        return {"unparsable_share": unread}
    return {
        "win_rate": float(shares == [1.0, 1.0]),
        "tie_rate": float(shares not in ([1.0, 1.0], [0.0, 0.0])),
        "flip_rate": float(shares[0] != shares[1]),
        "unparsable_share": 0.0,
    }


def _win_difference(model: Evaluation, other: Evaluation) -> list[Difference]:
    """Wins less the other's wins; none where no row has both verdicts."""
    wins = [
        [sample.scores["win_rate"] for sample in each.samples if "win_rate" in sample.scores] for each in (model, other)
    ]
    if not wins[0]:
        return []
    found = paired_difference(wins[0], wins[1])
    return [
        Difference(
            model=model.model,
            baseline=other.model,
            metric="win_rate",
            difference=found,
            better="higher",
            data=model.data,
        )
    ]


def judge_notes(verdicts: Collection[Verdict], *, judge: str) -> list[str]:
    """What a reader of the figures must know: who judged, and which verdicts are missing."""
    served = sorted({each.served_model for each in verdicts if each.served_model})
    refused = [each.refused for each in verdicts if each.refused]
    unread = sum(each.model is None for each in verdicts)
    notes = [f"Judged by {judge}" + (f", which answered as {', '.join(served)}." if served else ".")]
    if unread:
        notes.append(f"{unread} of {len(verdicts)} verdicts could not be read; their rows enter no other figure.")
    if refused:
        notes.append(f"The endpoint refused {len(refused)} of {len(verdicts)} requests, the first for: {refused[0]}.")
    return notes


def token_cost(verdicts: Iterable[Verdict]) -> dict[str, Metric]:
    """Tokens of questions and verdicts as far as the endpoint counts them; `rows` is how many it counted."""
    counted = [
        (each.prompt_tokens, each.completion_tokens)
        for each in verdicts
        if each.prompt_tokens is not None and each.completion_tokens is not None
    ]
    if not counted:
        return {}
    sums = [sum(column) for column in zip(*counted, strict=True)]
    names = ("judge_prompt_tokens", "judge_completion_tokens")
    return {name: Metric(value=value, rows=len(counted)) for name, value in zip(names, sums, strict=True)}


def _sample(answer: Answer, scores: dict[str, float]) -> RowResult:
    return RowResult(
        row=answer.row,
        prompt=answer.prompt,
        references=list(answer.references),
        response=answer.response,
        scores=scores,
    )
