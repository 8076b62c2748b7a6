"""The committed records of every study, and what promptkd's own pooling makes of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.evidence.records import unpack
from promptkd.cli.study_comparison import Finished, Study, mean_costs, read_study, study_comparison
from promptkd.errors import RequestError
from promptkd.results import Curve, Results, Training
from promptkd.study.plan import plan_runs


class Point(NamedTuple):
    """A mean over seeds of training."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Committed:
    """A study as its committed records hold it."""

    name: str
    study: Study
    planned: int  # runs, whether finished or not

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(run.planned.group for run in self.study.runs))

    @property
    def baseline(self) -> str:
        return self.study.options.baseline or self.groups[0]

    def named(self, patterns: Iterable[str]) -> list[str]:
        """The groups whose names match one of the patterns, in the order of these; without any, all of them."""
        asked = list(patterns)
        if missing := [each for each in asked if not any(fnmatchcase(group, each) for group in self.groups)]:
            raise RequestError(f"Study {self.name} has {', '.join(self.groups)}. Got {missing[0]}.")
        found = [group for each in asked for group in self.groups if fnmatchcase(group, each)]
        return list(dict.fromkeys(found)) if asked else self.groups

    def by_method(self, setting: str) -> dict[str, dict[float, str]]:
        """Groups by method and by the value of a setting in the study's grid, of methods that have a run of each."""
        found: dict[str, dict[float, str]] = {}
        for run in self.study.runs:
            group, value = run.planned.group, run.planned.settings[setting]
            found.setdefault(group.split(f"-{setting}-")[0], {})[float(value)] = group
        values = len(self.study.options.grid[setting])
        return {method: dict(sorted(groups.items())) for method, groups in found.items() if len(groups) == values}

    def label(self, group: str) -> str:
        """What is short: of "rate-prompt_learning_rate-0.02", in a method's own grid, "prompt learning rate 0.02".

        A name that the study gave goes; that of a method stays.
        """
        settings = self.runs(group)[0].planned.settings
        for setting in settings:
            name, varied, value = group.partition(f"-{setting}-")
            if varied:
                method = f"{name}, " if name == settings["method"] else ""
                return f"{method}{setting.replace('_', ' ')} {value}"
        return group

    def together(self, other: "Committed", groups: Sequence[str]) -> "Committed":
        """The runs of some groups in two studies of the same pair, under other seeds, as if they were one study."""
        both = [run for held in (self, other) for run in held.study.runs if run.planned.group in groups]
        keys = [(run.planned.group, run.planned.seed) for run in both]
        if len(set(keys)) < len(keys) or self._pair != other._pair:
            raise RequestError(f"{self.name} and {other.name} have other pairs, or a seed of a group in both.")
        options = replace(self.study.options, seeds=sorted({seed for _, seed in keys}), baseline=groups[0])
        study = self.study._replace(options=options, runs=both, started={})
        return Committed(f"{self.name} and {other.name}", study, len(both))

    @property
    def _pair(self) -> dict[str, str]:
        """The SHA-256 of the teacher and of what all runs begin with."""
        measured = {each.label: each.record.models.get(each.model) for each in self.study.references}
        teacher = self.study.runs[0].trained.models["teacher"].sha256
        return {"": teacher} | {label: model.sha256 for label, model in measured.items() if model is not None}

    def runs(self, group: str) -> list[Finished]:
        return [run for run in self.study.runs if run.planned.group == group]

    def cost(self, group: str) -> Training:
        """The mean over seeds."""
        return mean_costs(self.runs(group))[group]

    def span_of_seconds(self, group: str) -> tuple[float, float]:
        """Of the fastest and of the slowest seed."""
        seconds = [cost.seconds for run in self.runs(group) for cost in run.trained.training.values()]
        return min(seconds), max(seconds)

    def seconds(self) -> tuple[float, float]:
        """Of training and of measuring, over all finished runs; validation during training is in neither."""
        trained = sum(cost.seconds for run in self.study.runs for cost in run.trained.training.values())
        records = [run.measured for run in self.study.runs] + [run.exposure for run in self.study.runs if run.exposure]
        records += [*(each.record for each in self.study.references), *self.study.started.values()]
        spent = [(what, seconds) for record in records for what, seconds in record.timings.items()]
        return trained, sum(seconds for what, seconds in spent if what != "train")

    @cache  # noqa: B019 - as many as there are studies, for one run of the command
    def comparison(self, metrics: tuple[str, ...], baseline: str) -> Results:
        """Of `metrics`, by default all, as `promptkd study` makes it."""
        options = replace(self.study.options, metrics=list(metrics), baseline=baseline)
        return study_comparison(self.study._replace(options=options))

    def tested(self, baseline: str = "") -> Results:
        """With the study's own metrics and baseline, or another: its differences are those that p is adjusted over."""
        return self.comparison(tuple(self.study.options.metrics), baseline or self.baseline)

    def shown(self, metrics: Iterable[str]) -> Results:
        """The values of metrics that the study need not test."""
        own = tuple(self.study.options.metrics)
        return self.comparison(own if set(metrics) <= set(own) else tuple(metrics), self.baseline)

    def history(self, group: str, metric: str) -> list[Point]:
        """A logged metric over steps: its mean over seeds, and one standard deviation between them to either side."""
        held: dict[float, list[float]] = {}
        for run in self.runs(group):
            for point in (point for series in run.trained.history for point in series.points):
                if isinstance(value := point.get(metric), int | float) and math.isfinite(value):
                    held.setdefault(float(point["step"]), []).append(float(value))
        return [_point(x, values) for x, values in sorted(held.items())]

    def bias(self, model: str, data: str, *, by_step: bool) -> Curve | None:
        """ExAccErr in % over lengths, or at one length over steps of training, as `promptkd study` pools it."""
        wanted = ("exposure_bias_by_step" if by_step else "exposure_bias", model, data)
        return next((each for each in self.tested().curves if (each.name, each.model, each.data) == wanted), None)


def committed(records: Path) -> Committed:
    """The study whose compact records lie in a folder."""
    with TemporaryDirectory() as scratch:
        study = read_study(unpack(records, Path(scratch, records.name)))
    options = study.options
    planned = plan_runs(options.base, options.methods, options.seeds, options.grid, read_file=lambda path: {})
    return Committed(records.name, study, len(planned))


def _point(x: float, values: list[float]) -> Point:
    value, deviation = mean(values), stdev(values) if len(values) > 1 else 0.0
    return Point(x, value, value - deviation, value + deviation)
