"""Intervals, tests, corrections and effect sizes: numbers by hand, plain loops as references, laws, and coverage."""

import itertools
import math
import random

import numpy as np
import pytest

from promptkd.errors import RequestError
from promptkd.evaluation import statistics
from promptkd.evaluation.statistics import (
    Bootstrap,
    effect_size,
    holm,
    mean_interval,
    paired_difference,
    paired_token_difference,
    paired_token_ratio,
    row_contributions,
    sign_flip_test,
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
    every_mean = [float(np.mean(draw)) for draw in itertools.product(values, repeat=5)]  # all 3125 equally likely draws
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


# ---- tests, corrections, effect sizes ----


def contributions(a, b):
    ones = np.ones(len(a))
    return row_contributions(np.array(a, float), ones, np.array(b, float), ones)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1], 2 / 8),  # +++ and ---
        ([1, 2, 3], 2 / 8),
        ([-1, 2, 3], 4 / 8),  # |4|: +++ 6, -++ 4, and their opposites
        ([1, -2, 3], 6 / 8),  # |2| or more: all but --+ and ++-, which give 0
        ([1, 2, 3, 4], 2 / 16),
        ([-1, 2, 3, 4], 4 / 16),  # 8, and 10
        ([1, 1, 1, 1, 1], 2 / 32),
        ([-1, 1, 1, 1, 1], 12 / 32),  # none or one of another sign, either way
        ([2.5], 1.0),
        ([0, 0], 1.0),
    ],
)
def test_the_exact_p_of_few_rows_by_hand(values, expected):
    assert sign_flip_test(np.array(values, float)) == expected


def test_it_counts_what_a_plain_loop_counts():
    values = np.random.default_rng(0).normal(size=10).round(1) + 0.3
    sums = [
        abs(math.fsum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=10)
    ]
    expected = sum(each >= abs(math.fsum(values)) - 1e-9 for each in sums) / 1024
    assert sign_flip_test(values) == expected
    assert sign_flip_test(-values) == expected
    assert sign_flip_test(values * 1e-9) == expected
    assert sign_flip_test(np.concatenate([values, np.zeros(500)])) == expected  # still few rows that move


def test_drawn_patterns_approach_the_exact_p_and_never_give_zero():
    values = np.random.default_rng(1).normal(size=12) + 0.5
    exact, drawn = sign_flip_test(values, draws=4095), sign_flip_test(values, draws=4094)
    assert exact * 4096 == round(exact * 4096)
    assert drawn * 4095 == pytest.approx(round(drawn * 4095))
    assert drawn == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 4095))
    assert sign_flip_test(np.ones(100), draws=99) == 1 / 100
    assert sign_flip_test(np.ones(1100), draws=99) == 1 / 100  # more patterns than a float can count
    weak = values - 0.5
    assert sign_flip_test(weak, draws=999, seed=1) == sign_flip_test(weak, draws=999, seed=1)
    assert sign_flip_test(weak, draws=999, seed=1) != sign_flip_test(weak, draws=999, seed=2)


def test_drawing_in_blocks_draws_as_often(monkeypatch):
    values = np.random.default_rng(2).normal(size=40) + 0.3
    whole = sign_flip_test(values, draws=1000)
    monkeypatch.setattr("promptkd.evaluation.statistics._BLOCK", 40 * 300)
    assert sign_flip_test(values, draws=1000) == pytest.approx(whole, abs=0.03)
    assert sign_flip_test(np.ones(40), draws=1000) == 1 / 1001


def test_a_row_contributes_its_difference_over_the_number_of_rows():
    assert contributions([5, 2, 8], [4, 4, 2]) == pytest.approx([1 / 3, -2 / 3, 2])


def test_contributions_of_token_means_by_hand():
    # a: 12 nats of 10 tokens, b: 12 of 6; together 24 / 16 = 1.5 a token.
    parts = row_contributions(*(np.array(each, float) for each in ([8, 4], [1, 9], [6, 6], [2, 4])))
    assert parts == pytest.approx([(8 - 1.5) / 10 - (6 - 3) / 6, (4 - 13.5) / 10 - (6 - 6) / 6])
    assert parts.sum() == pytest.approx(1.2 - 2.0)


def test_with_equal_counts_flipping_signs_is_exchanging_the_two_models():
    rng = np.random.default_rng(3)
    counts, a, b = rng.integers(1, 30, 8).astype(float), rng.gamma(2, 10, 8), rng.gamma(2, 12, 8)
    extreme = 0
    observed = abs((a - b).sum() / counts.sum())
    for swapped in itertools.product((False, True), repeat=8):
        mine = sum(y if swap else x for x, y, swap in zip(a, b, swapped, strict=True))
        theirs = sum(x if swap else y for x, y, swap in zip(a, b, swapped, strict=True))
        extreme += abs(mine / counts.sum() - theirs / counts.sum()) >= observed - 1e-12
    assert sign_flip_test(row_contributions(a, counts, b, counts)) == extreme / 256


def test_equal_token_means_on_answers_of_other_lengths_are_claimed_to_differ_in_5_percent():
    """Exchanging (sum, count) pairs of rows would claim it in 12 % here: it also tests that the lengths are alike."""
    rng = np.random.default_rng(4)
    claims = 0
    for trial in range(1000):
        longer, shorter = rng.integers(5, 20, (2, 60)).astype(float) * [[4], [1]]
        sums = [rng.gamma(0.5 * counts, 2.0) for counts in (longer, shorter)]  # a mean of 1 a token
        claims += sign_flip_test(row_contributions(sums[0], longer, sums[1], shorter), draws=199, seed=trial) <= 0.05
    assert 32 <= claims <= 68  # 50, 2.6 standard errors either way


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_rejects_what_its_steps_reject():
    dice = random.Random(0)
    for _ in range(200):
        values = [dice.random() ** 4 for _ in range(6)]
        rejected = set()
        for rank, index in enumerate(sorted(range(6), key=values.__getitem__)):
            if values[index] > 0.05 / (6 - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(values)) if p <= 0.05} == rejected


def test_effect_size_by_hand():
    # differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7
    assert effect_size(contributions([1, 2, 6], [0, 0, 0])) == pytest.approx(3 / math.sqrt(7))
    assert effect_size(contributions([0, 0, 0], [100, 200, 600])) == pytest.approx(-3 / math.sqrt(7))
    assert effect_size(contributions([1.1, 2.1, 3.1], [1, 2, 3])) is None  # no spread
    assert effect_size(contributions([2], [1])) is None
    assert effect_size(contributions([1, 2], [1, 2])) is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_values_that_cannot_be_tested_are_refused(values):
    with pytest.raises(RequestError, match="one finite number per row"):
        sign_flip_test(np.array(values))


def test_no_draws_are_refused():
    with pytest.raises(RequestError, match=r"`draws` must be at least 1\. Got 0"):
        sign_flip_test(np.ones(3), draws=0)


def test_a_ratio_is_of_means_over_the_same_rows() -> None:
    a, b, ones = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0] * 3
    found = paired_token_ratio(a, ones, b, ones)
    assert found is not None
    assert (found.value, found.low, found.high, found.rows) == pytest.approx((0.5, 0.5, 0.5, 3))  # in every draw alike


def test_a_ratio_of_two_rows_has_the_exact_quantiles() -> None:
    # Draws: rows 0,0 give 4/2, rows 1,1 give 0/2, mixed ones 4/4; with probabilities 1/4, 1/4, 1/2.
    found = paired_token_ratio([4.0, 0.0], [1, 1], [2.0, 2.0], [1, 1])
    assert found is not None
    assert (found.value, found.low, found.high) == (1, 0, 2)


def test_a_ratio_to_nothing_is_none_and_one_to_little_has_no_interval() -> None:
    assert paired_token_ratio([1.0, 2.0], [1, 1], [0.0, 0.0], [1, 1]) is None
    found = paired_token_ratio([1.0, 2.0], [1, 1], [3.0, 0.0], [1, 1])  # a draw of the second row alone has none
    assert found is not None
    assert (found.value, found.low, found.high) == (1, None, None)
