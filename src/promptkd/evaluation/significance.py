"""Whether a paired difference is more than chance: sign-flip tests over rows, Holm's correction, effect sizes.

The test and the effect size read a difference as a sum of one contribution a row (`row_contributions`), so that means
over rows and means over tokens go through the same functions. Rows are the unit, as in `bootstrap.py`; several answers
to one request are brought together first.
"""

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import RequestError

__all__ = ["effect_size", "holm", "row_contributions", "sign_flip_test"]

Floats = NDArray[np.float64]

_BLOCK = 1 << 21
"""Flipped rows held at once, over all draws of a block."""


def row_contributions(sums_a: Floats, counts_a: Floats, sums_b: Floats, counts_b: Floats) -> Floats:
    """t_i = (s_ai - R c_ai) / C_a - (s_bi - R c_bi) / C_b, with C the sums of c and R the token mean of both together.

    Their sum is the difference of the two token means, S_a / C_a - S_b / C_b, whatever R is. Where both models have the
    same counts R cancels, and t_i = (s_ai - s_bi) / C: for means over rows (counts 1) the row's difference over the
    number of rows. Where counts differ, as in the KL on answers of different lengths, t_i is the linearised part of row
    i in the difference, taken under the hypothesis that both have the same token mean. Exchanging the two pairs
    (s, c) of a row in place would test more: that the lengths are alike too.

    Args: sums over the tokens of each row and tokens of each row, all of shape (rows,). Returns the same shape.
    """
    total_a, total_b = counts_a.sum(), counts_b.sum()
    pooled = (sums_a.sum() + sums_b.sum()) / (total_a + total_b)
    return (sums_a - pooled * counts_a) / total_a - (sums_b - pooled * counts_b) / total_b


def sign_flip_test(contributions: Floats, *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p: the share of sign patterns x in {-1, 1}^rows with |Σ x_i t_i| >= |Σ t_i|.

    The hypothesis is that every t_i is as likely to be of the other sign, as it is when two models are exchangeable.
    With few rows every pattern is counted and p is exact: where that takes no more patterns than `draws` + 1. Else
    patterns are drawn, and p = (count + 1) / (draws + 1), which never understates (Phipson and Smyth 2010). Rows that
    contribute 0 change nothing and are not counted among the few.

    Args:
        contributions: t, shape (rows,), all finite.
        draws: how many patterns are drawn where they are too many to be counted.
        seed: of the draws; equal arguments give an equal p.

    Raises:
        RequestError: no rows, values that are not finite, or `draws` below 1.
    """
    if contributions.ndim != 1 or not len(contributions) or not np.isfinite(contributions).all():
        raise RequestError("`contributions` must hold one finite number a row, shape (rows,), for at least one row.")
    if draws < 1:
        raise RequestError(f"`draws` must be at least 1. Got {draws}.")
    moving = contributions[contributions != 0]
    observed = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()  # equal sums differ by rounding
    if 2.0 ** len(moving) <= draws + 1:
        patterns = np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1  # (patterns, rows)
        return float((_flipped(patterns, moving) >= observed).mean())
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(moving))
    count = 0
    for start in range(0, draws, block):
        size = (min(block, draws - start), len(moving))
        count += int((_flipped(generator.integers(0, 2, size=size, dtype=np.int8), moving) >= observed).sum())
    return (count + 1) / (draws + 1)


def _flipped(patterns: NDArray[np.integer], values: Floats) -> Floats:
    """|Σ x_i t_i| where x_i is -1 for a 1 in the pattern, shape (patterns,)."""
    flipped: Floats = np.abs(values.sum() - 2 * (patterns @ values))
    return flipped


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p of each of m tests: in rising order, the largest (m - j) p_j so far, at most 1 (j from 0; Holm 1979).

    Claiming what lies at or below 0.05 makes one false claim or more in at most 5 % of comparisons, however the tests
    depend on each other.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(raised, 1.0)
    return [float(value) for value in adjusted]


def effect_size(contributions: Floats) -> float | None:
    """Cohen's d for pairs: mean of the contributions over their standard deviation (n - 1).

    None where it is not defined: a single row, or no spread.
    """
    if len(contributions) < 2:
        return None
    deviation = float(contributions.std(ddof=1))
    level = float(np.abs(contributions).max())
    return float(contributions.mean()) / deviation if deviation > 1e-12 * level else None
