"""What the paired differences of one pair of models allow one to say, in sentences."""

from collections.abc import Sequence

from promptkd.report.differences import DifferenceRow
from promptkd.report.metrics import probability

__all__ = ["Pair", "comparison_sentences", "listed", "paired"]

Pair = tuple[str, str, str]
"""Data set, model, baseline."""
MOST_WITH_NUMBERS = 8


def paired(rows: Sequence[DifferenceRow]) -> dict[Pair, list[DifferenceRow]]:
    """The differences of each pair on each data set, in the order of first appearance."""
    pairs: dict[Pair, list[DifferenceRow]] = {}
    for row in rows:
        pairs.setdefault((row.data, row.model, row.baseline), []).append(row)
    return pairs


def comparison_sentences(rows: Sequence[DifferenceRow]) -> dict[Pair, str]:
    """What can be said of every pair in `rows`. The data set is named where there are several."""
    many = len({row.data for row in rows}) > 1
    return {
        (data, model, baseline): (f"On {data}: " if many and data else "") + _sentence(model, baseline, found)
        for (data, model, baseline), found in paired(rows).items()
    }


def _sentence(model: str, baseline: str, rows: list[DifferenceRow]) -> str:
    """What the intervals tell apart, then what they do not, then what has none."""
    told = [
        f"{row.change} {row.figure.phrase} by {row.size} {row.figure.difference_unit}".rstrip() + f" ({_gain(row)})"
        for row in rows
        if row.verdict in ("better", "worse")
    ]
    brief = len(rows) > MOST_WITH_NUMBERS
    tied = [
        row.figure.phrase + ("" if brief else f" ({row.value} {row.interval}{_chance(row)})")
        for row in rows
        if row.verdict == "tied"
    ]
    unknown = [f"{row.figure.phrase} ({row.value})" for row in rows if row.verdict == "open"]
    parts = [f"Compared with {baseline}, {model} has {listed(told)}."] if told else []
    if tied:
        pair = "The two" if parts else f"{model} and {baseline}"
        parts.append(f"{pair} cannot be told apart on {listed(tied)}.")
    if unknown:
        between = "" if parts else f" between {model} and {baseline}"
        parts.append(f"No usable interval was recorded{between} for {listed(unknown)}, so nothing is claimed there.")
    return " ".join(parts)


def _chance(row: DifferenceRow) -> str:
    """Why two models are not told apart although the interval excludes zero."""
    low, high = row.source.difference.low, row.source.difference.high
    if row.source.p_adjusted is None or low is None or high is None or low <= 0 <= high:
        return ""
    return f", adjusted p {probability(row.source.p_adjusted)}"


def _gain(row: DifferenceRow) -> str:
    return "a gain" if row.verdict == "better" else "a loss"


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
