"""docs/evidence.md and its plots, built of the committed records and of page.md, which holds the prose.

page.md is a Jinja template. What it may call are the public methods of `Page`; a study, group, data set or metric that
the records do not hold is an error, so that no number on the page can be without a record.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from benchmarks.evidence import tables
from benchmarks.evidence.studies import Committed, Point, committed
from benchmarks.evidence.svg import Axis, Line, Mark, chart, forest, scatter
from promptkd.errors import RequestError
from promptkd.report.formatting import duration, listed
from promptkd.report.metrics import logged_info, metric_info
from promptkd.report.tables import metric_columns
from promptkd.results import Curve

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLOTS = "evidence"  # folder of the plots, beside the page
REACH, POWER = 1.960, 0.842  # of a standard error: half an interval of 95 %, and what lies above it four times in five
BEGIN, END = "<!-- by python -m benchmarks.evidence -->", "<!-- end -->"  # around what of README.md is built


class Page:
    """What the template may ask for. `groups` are names or patterns such as "promptkd*"; without any, all."""

    def __init__(self, records: Path):
        self._records = records
        self._studies: dict[str, Committed] = {}
        self.plots: dict[str, str] = {}  # by file name

    def has(self, study: str) -> bool:
        """Whether there are records of a study."""
        return (self._records / study / "config.yaml").is_file()

    def together(self, study: str, other: str, groups: Sequence[str]) -> str:
        """The name of what two studies hold of some groups, the first of which is the baseline, as if it were one."""
        joined = self._study(study).together(self._study(other), groups)
        self._studies[joined.name] = joined
        return joined.name

    def table(self, study: str, data: str, metrics: Sequence[str] = (), groups: Sequence[str] = ()) -> str:
        """Groups by metrics on one data set, such as "dolly, sampled"; by default the metrics that the study tests."""
        held = self._study(study)
        asked = metrics or held.study.options.metrics or metric_columns([held.tested()])
        return self._with_source(held, tables.metrics_table(held, data, held.named(groups), asked))

    def choices(self, study: str, setting: str, data: str = "validation") -> str:
        """KL and loss of each method by the values of a setting, and which was chosen."""
        held = self._study(study)
        return self._with_source(held, tables.choices_table(held, setting, data))

    def pairs(self) -> str:
        """Which teacher and student each study with records ran with, and on what."""
        names = sorted(file.parent.name for file in self._records.glob("*/config.yaml"))
        return tables.pairs_table([self._study(name) for name in names])

    def costs(self, study: str, groups: Sequence[str] = ()) -> str:
        """What a run of each group took."""
        held = self._study(study)
        return self._with_source(held, tables.costs_table(held, held.named(groups)))

    def logged(self, study: str, metrics: Sequence[str], groups: Sequence[str] = (), count: int = 10) -> str:
        """Logged metrics as means over the first and the last `count` steps, and what promptkd warns of."""
        held = self._study(study)
        return self._with_source(held, tables.log_table(held, held.named(groups), metrics, count))

    def ends(self, study: str, group: str, metric: str, count: int = 10) -> str:
        """A logged metric as a mean over the first and over the last `count` steps: "3.1 → 1.8"."""
        return tables.ends_text(self._study(study), group, metric, count)

    def reached(self, study: str, target: float, metric: str = "eval_kl_to_teacher", groups: Sequence[str] = ()) -> str:
        """What each group took until a logged metric was at most `target`."""
        held = self._study(study)
        return self._with_source(held, tables.reached_table(held, metric, target, held.named(groups)))

    def value(self, study: str, group: str, metric: str, data: str) -> str:
        return tables.row_of(self._study(study), group, metric, data).cells[metric].value

    def interval(self, study: str, group: str, metric: str, data: str) -> str:
        return tables.row_of(self._study(study), group, metric, data).cells[metric].interval or "no interval"

    def difference(self, study: str, group: str, metric: str, data: str, less: str = "") -> str:
        """From the baseline, or from the group `less`, with its interval and p."""
        return tables.difference_text(self._study(study), group, metric, data, less)

    def raw_p(self, study: str, group: str, metric: str, data: str) -> str:
        """The p of a difference from the baseline before any correction."""
        return tables.raw_p_text(self._study(study), group, metric, data)

    def by_seed(self, study: str, group: str, metric: str, data: str) -> str:
        """The difference from the baseline under each seed: "+0.08, +0.94 and −0.02"."""
        return tables.by_seed_text(self._study(study), group, metric, data)

    def smallest(self, study: str, group: str, metric: str, data: str, less: str = "") -> str:
        """Half the width of a difference's interval: about the least that is told from zero before any correction."""
        return tables.half_width_text(self._study(study), group, metric, data, less)

    def noticed(self, study: str, group: str, metric: str, data: str, less: str = "") -> str:
        """The difference that has a p of at most 0.05, before any correction, in four of five such studies."""
        return tables.half_width_text(self._study(study), group, metric, data, less, times=1 + POWER / REACH)

    def differences(self, study: str) -> str:
        """How many differences p is adjusted over."""
        return f"{len(self._study(study).tested().differences):,}"

    def leaks(self, task: str, data: str, what: str) -> str:
        """How many rows of a test set share something with the training rows, as leaks.py counted it."""
        held = json.loads((self._records / f"leaks-{task}.json").read_text(encoding="utf-8"))
        return f"{held[data][what]:,}"

    def ratio(self, study: str, group: str, other: str) -> str:
        """Of the seconds of a run of one group to those of another's, means over seeds: "1.6"."""
        held = self._study(study)
        return f"{held.cost(group).seconds / held.cost(other).seconds:.1f}"

    def slower(self) -> str:
        """The most by which seconds differ between the seeds of one group, of all studies: "1.6" times."""
        studies = [self._study(file.parent.name) for file in sorted(self._records.glob("*/config.yaml"))]
        spans = [study.span_of_seconds(group) for study in studies for group in study.groups]
        return f"{max(most / least for least, most in spans):.1f}"

    def leaders(self, study: str, metric: str, data: str) -> str:
        """ "a, b and c": the best and those not told apart from it; "all" where nothing is."""
        found = tables.leaders(self._study(study), metric, data)
        return listed(found) if found else "all"

    def steps(self, study: str, group: str) -> str:
        return f"{self._study(study).cost(group).steps:,}"

    def seconds(self, study: str, group: str) -> str:
        """Of one run, the mean over seeds: "6 min 12 s"."""
        return duration(self._study(study).cost(group).seconds)

    def methods(self, study: str) -> int:
        return len(self._study(study).groups)

    def seeds(self, study: str) -> int:
        return len({run.planned.seed for run in self._study(study).study.runs})

    def plot_over(
        self,
        study: str,
        setting: str,
        metric: str,
        data: str,
        *,
        groups: Sequence[str] = (),
        levels: Sequence[str] = (),
        default: Mapping[str, float | str] | None = None,
        label: str = "",
    ) -> str:
        """A metric over a setting that the study varies; groups of `levels`, without it, are horizontal lines.

        A group that leaves the setting at its default joins the first line at the value that `default` names.
        """
        held, info = self._study(study), metric_info(metric)
        found = {group: held.runs(group)[0].planned.settings for group in held.named(groups)}
        varied = {group: each[setting] for group, each in found.items() if setting in each and group not in levels}
        if not varied:
            raise RequestError(f"No group of study {study} sets {setting}.")
        first = next(iter(varied)).split(f"-{setting}-")[0]
        joined = dict.fromkeys(held.named(default), first) if default else {}
        varied |= default or {}
        is_number = all(isinstance(each, int | float) and not isinstance(each, bool) for each in varied.values())
        names = [] if is_number else list(dict.fromkeys(map(_short, varied.values())))
        series: dict[str, list[Point]] = {}
        for group, at in varied.items():
            x = float(at) if is_number else float(names.index(_short(at)))
            family = joined.get(group) or group.split(f"-{setting}-")[0]
            series.setdefault(family, []).append(self._point(held, group, metric, data, x))
        lines = [Line(family, sorted(points), "whiskers") for family, points in series.items()]
        for group in held.named(levels) if levels else ():
            lines.append(Line(group, [self._point(held, group, metric, data, 0.0)], "level"))
        xs = [point.x for points in series.values() for point in points]
        is_log = is_number and min(xs) > 0 and max(xs) / min(xs) > 10
        axis = Axis(label or setting.replace("_", " "), is_log, names)
        about = f"{info.label} on {data} over {axis.label}; bars are 95 % intervals over seeds and rows."
        return self._plot(held, f"{study}-{metric}-over-{setting}-{data}", about, lines, axis, _axis(info))

    def plot_differences(self, study: str, metric: str, data: str, groups: Sequence[str] = ()) -> str:
        """The difference of each group from the baseline, with its interval."""
        held, info = self._study(study), metric_info(metric)
        rows = tables.intervals(held, metric, data, held.named(groups))
        way = {"lower": "below zero is better", "higher": "above zero is better", None: ""}[info.better]
        about = (
            f"{info.label} on {data}, minus that of {held.baseline} ({way}); bars are 95 % intervals over seeds and "
        )
        about += "rows, and what is claimed is in color."
        stem = f"{study}-{metric}-differences-{data}"
        axis = Axis(f"{_axis(info).label}, minus {held.baseline}")
        return self._image(held, stem, about, forest(about, rows, axis))

    def plot_costs(self, study: str, metric: str, data: str, groups: Sequence[str] = ()) -> str:
        """A metric over the seconds of a run, a point for each group."""
        held, info, marks = self._study(study), metric_info(metric), {}
        for group in held.named(groups):
            row = tables.row_of(held, group, metric, data).metrics[metric]
            value, spread = row.value * info.scale, (row.deviation or 0.0) * info.scale
            point = Point(held.cost(group).seconds, value, value - spread, value + spread)
            marks[held.label(group)] = Mark(point, *held.span_of_seconds(group))
        better = {"lower": "further down and to the left", "higher": "further up and to the left", None: "to the left"}
        x = Axis("seconds of training of a run", log=True)
        about = f"{info.label} on {data} over {x.label}: {better[info.better]} is better. Bars are from the fastest to "
        about += (
            "the slowest seed, and one standard deviation between seeds to either side, which says nothing of the rows."
        )
        return self._image(held, f"{study}-{metric}-over-costs-{data}", about, scatter(about, marks, x, _axis(info)))

    def plot_history(
        self, study: str, metric: str, *, groups: Sequence[str] = (), by_time: bool = False, stem: str = ""
    ) -> str:
        """A logged metric, such as eval_kl_to_teacher, over steps or over seconds of training."""
        held, info, lines = self._study(study), logged_info(metric), []
        for group in held.named(groups):
            cost = held.cost(group)
            pace = cost.seconds / max(1, cost.steps) if by_time else 1.0
            points = [Point(x * pace, *(each * info.scale for each in y)) for x, *y in held.history(group, metric)]
            lines += [Line(group, points)] if points else []
        if not lines:
            raise RequestError(f"No run of study {study} logged {metric}.")
        axis = Axis("seconds of training" if by_time else "optimizer step")
        about = f"{info.label} over {axis.label}; bands are one standard deviation between seeds to either side."
        return self._plot(held, f"{study}-{stem or metric}-over-{axis.label}", about, lines, axis, _axis(info))

    def plot_bias(
        self, study: str, data: str, *, groups: Sequence[str] = (), by_step: bool = False, stem: str = "exposure-bias"
    ) -> str:
        """ExAccErr over lengths, with the students before training; or at the study's length over steps."""
        held = self._study(study)
        models = [*([] if by_step else held.study.started), *held.named(groups)]
        curves = [curve for model in models if (curve := held.bias(model, data, by_step=by_step))]
        if not curves:
            raise RequestError(f"Study {study} has no exposure bias on {data}.")
        x, y = Axis("optimizer step"), Axis("ExAccErr(l) (%)")
        if by_step:
            y = Axis(f"ExAccErr({curves[0].settings['length']}) (%)")
        else:
            x = Axis("length l (tokens)")
        about = f"{y.label.removesuffix(' (%)')} on {data.removesuffix(', exposure bias')} over {x.label}; "
        about += "bands are 95 % intervals over seeds and rows."
        lines = [Line(curve.model, points) for curve in curves if (points := _points(curve))]
        return self._plot(held, f"{study}-{stem}{'-over-steps' if by_step else ''}", about, lines, x, y)

    def not_run(self) -> str:
        """The planned runs of which there are no records yet, with their cost."""
        lines = ["| what | runs | steps of each | about |", "| --- | ---: | ---: | ---: |"]
        for each in yaml.safe_load((HERE / "planned.yaml").read_text(encoding="utf-8")):
            held = self._study(each["study"]) if self.has(each["study"]) else None
            if left := each["runs"] if held is None else held.planned - len(held.study.runs):
                hours = f"{left * each['minutes'] / 60:.1f} h"
                lines.append(f"| {each['what']} | {left} | {each['steps']} | {hours} |")
        return "\n".join(lines) if len(lines) > 2 else "Everything that was planned has been run."

    def _study(self, name: str) -> Committed:
        if name not in self._studies and not self.has(name):
            raise RequestError(f"The page asks for study {name}, of which {self._records} has no records.")
        if name not in self._studies:
            self._studies[name] = committed(self._records / name)
        return self._studies[name]

    def _point(self, study: Committed, group: str, metric: str, data: str, x: float) -> Point:
        own, scale = tables.row_of(study, group, metric, data).metrics[metric], metric_info(metric).scale
        low, high = (own.value if end is None else end for end in (own.low, own.high))
        return Point(x, own.value * scale, low * scale, high * scale)

    def _plot(self, study: Committed, stem: str, about: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
        return self._image(study, stem, about, chart(about, lines, x, y))

    def _image(self, study: Committed, stem: str, about: str, image: str) -> str:
        file = f"{'-'.join(stem.lower().replace(',', ' ').replace('_', ' ').split())}.svg"
        if file in self.plots:
            raise RequestError(f"The page draws {file} twice. Give one of them another `stem`.")
        self.plots[file] = image
        return self._with_source(study, f"![{about}]({PLOTS}/{file})\n\n{about}")

    def _with_source(self, study: Committed, made: str) -> str:
        """The command that makes it, and what it took."""
        file = Path("benchmarks/evidence/studies") / f"{study.name}.yaml"
        file = file if (ROOT / file).is_file() else Path("benchmarks/evidence/records") / study.name / "config.yaml"
        trained, measured = map(duration, study.seconds())
        runs = f"{len(study.study.runs)} of {study.planned} runs"
        collected = f"python -m benchmarks.evidence collect runs/evidence/{study.name}"
        took = f"{runs}: {trained} of training, {measured} of measuring"
        return f"{made}\n\n`promptkd study {file}` ({took}), then `{collected}`."


def build(records: Path, template: Path = HERE / "page.md") -> dict[PurePath, str]:
    """By its path in docs/, the text of the page and of every plot."""
    page = Page(records)
    text = _rendered(page, template)
    return {PurePath("evidence.md"): text} | {PurePath(PLOTS, file): made for file, made in page.plots.items()}


def build_readme(records: Path, readme: str, template: Path = HERE / "readme.md") -> str:
    """The README's text with the main result between its two marks, as the records have it."""
    before, begun, rest = readme.partition(f"{BEGIN}\n")
    _, ended, after = rest.partition(f"{END}\n")
    if not begun or not ended:
        raise RequestError(f"The README needs the lines {BEGIN} and {END}, between which the main result stands.")
    return f"{before}{begun}{_rendered(Page(records), template)}{ended}{after}"


def _rendered(page: Page, template: Path) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    asked: dict[str, Any] = {name: getattr(page, name) for name in dir(page) if name[0] != "_" and name != "plots"}
    return environment.from_string(template.read_text(encoding="utf-8")).render(asked)


def _axis(info: Any) -> Axis:
    return Axis(f"{info.label} ({info.unit})" if info.unit else info.label)


def _short(value: Any) -> str:
    """The last part of a path; of a file its name alone."""
    return PurePath(str(value)).name


def _points(curve: Curve) -> list[Point]:
    """Those with a value; its ends are the value where there is no interval."""
    found = [(p.x, p.value, p.low, p.high) for p in curve.points if p.value is not None]
    return [Point(x, y, y if low is None else low, y if high is None else high) for x, y, low, high in found]
