"""Sign-flip tests, Holm's correction and effect sizes: numbers by hand, plain loops, and laws."""

import itertools
import math
import random

import numpy as np
import pytest

from promptkd.errors import RequestError
from promptkd.evaluation.significance import effect_size, holm, row_contributions, sign_flip_test


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
    weak = values - 0.5
    assert sign_flip_test(weak, draws=999, seed=1) == sign_flip_test(weak, draws=999, seed=1)
    assert sign_flip_test(weak, draws=999, seed=1) != sign_flip_test(weak, draws=999, seed=2)


def test_drawing_in_blocks_draws_as_often(monkeypatch):
    values = np.random.default_rng(2).normal(size=40) + 0.3
    whole = sign_flip_test(values, draws=1000)
    monkeypatch.setattr("promptkd.evaluation.significance._BLOCK", 40 * 300)
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
    with pytest.raises(RequestError, match="one finite number a row"):
        sign_flip_test(np.array(values))


def test_no_draws_are_refused():
    with pytest.raises(RequestError, match=r"`draws` must be at least 1\. Got 0"):
        sign_flip_test(np.ones(3), draws=0)
