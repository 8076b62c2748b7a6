"""Bootstrap intervals: hand checks, a plain loop as the reference, and coverage by simulation."""

import random
from itertools import product

import numpy as np
import pytest

from promptkd.errors import RequestError
from promptkd.evaluation import statistics
from promptkd.evaluation.statistics import (
    Bootstrap,
    mean_interval,
    paired_difference,
    paired_token_difference,
    token_mean_interval,
)
from promptkd.results import Metric


def test_the_value_is_the_mean_and_rows_are_counted() -> None:
    metric = mean_interval([1.0, 2.0, 6.0])
    assert metric.value == 3
    assert metric.rows == 3
    assert metric.low is not None
    assert metric.high is not None
    assert 1 <= metric.low < 3 < metric.high <= 6


def test_two_rows_give_the_exact_quantiles() -> None:
    # Resampled means are 0, 5 and 10 with probabilities 1/4, 1/2, 1/4.
    wide = mean_interval([0.0, 10.0])
    assert (wide.low, wide.high) == (0, 10)
    narrow = mean_interval([0.0, 10.0], Bootstrap(level=0.4))  # quantiles 0.3 and 0.7 fall on the middle value
    assert (narrow.low, narrow.high) == (5, 5)


def test_the_quantiles_of_every_possible_draw_are_approached() -> None:
    values = [0.0, 1.0, 3.0, 10.0, 11.0]
    every_mean = [float(np.mean(draw)) for draw in product(values, repeat=5)]  # all 3125 equally likely draws
    metric = mean_interval(values, Bootstrap(resamples=60_000, level=0.8))
    assert [metric.low, metric.high] == pytest.approx(np.quantile(every_mean, [0.1, 0.9]), abs=0.21)


def test_a_token_mean_weights_rows_by_their_tokens() -> None:
    # 12 nats over 10 tokens; the mean of the rows' own means would be 4.5.
    metric = token_mean_interval([8.0, 4.0], [1, 9], Bootstrap(level=0.4))
    assert metric.value == pytest.approx(1.2)
    assert metric.low == pytest.approx(1.2)  # the draws: 8 (1/4), 1.2 (1/2), 4/9 (1/4)
    wide = token_mean_interval([8.0, 4.0], [1, 9])
    assert [wide.low, wide.high] == pytest.approx([4 / 9, 8.0])


def test_a_token_mean_over_rows_of_one_length_is_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=40)
    by_rows, by_tokens = mean_interval(values), token_mean_interval(values * 5, [5] * 40)
    assert [by_tokens.value, by_tokens.low, by_tokens.high] == pytest.approx([by_rows.value, by_rows.low, by_rows.high])


def test_a_paired_difference_is_a_less_b_over_the_same_rows() -> None:
    rng = np.random.default_rng(1)
    b = rng.normal(scale=50, size=80)
    a = b + 1 + rng.normal(scale=0.1, size=80)
    metric = paired_difference(a, b)
    assert metric == mean_interval(a - b)
    assert metric.low is not None
    assert metric.low > 0.9  # rows drawn apart would give an interval some 20 wide
    assert paired_difference(b, a).value == pytest.approx(-metric.value)


def test_a_paired_token_difference_draws_the_same_rows_for_both() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 100, size=60)
    sums = counts * rng.normal(scale=20, size=60)
    metric = paired_token_difference(sums + 0.5 * counts, counts, sums, counts)
    assert [metric.value, metric.low, metric.high] == pytest.approx([0.5] * 3)


def test_a_paired_token_difference_lets_the_counts_differ() -> None:
    metric = paired_token_difference([8.0, 4.0], [1, 9], [6.0, 6.0], [2, 4])
    assert metric.value == pytest.approx(1.2 - 2.0)
    # The draws: both row 0: 8 - 3; both row 1: 4/9 - 1.5; one each: 1.2 - 2.
    assert [metric.low, metric.high] == pytest.approx([4 / 9 - 1.5, 5.0])


def test_it_agrees_with_a_plain_loop_of_another_generator() -> None:
    rng = np.random.default_rng(3)
    sums, counts = rng.gamma(2.0, 30.0, size=50).tolist(), rng.integers(5, 60, size=50).tolist()
    drawn, dice = [], random.Random(0)
    for _ in range(4000):
        rows = [dice.randrange(50) for _ in range(50)]
        drawn.append(sum(sums[row] for row in rows) / sum(counts[row] for row in rows))
    drawn.sort()
    metric = token_mean_interval(sums, counts, Bootstrap(resamples=4000))
    width = drawn[3900] - drawn[100]
    assert [metric.low, metric.high] == pytest.approx([drawn[100], drawn[3900]], abs=0.08 * width)


@pytest.mark.parametrize("weighted", [False, True])
def test_nineteen_intervals_in_twenty_hold_the_true_mean(weighted: bool) -> None:
    rng = np.random.default_rng(4)
    held = 0
    for seed in range(300):
        counts = rng.integers(10, 60, size=60)
        values = rng.exponential(size=60) + 1  # true mean 2, skewed
        if weighted:
            metric = token_mean_interval(values * counts, counts, Bootstrap(resamples=400, seed=seed))
        else:
            metric = mean_interval(values, Bootstrap(resamples=400, seed=seed))
        assert metric.low is not None
        assert metric.high is not None
        held += metric.low <= 2 <= metric.high
    assert 0.89 <= held / 300 <= 0.98  # 0.95 less what a percentile interval of 60 skewed rows gives up


def test_the_level_and_the_number_of_rows_move_the_width() -> None:
    values = np.random.default_rng(5).normal(size=400)

    def width(metric: Metric) -> float:
        assert metric.low is not None
        assert metric.high is not None
        return metric.high - metric.low

    expected = 2 * 1.96 * values.std() / 20  # normal theory
    assert width(mean_interval(values)) == pytest.approx(expected, rel=0.1)
    assert width(mean_interval(values, Bootstrap(level=0.5))) == pytest.approx(expected * 0.6745 / 1.96, rel=0.1)


def test_equal_arguments_give_equal_intervals_and_another_seed_another() -> None:
    values = np.random.default_rng(6).normal(size=30)
    assert mean_interval(values) == mean_interval(values.tolist())
    assert mean_interval(values) != mean_interval(values, Bootstrap(seed=1))


def test_drawing_in_blocks_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).normal(size=30)
    whole = mean_interval(values, Bootstrap(resamples=101))
    monkeypatch.setattr(statistics, "_BLOCK", 30 * 25)  # 25, 25, 25, 25 and 1
    assert mean_interval(values, Bootstrap(resamples=101)) == whole


def test_a_single_row_gives_no_interval() -> None:
    assert mean_interval([2.5]) == Metric(value=2.5, rows=1)
    assert token_mean_interval([6.0], [4]) == Metric(value=1.5, rows=1)
    assert paired_difference([2.0], [0.5]) == Metric(value=1.5, rows=1)
    assert paired_token_difference([6.0], [4], [2.0], [2]) == Metric(value=0.5, rows=1)


def test_rows_that_are_not_finite_give_no_interval() -> None:
    metric = mean_interval([1.0, float("inf")])
    assert (metric.value, metric.low, metric.high) == (float("inf"), None, None)
    metric = paired_difference([1.0, float("nan")], [1.0, 1.0])
    assert np.isnan(metric.value)
    assert metric.low is None


def test_equal_rows_give_an_interval_without_width() -> None:
    assert mean_interval([100.0] * 8) == Metric(value=100, low=100, high=100, rows=8)
    assert paired_difference([3.0, 4.0], [3.0, 4.0]) == Metric(value=0, low=0, high=0, rows=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "at least one row in `values`"),
        (lambda: token_mean_interval([], []), "at least one row"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "2 in `a`, 1 in `b`"),
        (lambda: token_mean_interval([1.0], [1, 2]), "1 in `sums`, 2 in `counts`"),
        (lambda: paired_token_difference([1.0], [1], [1.0, 2.0], [1, 1]), "same rows"),
        (lambda: token_mean_interval([1.0, 2.0], [3, 0]), "Got 0 in row 1"),
        (lambda: paired_token_difference([1.0], [1], [1.0], [-1]), "`counts_b` .*Got -1 in row 0"),
        (lambda: mean_interval(np.zeros((2, 2))), r"Got shape \(2, 2\)"),
        (lambda: Bootstrap(resamples=0), "`resamples`"),
        (lambda: Bootstrap(level=95), "`level`"),
    ],
)
def test_unsound_requests_are_refused(call, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()
