"""What three seeds of many methods tell: a pair's variance between seeds, moderated by those of all pairs."""

import math
from statistics import median, variance

import numpy as np
import pytest
from scipy.stats import chi2
from scipy.stats import t as students_t

from helpers.bias_records import biased_runs
from promptkd.evaluation.pairing import Candidate
from promptkd.evaluation.statistics import holm
from promptkd.results import Evaluation, ModelRecord, Results, RowResult
from promptkd.study.bias_pooling import pool_bias
from promptkd.study.pooling import Spread, Spreads, both_ways, compare_groups, t_quantile, t_two_sided

VALUES = {
    "a": {1: 1.0, 2: 2.0, 3: 4.0},
    "b": {1: 1.5, 2: 2.0, 3: 5.5},
    "c": {1: 0.0, 2: 3.0, 3: 4.5},
    "d": {1: 2.0, 2: 2.5, 3: 4.0},
    "e": {1: 3.0, 2: 0.5, 3: 2.0},
}


def test_a_pairs_spread_is_the_larger_corrected_median_of_its_two_methods():
    medians = {}
    for one in VALUES:
        pairs = [[VALUES[one][seed] - VALUES[other][seed] for seed in (1, 2, 3)] for other in VALUES if other != one]
        medians[one] = median(variance(pair) / (chi2.median(2) / 2) for pair in pairs)
    spreads = Spreads(VALUES)
    for one, other in (("a", "b"), ("e", "c")):
        found = spreads.of(one, other)
        assert found == spreads.of(other, one)
        assert found.variance == pytest.approx(max(medians[one], medians[other]), rel=1e-12)
        assert found.degrees == 2


@pytest.mark.parametrize(
    ("methods", "seeds", "degrees"),
    [(2, 3, None), (3, 5, None), (4, 2, 0.5), (4, 3, 1), (4, 5, 2), (5, 2, 1), (5, 3, 2), (9, 2, 1), (9, 5, 2)],
)
def test_the_other_methods_count_for_at_most_half(methods, seeds, degrees):
    draw = np.random.default_rng(0)
    found = Spreads({str(at): dict(enumerate(draw.normal(size=seeds))) for at in range(methods)}).of("0", "1")
    assert (None if found is None else found.degrees) == degrees


def test_pairs_that_tell_nothing_are_left_out():
    """Those without two common seeds, with a value that is not finite or too large, and those that never differ."""
    beside = {
        "diverged": {1: math.inf, 2: 1.0, 3: 2.0},
        "single": {9: 1.0},
        "huge": {1: 1e300, 2: -1e300, 3: 0.0},
        "copy": VALUES["a"],
    }
    plain = Spreads({name: VALUES[name] for name in "bcde"} | {"a": VALUES["a"]})
    for name in ("diverged", "single", "huge"):
        assert Spreads(VALUES | {name: beside[name]}).of("a", "b") == plain.of("a", "b")
    assert Spreads({"a": VALUES["a"], **beside}).of("a", "copy") is None
    copied = Spreads(VALUES | {"copy": beside["copy"]})
    assert copied.of("a", "copy") == Spread(plain.of("a", "a").variance, 2)
    assert Spreads({}).of("a", "b") is None


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


def test_values_whose_variance_is_too_large_have_no_interval():
    metric, p = both_ways(np.array([1e200, -1e200, 0.0]), np.array([0.5, -0.5]))
    assert (metric.low, metric.deviation, p) == (None, None, None)


def runs_of(values: dict[str, dict[int, float]]) -> dict[str, dict[int, Candidate]]:
    """Runs of which each answers three rows as well as its value says."""
    groups: dict[str, dict[int, Candidate]] = {}
    for group, seeds in values.items():
        for seed, value in seeds.items():
            samples = [
                RowResult(row=row, prompt="", references=[], response="", scores={"rouge_l": value + row})
                for row in range(3)
            ]
            made = Evaluation(model="m", data="test", decoding={"temperature": 0.0}, metrics={}, samples=samples)
            record = Results(kind="evaluate", evaluations=[made])
            groups.setdefault(group, {})[seed] = Candidate(f"{group}-{seed}", record, "m")
    return groups


def test_differences_and_pairs_of_a_study_are_tested_by_the_spread_of_all_its_methods():
    made = compare_groups(runs_of(VALUES), {"rouge_l": "higher"}.get, baseline="a")
    spreads, rows = Spreads(VALUES), np.zeros(3)
    for found in made.differences:
        between = np.array([VALUES[found.model][seed] - VALUES["a"][seed] for seed in (1, 2, 3)])
        assert found.p_value == pytest.approx(both_ways(between, rows, spreads.of(found.model, "a"))[1])
        assert found.p_value != pytest.approx(both_ways(between, rows)[1])

    far = VALUES | {"far": {1: 18.0, 2: 23.0, 3: 20.0}}  # 17, 21 and 16 from a
    (apart,) = compare_groups(runs_of(far), {"rouge_l": "higher"}.get, baseline="a").told_apart
    assert ("far", "a") in apart.pairs
    assert both_ways(np.array([17.0, 21.0, 16.0]), rows)[1] * 15 > 0.05, (
        "which its own seeds alone do not tell of 15 pairs"
    )
    assert all("far" in pair for pair in apart.pairs)


def test_the_kl_of_a_method_with_another_teacher_is_left_out_alone():
    groups = runs_of(VALUES)
    for group, seeds in groups.items():
        for seed, each in seeds.items():
            for sample in each.record.evaluations[0].samples:
                sample.scores["kl_to_teacher"] = seed + sample.row
            teacher = ModelRecord(path=f"teacher-{'own' if group == 'b' else 'shared'}", parameters=1, sha256="")
            each.record.models["teacher"] = teacher
    made = compare_groups(groups, {"rouge_l": "higher", "kl_to_teacher": "lower"}.get, baseline="a")
    others = [each for each in groups if each != "a"]
    assert {each.model for each in made.differences if each.metric == "rouge_l"} == {*others}
    assert {each.model for each in made.differences if each.metric == "kl_to_teacher"} == {*others} - {"b"}
    measured = {each.model: "kl_to_teacher" in each.metrics for each in made.evaluations}
    assert measured == {group: group != "b" for group in groups}
    told = "kl_to_teacher of b was not compared: its record names another teacher, or context, than that of a."
    assert told in made.notes
    made = compare_groups(groups, {"rouge_l": "higher", "kl_to_teacher": "lower"}.get, baseline="b")
    assert {each.metric for each in made.differences} == {"rouge_l"}
    for each in groups.values():  # seeds of one method with two teachers
        each[1].record.models["teacher"] = ModelRecord(path="third", parameters=1, sha256="")
    made = compare_groups(groups, {"rouge_l": "higher", "kl_to_teacher": "lower"}.get, baseline="a")
    assert {each.metric for each in made.differences} == {"rouge_l"}


def test_exposure_bias_is_tested_by_the_spread_of_all_methods():
    groups = biased_runs(dict(zip("abcd", (0.1, 0.2, 0.3, 0.5), strict=True)))
    made = pool_bias(groups, {}, baseline="a")
    curves = {curve.model: curve for curve in made.curves if curve.name == "exposure_bias_difference"}
    points = {g: {s: run.curves[0].points[3] for s, run in seeds.items()} for g, seeds in groups.items()}
    spreads = Spreads({g: {s: point.value for s, point in seeds.items()} for g, seeds in points.items()})
    for group in "bcd":
        values = np.array([points[group][seed].value - points["a"][seed].value for seed in (1, 2, 3)])
        parts = [np.subtract(points[group][seed].row_parts, points["a"][seed].row_parts) for seed in (1, 2, 3)]
        expected, _ = both_ways(values, np.mean(parts, axis=0), spreads.of(group, "a"))
        found = curves[group].points[3]
        assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
        assert found.low != pytest.approx(both_ways(values, np.mean(parts, axis=0))[0].low)


def claimed(
    spreads: list[float], shift: float, studies: int, *, seeds: int = 3, metrics: int = 1
) -> tuple[float, float]:
    """How often a study claims a false difference, and one by which its last method is away from all others.

    Methods spread between seeds by `spreads`, and have the same rows, on which they do not differ. Each is compared
    with the first on every metric, and p adjusted with Holm's method.
    """
    draw, rows, last = np.random.default_rng(0), np.zeros(20), len(spreads) - 1
    false = found = 0
    for _ in range(studies):
        tested: list[tuple[bool, float]] = []  # whether the difference is true, and p
        for _ in range(metrics):
            values = draw.normal(size=(len(spreads), seeds)) * np.array(spreads)[:, None]
            values[-1] += shift
            of_all = Spreads({str(at): dict(enumerate(each)) for at, each in enumerate(values)})
            for at in range(1, len(spreads)):
                p = both_ways(values[at] - values[0], rows, of_all.of(str(at), "0"))[1]
                tested.append((shift != 0 and at == last, p))
        claims = [is_true for (is_true, _), p in zip(tested, holm([p for _, p in tested]), strict=True) if p <= 0.05]
        false += not all(claims)
        found += any(claims)
    return false / studies, found / studies


MIXED = [0.3, 0.5, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("spreads", "most"),
    [([1] * 6, 0.02), (MIXED, 0.05), ([1] * 5 + [5], 0.04), ([5] + [1] * 5, 0.05), ([20] + [1] * 5, 0.05)],
    ids=["alike", "all differ", "one spreads five times as far", "the baseline does", "twenty times"],
)
def test_equal_methods_are_hardly_ever_told_apart_in_a_study_of_three_seeds(spreads, most):
    assert claimed(spreads, 0, studies=700)[0] <= most + 0.025  # 3 standard deviations of the share


@pytest.mark.parametrize(
    ("spreads", "least"),
    [([1] * 9, 0.5), ([1] * 7 + [100, 1], 0.45), ([1, 1, 100, 1], 0.5)],
    ids=["alike", "beside one that diverged", "beside one of two"],
)
def test_three_seeds_of_many_methods_find_what_those_of_a_pair_alone_do_not(spreads, least):
    """A difference of five times ±: by the pair's own seeds alone, every fifth is found among nine methods."""
    assert claimed(spreads, 5, studies=300)[1] >= least
