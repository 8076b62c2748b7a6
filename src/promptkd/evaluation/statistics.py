"""Bootstrap intervals, sign-flip tests, Holm's correction and effect sizes, with rows as the unit.

A row is a request with all its responses: tokens of one response depend on each other, so resampling tokens would give
intervals that are too narrow. The same seed resamples the same rows wherever the number of rows is the same. The spread
between seeds of training is not covered. Why scipy does not resample: docs/compare.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import RequestError
from promptkd.results import Metric

Floats = NDArray[np.float64]
Values = Sequence[float] | Floats
_BLOCK = 1 << 21  # resampled rows held at a time, over all resamples of a block: about 32 MB


@dataclass(frozen=True)
class Bootstrap:
    """How rows are resampled; equal settings give equal intervals."""

    resamples: int = 2000  # how often the rows are drawn, with replacement
    seed: int = 0
    level: float = 0.95  # the interval lies between the (1 ± `level`) / 2 quantiles of the resampled values

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise RequestError(f"`resamples` must be at least 1. Got {self.resamples}.")
        if not 0 < self.level < 1:
            raise RequestError(f"`level` must lie between 0 and 1, as 0.95 does. Got {self.level}.")

    @property
    def quantiles(self) -> tuple[float, float]:
        return (1 - self.level) / 2, (1 + self.level) / 2


DEFAULT = Bootstrap()


def blocks(count: int, rows: int) -> Iterator[int]:
    """Sizes that add up to `count`, each small enough for that many arrays of `rows` numbers to be held at a time."""
    size = max(1, _BLOCK // rows)
    return (min(size, count - start) for start in range(0, count, size))


def mean_interval(values: Values, bootstrap: Bootstrap = DEFAULT) -> Metric:
    """Mean of `values`, shape (rows,), with its interval; without one for a single row or values that are not finite.

    All four functions raise `RequestError` for no rows, more than one dimension, unequal lengths or a count of 0.
    """
    return _interval(lambda v: v.mean(-1), bootstrap, values=values)


def token_mean_interval(sums: Values, counts: Values, bootstrap: Bootstrap = DEFAULT) -> Metric:
    """Σ `sums` / Σ `counts`, totals over the tokens of each row and tokens of each row: the mean over all tokens."""
    return _interval(lambda s, c: s.sum(-1) / c.sum(-1), bootstrap, sums=sums, counts=counts)


def paired_difference(a: Values, b: Values, bootstrap: Bootstrap = DEFAULT) -> Metric:
    """mean(a) - mean(b) over the same rows, with the interval of that difference; entry i of both is row i."""
    return _interval(lambda x, y: (x - y).mean(-1), bootstrap, a=a, b=b)


def paired_token_difference(
    sums_a: Values, counts_a: Values, sums_b: Values, counts_b: Values, bootstrap: Bootstrap = DEFAULT
) -> Metric:
    """Token mean of a less token mean of b over the same rows (the token counts of a and b may differ)."""
    columns = {"sums_a": sums_a, "counts_a": counts_a, "sums_b": sums_b, "counts_b": counts_b}
    return _interval(lambda s, c, t, d: s.sum(-1) / c.sum(-1) - t.sum(-1) / d.sum(-1), bootstrap, **columns)


def paired_token_ratio(
    sums_a: Values, counts_a: Values, sums_b: Values, counts_b: Values, bootstrap: Bootstrap = DEFAULT
) -> Metric | None:
    """Token mean of a over token mean of b over the same rows; None where the latter is not above 0.

    Without an interval where so few rows carry b that a resample of them has none.
    """
    if not np.isfinite(sums_b).all() or float(np.sum(sums_b)) <= 0:
        return None
    columns = {"sums_a": sums_a, "counts_a": counts_a, "sums_b": sums_b, "counts_b": counts_b}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _interval(lambda s, c, t, d: s.sum(-1) / c.sum(-1) * d.sum(-1) / t.sum(-1), bootstrap, **columns)
    ends = np.array([found.low, found.high], dtype=np.float64)
    return found if np.isfinite(ends).all() else found.model_copy(update={"low": None, "high": None})


def _interval(statistic: Callable[..., Floats], bootstrap: Bootstrap, **given: Values) -> Metric:
    """`statistic` maps arrays of shape (..., rows) to shape (...); the same rows are drawn from every column."""
    columns = _checked({name: np.asarray(values, dtype=np.float64) for name, values in given.items()})
    rows = len(columns[0])
    with np.errstate(invalid="ignore"):  # infinity less infinity
        value = float(statistic(*columns))
    if rows == 1 or not np.isfinite(columns).all():
        return Metric(value=value, rows=rows)
    generator, drawn = np.random.default_rng(bootstrap.seed), []
    for size in blocks(bootstrap.resamples, rows):
        index = generator.integers(0, rows, size=(size, rows))
        drawn.append(statistic(*(column[index] for column in columns)))
    low, high = np.quantile(np.concatenate(drawn), bootstrap.quantiles)
    return Metric(value=value, low=float(low), high=float(high), rows=rows)


def _checked(columns: dict[str, Floats]) -> list[Floats]:
    for name, column in columns.items():
        if column.ndim != 1:
            raise RequestError(f"`{name}` must hold one number per row, shape (rows,). Got shape {column.shape}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} in `{name}`" for name, length in lengths.items())
        raise RequestError(f"Every argument must hold the same rows. Got {listed}.")
    if 0 in lengths.values():
        raise RequestError(f"Expected at least one row in {' and '.join(f'`{name}`' for name in lengths)}. Got none.")
    for name, column in columns.items():
        if name.startswith("counts") and not (column > 0).all():
            row = int(np.argmin(column > 0))
            got = f"Got {column[row]:g} in row {row}; leave out rows without tokens."
            raise RequestError(f"`{name}` must be above 0 in every row. {got}")
    return list(columns.values())


def row_contributions(sums_a: Floats, counts_a: Floats, sums_b: Floats, counts_b: Floats) -> Floats:
    """t_i = (s_ai - R c_ai) / C_a - (s_bi - R c_bi) / C_b, with C the sums of c and R the token mean of both together.

    All have shape (rows,). Their sum is the difference of the two token means, S_a / C_a - S_b / C_b, whatever R is.
    With equal counts R cancels and t_i = (s_ai - s_bi) / C. Where counts differ, as in the KL on answers of different
    lengths, t_i is the linearized contribution of row i to the difference, under the hypothesis of equal token means;
    exchanging the two pairs (s, c) of a row instead would also test that the lengths are alike.
    """
    total_a, total_b = counts_a.sum(), counts_b.sum()
    pooled = (sums_a.sum() + sums_b.sum()) / (total_a + total_b)
    return (sums_a - pooled * counts_a) / total_a - (sums_b - pooled * counts_b) / total_b


def sign_flip_test(contributions: Floats, *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p: the share of sign patterns x in {-1, 1}^rows with |Σ x_i t_i| >= |Σ t_i|, t of shape (rows,).

    Rows that contribute 0 aside, where there are at most `draws` + 1 patterns all are counted and p is exact. Else
    patterns are drawn, and p = (count + 1) / (draws + 1), which never understates (Phipson and Smyth 2010).
    Raises `RequestError` for no rows, values that are not finite, or `draws` below 1.
    """
    if contributions.ndim != 1 or not len(contributions) or not np.isfinite(contributions).all():
        raise RequestError("`contributions` must hold one finite number per row, shape (rows,), for at least one row.")
    if draws < 1:
        raise RequestError(f"`draws` must be at least 1. Got {draws}.")
    moving = contributions[contributions != 0]
    observed = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()  # equal sums differ by rounding

    def extreme(flips: NDArray[np.integer]) -> int:  # of patterns (patterns, rows), 1 for a flipped sign
        return int((np.abs(moving.sum() - 2 * (flips @ moving)) >= observed).sum())

    if 2 ** len(moving) <= draws + 1:
        every = np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1
        return extreme(every) / len(every)
    generator, sizes = np.random.default_rng(seed), ((size, len(moving)) for size in blocks(draws, len(moving)))
    count = sum(extreme(generator.integers(0, 2, size=size, dtype=np.int8)) for size in sizes)
    return (count + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of m tests: in rising order, the largest (m - j) p_j so far, at most 1 (j from 0; Holm 1979).

    Claims at or below 0.05 hold a false one in at most 5 % of comparisons, however the tests depend on each other.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return [float(value) for value in adjusted]


def effect_size(contributions: Floats) -> float | None:
    """Cohen's d for pairs: mean over standard deviation (n - 1); None for a single row or without a spread."""
    if len(contributions) < 2:
        return None
    deviation = float(contributions.std(ddof=1))
    return float(contributions.mean()) / deviation if deviation > 1e-12 * np.abs(contributions).max() else None
