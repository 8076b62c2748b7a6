"""What each stage gained over another on the same rows."""

from collections.abc import Sequence
from typing import Literal

from promptkd.evaluation.statistics import paired_difference, paired_token_difference
from promptkd.results import Difference, Evaluation, Metric, RowResult

_COMPARED: tuple[tuple[str, Literal["higher", "lower"]], ...] = (
    ("loss", "lower"),
    ("kl_to_teacher", "lower"),
    ("rouge_l", "higher"),
    ("eos_share", "higher"),
)


def differences(evaluations: dict[str, Evaluation], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Paired differences, model less baseline, with 95 % intervals over rows; of what was measured of both."""
    made = []
    for model, baseline in pairs:
        ours, theirs = evaluations[model].samples, evaluations[baseline].samples
        for metric, better in _COMPARED:
            if metric in ours[0].scores and metric in theirs[0].scores:
                difference = _difference(metric, ours, theirs)
                made.append(
                    Difference(model=model, baseline=baseline, metric=metric, better=better, difference=difference)
                )
    return made


def _difference(metric: str, ours: list[RowResult], theirs: list[RowResult]) -> Metric:
    a, b = ([row.scores[metric] for row in rows] for rows in (ours, theirs))
    if metric not in ours[0].tokens:
        return paired_difference(a, b)
    tokens_a, tokens_b = ([row.tokens[metric] for row in rows] for rows in (ours, theirs))
    sums_a, sums_b = ([x * n for x, n in zip(*each, strict=True)] for each in ((a, tokens_a), (b, tokens_b)))
    return paired_token_difference(sums_a, tokens_a, sums_b, tokens_b)
