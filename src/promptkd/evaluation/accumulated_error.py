"""Excess accumulated error, from the errors at every token of a student's and a teacher's continuations.

    ExAccErr(l) = (R(l) - l ε(l)) / (l ε(l)) x 100 %     (Arora et al. 2022, "Why Exposure Bias Matters"; PromptKD)

- R(l) = r_1 + … + r_l, r_t the mean error at token t of the student's own continuations,
- l ε(l) = e_1 + … + e_l, e_t the same of the teacher's continuations; ε(l) is the mean error per token.

r_t and e_t are means over the continuations of all rows that have not ended at token t; the others have no context.
`ended="zero"` is the treatment of PromptKD's public code, for comparison: per row the mean of the continuations that
have not ended, 0 where all have, and the mean of that over all rows. A student that ends earlier than its teacher then
seems to err less.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from promptkd.errors import RequestError
from promptkd.evaluation.statistics import DEFAULT, Bootstrap, Floats, blocks
from promptkd.results import CurvePoint

Errors = Sequence[Sequence[Floats]]  # one number per token of each continuation: errors[row][draw][token]
Ended = Literal["leave", "zero"]


def excess_accumulated_error(
    on_student: Errors, on_teacher: Errors, *, ended: Ended = "leave", bootstrap: Bootstrap = DEFAULT
) -> list[CurvePoint]:
    """100 (R(l) - l ε(l)) / (l ε(l)) at l = 1, 2, … up to the longest continuation, with bootstrap intervals over rows.

    Both hold the errors of the same rows, with any number of continuations each. A row is drawn with all of them; the
    same seed draws the same rows for every student. Where no continuation reaches l in more than 1 - `level` of the
    resamples, the point has no interval. A value is None where none of the one or the other reaches l (never with
    "zero"), and where l ε(l) is 0. `rows` counts the rows in which continuations of both reach token l, and `row_parts`
    is each row's part in the value, linearized as for the delta method and 0 in sum.
    Raises `RequestError` for no rows, unequal numbers of rows, a row without a continuation, or a wrong `ended`.
    """
    _check(on_student, on_teacher, ended)
    width = max(len(errors) for row in (*on_student, *on_teacher) for errors in row)
    student, teacher = _Table.of(on_student, width), _Table.of(on_teacher, width)
    reaching = ((student.counts > 0) & (teacher.counts > 0)).sum(0).tolist()
    if ended == "zero":
        student, teacher = student.with_zeros(), teacher.with_zeros()
    values = _percent(np.ones((1, len(on_student))), student, teacher)
    table = np.concatenate([values, _interval(values[0], student, teacher, bootstrap)]).T  # (L, 3)
    found = [[None if np.isnan(number) else float(number) for number in line] for line in table]
    parts = [
        [] if np.isnan(each).any() else [float(f"{part:.4g}") for part in each] for each in _parts(student, teacher)
    ]
    return [
        CurvePoint(x=length, value=value, low=low, high=high, rows=rows, row_parts=own)
        for length, ((value, low, high), rows, own) in enumerate(zip(found, reaching, parts, strict=True), start=1)
    ]


class _Table(NamedTuple):
    """Errors of one model's continuations, summed over the draws of each row."""

    sums: Floats  # (rows, L) sum of the errors at each token
    counts: Floats  # (rows, L) number of continuations that reach each token

    @classmethod
    def of(cls, errors: Errors, width: int) -> "_Table":
        table = cls(np.zeros((len(errors), width)), np.zeros((len(errors), width)))
        for row, drawn in enumerate(errors):
            for each in drawn:
                table.sums[row, : len(each)] += each
                table.counts[row, : len(each)] += 1
        return table

    def with_zeros(self) -> "_Table":
        """One error per row and token: the mean over the continuations that reach it, 0 where none does."""
        return _Table(self.sums / np.maximum(self.counts, 1), np.ones_like(self.counts))

    def parts(self) -> Floats:
        """(rows, L) each row's part in `accumulated` of all rows: Σ over tokens of (s_it - r_t c_it) / C_t."""
        with np.errstate(invalid="ignore"):
            means, totals = self.sums.sum(0) / self.counts.sum(0), self.counts.sum(0)
            return np.cumsum((self.sums - means * self.counts) / totals, axis=1)

    def accumulated(self, weights: Floats) -> Floats:
        """(B, L) sums over tokens of the mean error; NaN from the first token that nothing reaches."""
        with np.errstate(invalid="ignore"):
            return np.cumsum((weights @ self.sums) / (weights @ self.counts), axis=1)


def _percent(weights: Floats, student: _Table, teacher: _Table) -> Floats:
    """(B, L) excess accumulated error with row i counted weights[b, i] times; NaN where it is not defined."""
    own, given = student.accumulated(weights), teacher.accumulated(weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(given > 0, 100 * (own - given) / given, np.nan)


def _parts(student: _Table, teacher: _Table) -> Floats:
    """(L, rows) the derivative of the excess by each row's weight: 100 (R_i - R E_i / E) / E; NaN as the excess."""
    every = np.ones((1, len(student.sums)))
    own, given = student.accumulated(every), teacher.accumulated(every)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = 100 * (student.parts() - own / given * teacher.parts()) / given
    return np.where(given > 0, parts, np.nan).T


def _interval(values: Floats, student: _Table, teacher: _Table, bootstrap: Bootstrap) -> Floats:
    """(2, L) lower and upper ends; NaN where there is no interval."""
    ends, rows = np.full((2, len(values)), np.nan), len(student.sums)
    if rows > 1:
        generator, drawn = np.random.default_rng(bootstrap.seed), []
        for size in blocks(bootstrap.resamples, rows):
            weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)  # (B, rows)
            drawn.append(_percent(weights, student, teacher))
        resampled = np.concatenate(drawn)  # (resamples, L)
        known = ~np.isnan(values) & (np.isnan(resampled).mean(0) <= 1 - bootstrap.level)
        ends[:, known] = np.nanquantile(resampled[:, known], bootstrap.quantiles, axis=0)
    return ends


def _check(on_student: Errors, on_teacher: Errors, ended: str) -> None:
    if len(on_student) != len(on_teacher) or not len(on_student):
        got = f"Got {len(on_student)} rows of the student and {len(on_teacher)} of the teacher."
        raise RequestError(f"Student and teacher must have continued the same rows, at least one. {got}")
    for name, errors in (("student", on_student), ("teacher", on_teacher)):
        if empty := [row for row, drawn in enumerate(errors) if not len(drawn)]:
            raise RequestError(f"Every row needs a continuation. Got none of the {name} in row {empty[0]}.")
    if ended not in get_args(Ended):
        raise RequestError(f"`ended` must be one of {', '.join(get_args(Ended))}. Got {ended!r}.")
