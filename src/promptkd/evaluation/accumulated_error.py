"""Excess accumulated error, from the errors at every token of a student's and a teacher's continuations.

    ExAccErr(l) = (R(l) - l ε(l)) / (l ε(l)) x 100 %     (Arora et al. 2022, "Why Exposure Bias Matters"; PromptKD)

- R(l) = r_1 + … + r_l, r_t the mean error at token t of the student's own continuations,
- l ε(l) = e_1 + … + e_l, e_t the same of the teacher's continuations; ε(l) is the mean error a token.

A continuation that has ended holds no context at later tokens, and so no error. r_t and e_t are means over the
continuations that are still going at token t, of all rows together. They estimate the expected error given that a
context of that length exists, and each length has the same weight in the sum whoever is left.

`ended="zero"` is the treatment of PromptKD's public code, for comparison: the mean of the continuations still going in
each row, 0 for a row in which all have ended, and the mean of that over all rows. r_t and e_t then shrink at the rates
at which student and teacher end, so a student that ends earlier than its teacher seems to err less; and the more
continuations a row has, the later its zeros come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import RequestError
from promptkd.results import CurvePoint

__all__ = ["Ended", "Errors", "excess_accumulated_error"]

Floats = NDArray[np.float64]
Errors = Sequence[Sequence[Floats]]
"""One number a token of each continuation: errors[row][draw][token]."""
Ended = Literal["leave", "zero"]

_BLOCK = 1 << 21
"""Weights of rows held at once, over all resamples of a block: about 16 MB."""


def excess_accumulated_error(
    on_student: Errors,
    on_teacher: Errors,
    *,
    ended: Ended = "leave",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[CurvePoint]:
    """100 (R(l) - l ε(l)) / (l ε(l)) at l = 1, 2, … up to the longest continuation, with intervals.

    The intervals come from a bootstrap over rows, and a row is drawn with all its continuations, the student's and the
    teacher's. The same seed draws the same rows for every student. A resample in which no continuation reaches l says
    nothing about l; where more than 1 - `level` of them are such, the point has no interval.

    Args:
        on_student: errors on the student's own continuations, errors[row][draw][token].
        on_teacher: errors on the teacher's continuations of the same rows; there may be more or fewer of them.
        ended: "leave" takes means over what is still going; "zero" counts rows that have ended as errors of 0.
        resamples: how often the rows are drawn anew, with replacement.
        level: share of the resampled values inside the interval.

    Returns:
        The points. A value is None where no continuation of the one or the other reaches l (this cannot be with
        "zero"), and where l ε(l) is 0. `rows` counts the rows of which both still have a continuation at token l.

    Raises:
        RequestError: no rows, unequal numbers of rows, a row without a continuation, or a wrong `ended`, `resamples`
            or `level`.
    """
    _check(on_student, on_teacher, ended, resamples, level)
    width = max(len(errors) for row in (*on_student, *on_teacher) for errors in row)
    student, teacher = _table(on_student, width), _table(on_teacher, width)
    reaching = ((student.going > 0) & (teacher.going > 0)).sum(0)
    if ended == "zero":
        student, teacher = student.with_zeros(), teacher.with_zeros()
    values = _percent(np.ones((1, len(on_student))), student, teacher)[0]
    low, high = _interval(values, student, teacher, resamples, seed, level)
    return [
        CurvePoint(x=index + 1, value=_number(value), low=_number(low[index]), high=_number(high[index]), rows=rows)
        for index, (value, rows) in enumerate(zip(values, reaching.tolist(), strict=True))
    ]


@dataclass(frozen=True)
class _Table:
    """Errors of one model's continuations, summed over the draws of each row."""

    sums: Floats
    """(rows, L) sum of the errors at each token."""
    going: Floats
    """(rows, L) number of continuations that reach each token."""

    def with_zeros(self) -> "_Table":
        """One error a row and token: the mean of what is still going, 0 where nothing is."""
        return _Table(self.sums / np.maximum(self.going, 1), np.ones_like(self.going))


def _table(errors: Errors, width: int) -> _Table:
    sums, going = np.zeros((len(errors), width)), np.zeros((len(errors), width))
    for row, drawn in enumerate(errors):
        for each in drawn:
            sums[row, : len(each)] += each
            going[row, : len(each)] += 1
    return _Table(sums, going)


def _percent(weights: Floats, student: _Table, teacher: _Table) -> Floats:
    """(B, L) excess accumulated error with row i counted weights[b, i] times; NaN where it is not defined."""
    own, given = _accumulated(weights, student), _accumulated(weights, teacher)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(given > 0, 100 * (own - given) / given, np.nan)


def _accumulated(weights: Floats, table: _Table) -> Floats:
    """(B, L) sums over tokens of the mean error; NaN from the first token that nothing reaches."""
    with np.errstate(invalid="ignore"):
        return np.cumsum((weights @ table.sums) / (weights @ table.going), axis=1)


def _interval(
    values: Floats, student: _Table, teacher: _Table, resamples: int, seed: int, level: float
) -> tuple[Floats, Floats]:
    """(L,) lower and upper ends; NaN where there is no interval."""
    ends = np.full((2, len(values)), np.nan)
    rows = len(student.sums)
    if rows == 1:
        return ends[0], ends[1]
    generator, drawn, block = np.random.default_rng(seed), [], max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)  # (B, rows)
        drawn.append(_percent(weights, student, teacher))
    table = np.concatenate(drawn)  # (resamples, L)
    known = ~np.isnan(values) & (np.isnan(table).mean(0) <= 1 - level)
    ends[:, known] = np.nanquantile(table[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends[0], ends[1]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _check(on_student: Errors, on_teacher: Errors, ended: str, resamples: int, level: float) -> None:
    if len(on_student) != len(on_teacher) or not len(on_student):
        raise RequestError(
            "Student and teacher must have continued the same rows, at least one. "
            f"Got {len(on_student)} rows of the student and {len(on_teacher)} of the teacher."
        )
    for name, errors in (("student", on_student), ("teacher", on_teacher)):
        for row, drawn in enumerate(errors):
            if not len(drawn):
                raise RequestError(f"Every row needs a continuation. Got none of the {name} in row {row}.")
    if ended not in get_args(Ended):
        raise RequestError(f"`ended` must be one of {', '.join(get_args(Ended))}. Got {ended!r}.")
    if resamples < 1:
        raise RequestError(f"`resamples` must be at least 1. Got {resamples}.")
    if not 0 < level < 1:
        raise RequestError(f"`level` must lie between 0 and 1, as 0.95 does. Got {level}.")
