"""What three seeds of many methods tell: a pair's variance between seeds, moderated by that of all pairs."""

import math
from statistics import median, variance

import numpy as np
import pytest
from scipy.stats import chi2
from scipy.stats import t as students_t

from promptkd.evaluation.statistics import holm
from promptkd.study.pooling import Spread, both_ways, spread_over_pairs, t_quantile, t_two_sided

VALUES = {
    "a": {1: 1.0, 2: 2.0, 3: 4.0},
    "b": {1: 1.5, 2: 2.0, 3: 5.5},
    "c": {1: 0.0, 2: 3.0, 3: 4.0},
    "d": {1: 2.0, 2: 2.5, 3: 4.0},
}


def test_the_spread_over_pairs_is_a_corrected_median():
    names, corrected = sorted(VALUES), []
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            differences = [VALUES[one][seed] - VALUES[other][seed] for seed in (1, 2, 3)]
            corrected.append(variance(differences) / (chi2.median(2) / 2))
    found = spread_over_pairs(list(VALUES.values()))
    assert found.variance == pytest.approx(median(corrected), rel=1e-12)
    assert found.degrees == 2


@pytest.mark.parametrize(
    ("methods", "seeds", "degrees"), [(2, 3, None), (3, 2, 0.5), (3, 3, 1), (3, 5, 2), (4, 2, 1), (9, 2, 1), (9, 5, 2)]
)
def test_the_other_methods_count_for_at_most_half(methods, seeds, degrees):
    draw = np.random.default_rng(0)
    found = spread_over_pairs([dict(enumerate(draw.normal(size=seeds))) for _ in range(methods)])
    assert (None if found is None else found.degrees) == degrees


def test_pairs_without_two_common_finite_seeds_are_left_out():
    diverged, single = {1: math.inf, 2: 1.0, 3: 2.0}, {9: 1.0}
    assert spread_over_pairs([*VALUES.values(), diverged, single]) == spread_over_pairs(list(VALUES.values()))
    assert spread_over_pairs([VALUES["a"], diverged, single]) is None
    assert spread_over_pairs([]) is None


def test_a_moderated_difference_by_hand():
    by_seed, by_row, spread = np.array([1.0, 3.0, 3.5]), np.array([0.5, -0.5, 0.1, -0.1]), Spread(4.0, 1.5)
    metric, p = both_ways(by_seed, by_row, spread)
    moderated, known = (1.5 * 4.0 + 2 * variance([1.0, 3.0, 3.5])) / 3.5, 3.5
    seeds, rows = moderated / 3, 4 / 3 * (0.25 + 0.25 + 0.01 + 0.01)
    degrees = (seeds + rows) ** 2 / (seeds**2 / known + rows**2 / 3)
    reach = max(
        students_t.ppf(0.975, degrees) * math.sqrt(seeds + rows), students_t.ppf(0.975, known) * math.sqrt(seeds)
    )
    assert (metric.low, metric.high) == (pytest.approx(2.5 - reach), pytest.approx(2.5 + reach))
    assert metric.deviation == pytest.approx(math.sqrt(variance([1.0, 3.0, 3.5]))), "what is shown is the seeds' own"
    both = [2 * students_t.sf(2.5 / math.sqrt(seeds + rows), degrees), 2 * students_t.sf(2.5 / math.sqrt(seeds), known)]
    assert p == pytest.approx(max(both))
    assert t_two_sided(t_quantile(known), known) == pytest.approx(0.05)


def claimed(spreads: list[float], shift: float, studies: int, seeds: int = 3) -> tuple[float, float]:
    """How often a study claims a false difference, and one by which its last method is away from all others.

    Methods spread between seeds by `spreads`, and have the same rows, on which they do not differ. Each is compared
    with the first, and p adjusted with Holm's method.
    """
    draw, rows = np.random.default_rng(0), np.zeros(20)
    false = found = 0
    for _ in range(studies):
        values = draw.normal(size=(len(spreads), seeds)) * np.array(spreads)[:, None]
        values[-1] += shift
        spread = spread_over_pairs([dict(enumerate(each)) for each in values])
        p = holm([both_ways(each - values[0], rows, spread)[1] for each in values[1:]])
        tested = p[:-1] if shift else p
        false += min(tested) <= 0.05
        found += p[-1] <= 0.05
    return false / studies, found / studies


@pytest.mark.parametrize(
    ("spreads", "most"),
    [([1] * 6, 0.05), ([1] * 5 + [5], 0.05), ([5] + [1] * 5, 0.07), ([0.3, 0.5, 1, 1, 2, 3], 0.05)],
    ids=["alike", "one spreads five times as far", "the baseline does", "all differ"],
)
def test_equal_methods_are_hardly_ever_told_apart_in_a_study_of_three_seeds(spreads, most):
    assert claimed(spreads, 0, studies=1000)[0] <= most + 0.025  # 3 standard deviations of the share


@pytest.mark.parametrize("spreads", [[1] * 9, [1] * 7 + [100, 1]], ids=["alike", "beside one that diverged"])
def test_three_seeds_of_many_methods_find_what_those_of_a_pair_alone_do_not(spreads):
    """A difference of five standard deviations: with the 2 degrees of its own three seeds, every fourth is found."""
    assert claimed(spreads, 5, studies=300)[1] >= 0.55
