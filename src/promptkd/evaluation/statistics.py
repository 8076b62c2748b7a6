"""Percentile bootstrap intervals over rows, for means, token-weighted means and paired differences.

A row (a request with its response) is the unit that is drawn anew: tokens of one response depend on each other, so
drawing tokens would give intervals that are too narrow. The same seed draws the same rows wherever the number of rows
is the same. An interval speaks for the rows alone; it does not know the spread between seeds of training or sampling.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import RequestError
from promptkd.results import Metric

__all__ = ["mean_interval", "paired_difference", "paired_token_difference", "token_mean_interval"]

Floats = NDArray[np.float64]
Values = Sequence[float] | Floats

_BLOCK = 1 << 21
"""Drawn rows held at once, over all resamples of a block: about 32 MB."""


def mean_interval(values: Values, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Metric:
    """Mean of `values`, one a row, with the interval between the (1 ± `level`) / 2 quantiles of resampled means.

    A single row gives no interval, and neither do values that are not all finite (their mean is reported as it is).

    Args:
        values: shape (rows,).
        resamples: how often the rows are drawn anew, with replacement.
        seed: of the draws; equal arguments give equal intervals.
        level: share of the resampled means inside the interval.

    Raises:
        RequestError: no rows, more than one dimension, `resamples` below 1, or `level` outside (0, 1).
    """
    columns = _columns(values=values)
    return _interval(columns, lambda v: v.mean(-1), resamples=resamples, seed=seed, level=level)


def token_mean_interval(
    sums: Values, counts: Values, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Metric:
    """Σ `sums` / Σ `counts`, the mean over tokens, with its interval over rows; for a loss in nats a token.

    Args:
        sums: total over the tokens of each row, shape (rows,).
        counts: tokens of each row, shape (rows,), all above 0.
        resamples, seed, level: as in `mean_interval`.

    Raises:
        RequestError: as `mean_interval`, and for unequal lengths or a row without tokens.
    """
    columns = _columns(sums=sums, counts=counts)
    _check_counts("counts", columns[1])
    return _interval(columns, lambda s, c: s.sum(-1) / c.sum(-1), resamples=resamples, seed=seed, level=level)


def paired_difference(a: Values, b: Values, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Metric:
    """mean(a) - mean(b) over the same rows, with the interval of that difference; entry i of both is row i.

    Raises:
        RequestError: as `mean_interval`, and for unequal lengths.
    """
    columns = _columns(a=a, b=b)
    return _interval(columns, lambda x, y: (x - y).mean(-1), resamples=resamples, seed=seed, level=level)


def paired_token_difference(
    sums_a: Values,
    counts_a: Values,
    sums_b: Values,
    counts_b: Values,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Metric:
    """Token mean of a less token mean of b over the same rows (the token counts of a and b may differ).

    Raises:
        RequestError: as `token_mean_interval`.
    """
    columns = _columns(sums_a=sums_a, counts_a=counts_a, sums_b=sums_b, counts_b=counts_b)
    _check_counts("counts_a", columns[1])
    _check_counts("counts_b", columns[3])

    def difference(sums_a: Floats, counts_a: Floats, sums_b: Floats, counts_b: Floats) -> Floats:
        return sums_a.sum(-1) / counts_a.sum(-1) - sums_b.sum(-1) / counts_b.sum(-1)

    return _interval(columns, difference, resamples=resamples, seed=seed, level=level)


def _interval(
    columns: list[Floats], statistic: Callable[..., Floats], *, resamples: int, seed: int, level: float
) -> Metric:
    """`statistic` maps arrays of shape (..., rows) to shape (...); the same rows are drawn from every column."""
    if resamples < 1:
        raise RequestError(f"`resamples` must be at least 1. Got {resamples}.")
    if not 0 < level < 1:
        raise RequestError(f"`level` must lie between 0 and 1, as 0.95 does. Got {level}.")
    rows = len(columns[0])
    with np.errstate(invalid="ignore"):  # infinity less infinity
        value = float(statistic(*columns))
    if rows == 1 or not all(np.isfinite(column).all() for column in columns):
        return Metric(value=value, rows=rows)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    drawn = []
    for start in range(0, resamples, block):
        index = generator.integers(0, rows, size=(min(block, resamples - start), rows))  # (resamples, rows)
        drawn.append(statistic(*(column[index] for column in columns)))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Metric(value=value, low=float(low), high=float(high), rows=rows)


def _columns(**given: Values) -> list[Floats]:
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    for name, column in columns.items():
        if column.ndim != 1:
            raise RequestError(f"`{name}` must hold one number a row, shape (rows,). Got shape {column.shape}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} in `{name}`" for name, length in lengths.items())
        raise RequestError(f"Every argument must hold the same rows. Got {listed}.")
    if 0 in lengths.values():
        raise RequestError(f"Expected at least one row in {' and '.join(f'`{name}`' for name in lengths)}. Got none.")
    return list(columns.values())


def _check_counts(name: str, counts: Floats) -> None:
    empty = np.flatnonzero(~(counts > 0))
    if empty.size:
        row = int(empty[0])
        raise RequestError(
            f"`{name}` must be above 0 in every row. Got {counts[row]:g} in row {row}; leave rows without tokens out."
        )
