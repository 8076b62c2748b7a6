"""What the runs of a study say of the exposure bias of its methods: curves over lengths and steps, over seeds and rows.

At every length ExAccErr of a method is the mean over its seeds. Intervals and p are those of `pooling.py`, with v_s the
value of seed s over all rows, and t_i row i's part in the mean over seeds, linearized: with R and E the accumulated
errors on the student's and on the teacher's continuations, and R_i and E_i row i's parts in them,

    t_i = 100 (R_i - R E_i / E) / E.

The same teacher's continuations of the same rows serve all students, so that differences are paired by seed and row.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from promptkd.errors import RequestError
from promptkd.evaluation.comparison import Comparison
from promptkd.evaluation.pairing import teachers_of
from promptkd.results import Curve, CurvePoint, Difference, Evaluation, Metric, Results
from promptkd.study.pooling import Pooled, Spread, Spreads, both_ways, told_apart

METRIC = "exposure_bias"
_STEP = re.compile(r" step (\d+)$")  # behind a run's name, of the curve of a checkpoint
_SUPPORTED = 0.5  # share of the rows that reach the length at which methods are compared

Seeds = Mapping[int, Curve]


@dataclass
class PooledBias(Comparison):
    curves: list[Curve] = field(default_factory=list)


@dataclass(frozen=True)
class _Setting:
    """The curves that can be compared: of the same rows, teacher and decoding."""

    students: dict[str, dict[int, Curve]] = field(default_factory=dict)  # by group and seed
    checkpoints: dict[str, dict[int, dict[int, Curve]]] = field(default_factory=dict)  # by group, step and seed
    references: dict[str, Curve] = field(default_factory=dict)


def pool_bias(
    groups: Mapping[str, Mapping[int, Results]],
    references: Mapping[str, Results],
    *,
    baseline: str,
    label: Callable[[str], str] = str,
) -> PooledBias:
    """Of each group its ExAccErr at every length and its difference from the baseline's; at one length, over steps.

    `groups` holds the record of each seed's run, `references` those of models of which there is one. The length of the
    difference that is tested, and of the curve over steps, is the longest that half of the rows reach in every run.
    `label` names a data set. One seed has its intervals over rows, and no differences. Raises `RequestError` if a data
    set is not the same in all records.
    """
    made = PooledBias()
    for record in [*(each for seeds in groups.values() for each in seeds.values()), *references.values()]:
        made.data |= {label(data): facts for data, facts in record.data.items() if label(data) not in made.data}
    for (data, _), setting in _settings(groups, references).items():
        name, length = label(data), _supported_length(setting)
        tested: dict[str, Pooled] = {}
        for group, seeds in setting.students.items():
            first = next(iter(seeds.values()))
            points = _mean(list(seeds.values()))
            made.curves.append(
                Curve(name="exposure_bias", model=group, data=name, settings=first.settings, points=points)
            )
            at = {seed: _at(curve, length) for seed, curve in seeds.items()}
            if at_length := _pooled(list(at.values())):
                own = {seed: (p.value, np.array(p.row_parts)) for seed, p in at.items() if p.value is not None}
                tested[group] = {METRIC: own}
                metrics = {METRIC: at_length[0]}
                decoding = {**first.settings, "exposure bias at length": length}
                made.evaluations.append(Evaluation(model=group, data=name, decoding=decoding, metrics=metrics))
        made.told_apart += told_apart(name, tested, lambda metric: "lower")
        made.curves += _over_steps(setting, name, length)
        made.curves += [curve.model_copy(update={"model": model, "data": name, "points": _mean([curve])})
                        for model, curve in setting.references.items()]  # fmt: skip
        spreads = _spreads(setting)
        for group, seeds in setting.students.items():
            both = [(seeds[seed], other) for seed, other in setting.students.get(baseline, {}).items() if seed in seeds]
            if group != baseline and len(both) > 1:
                _add_difference(made, (group, baseline, name), both, length, spreads)
    return made


def _settings(
    groups: Mapping[str, Mapping[int, Results]], references: Mapping[str, Results]
) -> dict[tuple[str, str], _Setting]:
    found: dict[tuple[str, str], _Setting] = {}
    first: dict[str, tuple[str, str]] = {}  # by data set, the model that was measured on it first, and the file's hash

    def of(curve: Curve, record: Results) -> _Setting:
        sha256 = record.data[curve.data].sha256
        model, known = first.setdefault(curve.data, (curve.model, sha256)) if sha256 else ("", "")
        if sha256 != known:
            told = f"{model} and {curve.model} differ on {curve.data} in data (sha256 {known[:8]} and {sha256[:8]})"
            raise RequestError(f"{told}. Measure the exposure bias of all of them on one version of it.")
        rows = len(curve.points[0].row_parts)
        alike = json.dumps([curve.settings, sorted(teachers_of(record)), rows], sort_keys=True)
        return found.setdefault((curve.data, alike), _Setting())

    for group, seeds in groups.items():
        for seed, record in seeds.items():
            for curve in record.curves:
                setting = of(curve, record)
                if step := _STEP.search(curve.model):
                    steps = setting.checkpoints.setdefault(group, {})
                    steps.setdefault(int(step[1]), {})[seed] = curve
                else:
                    setting.students.setdefault(group, {})[seed] = curve
    for label, record in references.items():
        for curve in record.curves:
            of(curve, record).references[label] = curve
    return found


def _supported_length(setting: _Setting) -> int:
    """The longest length that `_SUPPORTED` of the rows reach in every run; 1 if there is none."""
    longest = [
        max(
            (point.x for point in curve.points if (point.rows or 0) >= _SUPPORTED * len(point.row_parts) > 0), default=1
        )
        for seeds in setting.students.values()
        for curve in seeds.values()
    ]
    return int(min(longest, default=1))


def _at(curve: Curve, length: int) -> CurvePoint:
    return curve.points[length - 1] if length <= len(curve.points) else CurvePoint(x=length, value=None)


def _pooled(points: Sequence[CurvePoint], spread: Spread | None = None) -> tuple[Metric, float | None] | None:
    """Over the seeds' points at one length; None if one of them has no value there."""
    values = [point.value for point in points if point.value is not None]
    if len(values) < len(points):
        return None
    if len(points) == 1:
        (point,) = points
        return Metric(value=values[0], low=point.low, high=point.high, rows=len(point.row_parts)), None
    return both_ways(np.array(values), np.mean([point.row_parts for point in points], axis=0), spread)


def _mean(curves: Sequence[Curve]) -> list[CurvePoint]:
    longest = max(len(curve.points) for curve in curves)
    return [_point(length, [_at(curve, length) for curve in curves]) for length in range(1, longest + 1)]


def _point(x: int, points: Sequence[CurvePoint], spread: Spread | None = None) -> CurvePoint:
    found, rows = _pooled(points, spread), min(point.rows or 0 for point in points)
    if found is None:
        return CurvePoint(x=x, value=None, rows=rows)
    return CurvePoint(x=x, value=found[0].value, low=found[0].low, high=found[0].high, rows=rows)


def _over_steps(setting: _Setting, data: str, length: int) -> list[Curve]:
    """Of each group with checkpoints, ExAccErr(`length`) at the steps that all of its seeds have; 0 is the start."""
    made = []
    starts = list(setting.references.values())
    for group, steps in setting.checkpoints.items():
        every = {seed for seeds in steps.values() for seed in seeds}
        points = [] if len(starts) != 1 else [_point(0, [_at(starts[0], length)])]
        for step, seeds in sorted(steps.items()):
            if seeds.keys() == every:
                points.append(_point(step, [_at(curve, length) for curve in seeds.values()]))
        own = {**next(iter(next(iter(steps.values())).values())).settings, "length": length}
        made.append(Curve(name="exposure_bias_by_step", model=group, data=data, settings=own, points=points))
    return made


def _add_difference(
    made: PooledBias,
    labels: tuple[str, str, str],
    both: Sequence[tuple[Curve, Curve]],
    length: int,
    spreads: Sequence[Spreads],
) -> None:
    """The differences at every length as a curve, and at `length` as one that is tested."""
    group, baseline, data = labels
    points = []
    for x in range(1, min(len(curve.points) for pair in both for curve in pair) + 1):
        paired = [_less(_at(ours, x), _at(theirs, x)) for ours, theirs in both]
        spread = spreads[x - 1].of(group, baseline)
        points.append(_point(x, paired, spread))
        if x == length and (found := _pooled(paired, spread)):
            metric, p = found
            made.differences.append(
                Difference(
                    model=group,
                    baseline=baseline,
                    metric=METRIC,
                    difference=metric,
                    better="lower",
                    data=data,
                    p_value=p,
                )
            )
    settings = {**both[0][0].settings, "baseline": baseline}
    made.curves.append(Curve(name="exposure_bias_difference", model=group, data=data, settings=settings, points=points))


def _spreads(setting: _Setting) -> list[Spreads]:
    """By length, how far seeds move the difference of any two methods."""
    longest = max((len(curve.points) for seeds in setting.students.values() for curve in seeds.values()), default=0)
    found = []
    for x in range(1, longest + 1):
        values: dict[str, dict[int, float]] = {}
        for group, seeds in setting.students.items():
            at = {seed: _at(curve, x).value for seed, curve in seeds.items()}
            values[group] = {seed: value for seed, value in at.items() if value is not None}
        found.append(Spreads(values))
    return found


def _less(ours: CurvePoint, theirs: CurvePoint) -> CurvePoint:
    rows = min(ours.rows or 0, theirs.rows or 0)
    if ours.value is None or theirs.value is None:
        return CurvePoint(x=ours.x, value=None, rows=rows)
    parts = [one - other for one, other in zip(ours.row_parts, theirs.row_parts, strict=True)]
    return CurvePoint(x=ours.x, value=ours.value - theirs.value, rows=rows, row_parts=parts)
