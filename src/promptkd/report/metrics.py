"""What every figure is called, its unit, which direction is better, and how it is written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from promptkd.results import Metric

__all__ = [
    "METRICS",
    "Better",
    "Figure",
    "deviation",
    "effect",
    "estimate",
    "in_order",
    "metric",
    "number",
    "power",
    "probability",
    "score",
]

Better = Literal["higher", "lower"]
MOST_EXTRA_DECIMALS = 4
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    """The key in the record."""
    label: str
    """Column heading."""
    phrase: str
    """The same inside a sentence."""
    unit: str
    better: Better | None
    """None: neither direction is better."""
    decimals: int
    meaning: str
    scale: float = 1
    """The recorded value times this is in `unit`."""
    whole: float | None = None
    """Set where one row either counts fully, with this recorded value, or not at all: such a score is yes or no."""

    @property
    def direction(self) -> str:
        return f"{self.better} is better" if self.better else "no better direction"

    @property
    def difference_unit(self) -> str:
        return {"%": "percentage points", "of 100": "points"}.get(self.unit, self.unit)


METRICS: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(
            "loss",
            "Validation loss",
            "validation loss",
            "nats/token",
            "lower",
            2,
            "Mean negative log-likelihood of the reference answers, given the request.",
        ),
        Figure(
            "kl_to_teacher",
            "KL to the teacher",
            "KL to the teacher",
            "nats/token",
            "lower",
            2,
            "KL(student‖teacher) on answers that the student samples itself: 0 is a perfect copy of the teacher.",
        ),
        Figure(
            "rouge_l",
            "ROUGE-L",
            "ROUGE-L",
            "of 100",
            "higher",
            1,
            "Longest common subsequence of answer and reference as an F score, the best over references.",
        ),
        Figure(
            "rouge_1",
            "ROUGE-1",
            "ROUGE-1",
            "of 100",
            "higher",
            1,
            "Words that answer and reference have in common as an F score, the best over references.",
        ),
        Figure(
            "exact_match",
            "Exact match",
            "exact match",
            "of 100",
            "higher",
            1,
            "Share of answers that equal a reference after normalisation.",
            whole=100,
        ),
        Figure(
            "eos_share",
            "Ends by itself",
            "share of answers that end by themselves",
            "%",
            "higher",
            0,
            "Share of answers that emit an end-of-response token before the length limit.",
            scale=100,
            whole=1,
        ),
        Figure(
            "cut_share",
            "Cut at the limit",
            "share of answers cut at the limit",
            "%",
            "lower",
            0,
            "Share of answers that reach the length limit without an end.",
            scale=100,
            whole=1,
        ),
        Figure(
            "response_length",
            "Answer length",
            "answer length",
            "tokens",
            None,
            1,
            "Mean length of the answers; longer is neither better nor worse.",
        ),
        Figure(
            "length_ratio",
            "Length to reference",
            "length against the references",
            "",
            None,
            2,
            "Tokens of all answers over tokens of all references; 1 is as long as the references.",
        ),
        Figure(
            "distinct_1",
            "Distinct-1",
            "share of distinct tokens",
            "%",
            None,
            0,
            "Different tokens over all tokens of an answer: low where it repeats itself.",
            scale=100,
        ),
        Figure(
            "distinct_2",
            "Distinct-2",
            "share of distinct token pairs",
            "%",
            None,
            0,
            "Different pairs of neighbouring tokens over all pairs of an answer: low where it repeats itself.",
            scale=100,
        ),
        Figure(
            "judge_ratio",
            "Judge's ratio",
            "ratio of the judge's scores to the reference's",
            "%",
            "higher",
            1,
            "Sum of the judge's scores of the answers over that of the references, both from 1 to 10.",
        ),
        Figure(
            "judge_score",
            "Judge's score",
            "judge's score",
            "of 10",
            "higher",
            2,
            "Mean score that the judge gave the answers, from 1 to 10.",
        ),
        Figure(
            "judge_reference_score",
            "Reference's score",
            "judge's score of the references",
            "of 10",
            None,
            2,
            "Mean score that the judge gave the references beside the answers, from 1 to 10.",
        ),
        Figure(
            "win_rate",
            "Wins",
            "share of rows won before the judge",
            "%",
            "higher",
            1,
            "Share of rows whose answer the judge prefers in both orders.",
            scale=100,
            whole=1,
        ),
        Figure(
            "tie_rate",
            "Ties",
            "share of rows without a winner",
            "%",
            None,
            1,
            "Share of rows where both orders give a tie, or the two disagree.",
            scale=100,
            whole=1,
        ),
        Figure(
            "flip_rate",
            "Flips",
            "share of rows whose verdict changes with the order",
            "%",
            None,
            1,
            "Share of rows where the judge's verdict changes when the two answers change places: its position bias.",
            scale=100,
            whole=1,
        ),
        Figure(
            "unparsable_share",
            "Unreadable verdicts",
            "share of verdicts that could not be read",
            "%",
            None,
            1,
            "Share of the judge's verdicts that name no score or winner; their rows enter no other figure.",
            scale=100,
            whole=1,
        ),
    )
}


def metric(name: str) -> Figure:
    """The figure that `name` stands for; a name that is not known is shown as it is."""
    return METRICS.get(name) or Figure(name, name, name, "", None, 3, "")


def in_order(names: Iterable[str]) -> list[str]:
    """Known names in the order of `METRICS`, then the others in the order of their first appearance."""
    seen = list(dict.fromkeys(names))
    return [name for name in METRICS if name in seen] + [name for name in seen if name not in METRICS]


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """`value` in decimals, with a true minus sign. Zero has no sign."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    written = f"{abs(value):.{decimals}f}"
    if value != 0 and float(written) == 0:
        written = power(f"{abs(value):.1e}")
    sign = "" if value == 0 else "−" if value < 0 else "+" if signed else ""
    return sign + written


def power(written: str) -> str:
    """ "2.0e-05" as it is written by hand: "2.0×10⁻⁵"."""
    mantissa, marker, exponent = written.partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}" if marker else written


def estimate(figure: Figure, measured: Metric, *, signed: bool = False, flip: bool = False) -> tuple[str, str | None]:
    """Value and "[low, high]" (None without an interval) in the figure's unit, as text.

    `flip` negates all three. Both share one number of decimals, enough that no end but zero itself reads as zero
    and that two different ends read differently.
    """
    factor = -figure.scale if flip else figure.scale
    value = measured.value * factor
    if measured.low is None or measured.high is None:
        return number(value, _decimals(figure, [value]), signed=signed), None
    low, high = sorted((measured.low * factor, measured.high * factor))
    decimals = _decimals(figure, [value, low, high])
    low_text, high_text = (number(end, decimals, signed=signed) for end in (low, high))
    return number(value, decimals, signed=signed), f"[{low_text}, {high_text}]"


def deviation(figure: Figure, measured: Metric) -> str | None:
    """ "± 0.4" between the seeds, in the figure's unit; None where there was one decoding."""
    if measured.deviation is None:
        return None
    spread = measured.deviation * figure.scale
    return f"± {number(spread, _decimals(figure, [spread]))}"


def _decimals(figure: Figure, values: list[float]) -> int:
    finite = [value for value in values if math.isfinite(value)]
    for decimals in range(figure.decimals, figure.decimals + MOST_EXTRA_DECIMALS):
        rounded = [round(value, decimals) for value in finite]
        hidden = any(value != 0 and short == 0 for value, short in zip(finite, rounded, strict=True))
        merged = len(finite) == 3 and finite[1] != finite[2] and rounded[1] == rounded[2]
        if not hidden and not merged:
            return decimals
    return figure.decimals + MOST_EXTRA_DECIMALS


def probability(value: float | None) -> str:
    """A p-value: "0.012", "< 0.001"; a dash where there is none."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def effect(value: float | None) -> str:
    """An effect size: "+0.42"; a dash where there is none."""
    return "–" if value is None else number(value, 2, signed=True)


def score(name: str, value: float) -> str:
    """The score of one row: "ROUGE-L 31.2", "Ends by itself: yes", "Answer length 20 tokens"."""
    figure = metric(name)
    if figure.whole is not None and value in (0, figure.whole):
        return f"{figure.label}: {'yes' if value else 'no'}"
    counted = figure.unit == "tokens" and value % 1 == 0
    text = number(value, 0) if counted else estimate(figure, Metric(value=value))[0]
    return f"{figure.label} {text} {figure.unit}" if figure.unit in ("%", "tokens") else f"{figure.label} {text}"
