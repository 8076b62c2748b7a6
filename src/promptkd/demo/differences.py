"""What distillation gained in all and by stage, and what the last student keeps of its teacher."""

from collections.abc import Iterator
from itertools import product

from promptkd.evaluation.statistics import paired_difference, paired_token_difference, paired_token_ratio
from promptkd.results import Better, Difference, Evaluation

_PAIRS = (("distilled", "pruned"), ("recovered", "pruned"), ("distilled", "recovered"), ("distilled", "teacher"))
_COMPARED: dict[str, Better] = {"loss": "lower", "kl_to_teacher": "lower", "rouge_l": "higher", "eos_share": "higher"}


def differences(measured: dict[str, Evaluation]) -> Iterator[Difference]:
    """Paired differences, model less baseline, with 95 % intervals over rows; of what was measured of both."""
    for (model, baseline), (metric, better) in product(_PAIRS, _COMPARED.items()):
        ours, theirs = measured[model].samples, measured[baseline].samples
        if metric not in ours[0].scores or metric not in theirs[0].scores:
            continue
        a, b = ([row.scores[metric] for row in rows] for rows in (ours, theirs))
        if metric in ours[0].tokens:
            n, m = ([row.tokens[metric] for row in rows] for rows in (ours, theirs))
            a, b = ([x * count for x, count in zip(*each, strict=True)] for each in ((a, n), (b, m)))
            difference = paired_token_difference(a, n, b, m)
        else:
            difference = paired_difference(a, b)
        found = Difference(model=model, baseline=baseline, metric=metric, better=better, difference=difference)
        if baseline == "teacher" and better == "higher":
            ones = [1.0] * len(a)
            found.ratio = paired_token_ratio(a, ones, b, ones)
        yield found
