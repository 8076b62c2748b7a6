"""The exposure bias of a study's methods: curves over seeds and rows, differences by length, and the way over steps."""

import numpy as np
import pytest

from helpers.bias_records import ROWS, biased_runs, curve_of, errors, record
from promptkd.errors import RequestError
from promptkd.evaluation import Bootstrap
from promptkd.evaluation.accumulated_error import excess_accumulated_error
from promptkd.results import ModelRecord
from promptkd.study.bias_pooling import pool_bias
from promptkd.study.pooling import both_ways


@pytest.mark.parametrize("ended", ["leave", "zero"])
def test_a_rows_part_is_the_derivative_by_its_weight(ended):
    draw = np.random.default_rng(0)
    mine, theirs = errors(draw, 0.3), errors(draw, 0)
    points = excess_accumulated_error(mine, theirs, ended=ended)
    one = Bootstrap(1)
    whole = excess_accumulated_error(mine * 200, theirs * 200, ended=ended, bootstrap=one)
    more = excess_accumulated_error([*mine * 200, mine[7]], [*theirs * 200, theirs[7]], ended=ended, bootstrap=one)
    for at in (0, 2, 4):  # one more among 200 of each row changes the weight of row 7 by 1 / 200
        assert (more[at].value - whole[at].value) * 200 == pytest.approx(points[at].row_parts[7], rel=0.02, abs=0.01)
    assert all(abs(sum(point.row_parts)) < 0.05 for point in points if point.value is not None)
    spread = [(ROWS / (ROWS - 1) * np.square(point.row_parts).sum()) ** 0.5 for point in points[1:4]]
    assert spread == pytest.approx([(point.high - point.low) / 2 / 1.96 for point in points[1:4]], rel=0.3)


def test_curves_and_differences_are_means_over_seeds_with_the_intervals_of_seeds_and_rows():
    groups = biased_runs({"a": 0.1, "b": 0.5})
    made = pool_bias(groups, {}, baseline="a", label=lambda data: f"{data}, bias")
    curves = {(curve.name, curve.model): curve for curve in made.curves}
    assert curves.keys() == {("exposure_bias", "a"), ("exposure_bias", "b"), ("exposure_bias_difference", "b")}
    for at in (1, 3):
        points = {group: [groups[group][seed].curves[0].points[at] for seed in (1, 2, 3)] for group in "ab"}
        value = {group: np.array([point.value for point in own]) for group, own in points.items()}
        part = {group: np.mean([point.row_parts for point in own], axis=0) for group, own in points.items()}
        expected, _ = both_ways(value["b"], part["b"])
        found = curves["exposure_bias", "b"].points[at]
        assert (found.x, found.value, found.low, found.high) == (at + 1, expected.value, expected.low, expected.high)
        assert found.rows == min(point.rows for point in points["b"])
        assert not found.row_parts
        expected, _ = both_ways(value["b"] - value["a"], part["b"] - part["a"])
        found = curves["exposure_bias_difference", "b"].points[at]
        assert (found.value, found.low) == (pytest.approx(expected.value), pytest.approx(expected.low))
    reached = [
        [p.x for p in seed.curves[0].points if p.rows >= ROWS / 2] for own in groups.values() for seed in own.values()
    ]
    length = min(map(max, reached))
    (difference,) = made.differences
    assert (difference.model, difference.baseline, difference.data) == ("b", "a", "t, bias")
    assert difference.difference.value == curves["exposure_bias_difference", "b"].points[int(length) - 1].value
    assert difference.p_value <= 0.05
    values = {each.model: each.metrics["exposure_bias"].value for each in made.evaluations}
    assert values == {group: curves["exposure_bias", group].points[int(length) - 1].value for group in "ab"}
    assert made.evaluations[0].decoding["exposure bias at length"] == length
    (apart,) = made.told_apart
    assert (apart.metric, apart.data, apart.pairs) == ("exposure_bias", "t, bias", [("a", "b")])
    assert made.data.keys() == {"t, bias"}


def test_where_one_seed_has_no_value_there_is_none():
    groups = biased_runs({"a": 0.1})
    last = groups["a"][2].curves[0].points[-1]
    last.value = None
    (curve,) = pool_bias(groups, {}, baseline="a").curves
    assert curve.points[-1].value is None
    assert curve.points[1].value is not None


def test_other_teachers_and_other_rows_are_not_compared():
    groups = biased_runs({"a": 0.1, "b": 0.5, "c": 0.5})
    for each in groups["b"].values():
        each.curves[0].settings["teacher"] = "other"
    for each in groups["c"].values():
        for point in each.curves[0].points:
            point.row_parts = point.row_parts[1:]
    made = pool_bias(groups, {}, baseline="a")
    assert not made.differences
    assert [curve.name for curve in made.curves] == ["exposure_bias"] * 3


@pytest.mark.parametrize("reference", [False, True])
def test_other_versions_of_the_data_are_refused(reference):
    groups, other = biased_runs({"a": 0.1, "b": 0.5}), record(curve_of("student", 9, 0))
    changed = other if reference else groups["b"][2]
    changed.data["t"].sha256 = "cd"
    name = "student" if reference else "b-seed-2"
    with pytest.raises(RequestError, match=rf"^a-seed-1 and {name} differ on t in data \(sha256 ab and cd\)\. Measure"):
        pool_bias(groups, {"untrained": other}, baseline="a")
    changed.data["t"].sha256 = ""  # of a folder, or the hub's
    assert pool_bias(groups, {"untrained": other}, baseline="a").differences


def test_a_teacher_that_has_changed_is_another():
    groups = biased_runs({"a": 0.1, "b": 0.5, "c": 0.3})
    for group, seeds in groups.items():
        for each in seeds.values():
            each.models["teacher t"] = ModelRecord(path="t", parameters=1, sha256="old" if group == "b" else "new")
    made = pool_bias(groups, {}, baseline="a")
    assert [each.model for each in made.differences] == ["c"]
    assert [each.models for each in made.told_apart] == [["a", "c"]]


def test_one_seed_has_its_own_intervals_and_no_difference():
    groups = biased_runs({"a": 0.1, "b": 0.5}, seeds=(1,))
    made = pool_bias(groups, {}, baseline="a")
    assert not made.differences
    assert made.curves[1].points[2].low == groups["b"][1].curves[0].points[2].low


def test_the_way_over_steps_is_that_of_the_steps_that_all_seeds_have():
    groups = biased_runs({"a": 0.4})
    for seed, each in groups["a"].items():
        steps = (10, 20) if seed < 3 else (10, 20, 25)  # the third has kept a best one besides
        for step in steps:
            each.curves.insert(0, curve_of(f"a-seed-{seed} step {step}", seed, step / 100))
    start = record(curve_of("student", 9, 0))
    made = pool_bias(groups, {"untrained": start}, baseline="a")
    way = next(curve for curve in made.curves if curve.name == "exposure_bias_by_step")
    length = way.settings["length"]
    assert [point.x for point in way.points] == [0, 10, 20]
    assert way.points[0].value == start.curves[0].points[length - 1].value
    own = [groups["a"][seed].curves for seed in (1, 2, 3)]
    at_20 = [next(c for c in curves if c.model.endswith(" 20")).points[length - 1].value for curves in own]
    assert way.points[2].value == pytest.approx(np.mean(at_20))
    assert [curve.model for curve in made.curves if curve.name == "exposure_bias"] == ["a", "untrained"]
