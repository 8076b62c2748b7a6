"""Tables of a study in Markdown: groups of runs by metrics, what they cost, and what it takes to reach a value."""

from collections.abc import Sequence
from functools import cache
from statistics import mean

from benchmarks.evidence.records import MOST_STEPS
from benchmarks.evidence.studies import Committed
from benchmarks.evidence.svg import Interval
from promptkd.errors import RequestError
from promptkd.report.differences import DifferenceRow, difference_table
from promptkd.report.formatting import DASH, duration, listed, number, probability
from promptkd.report.metrics import logged_info, metric_info
from promptkd.report.tables import ComparisonRow, comparison_table
from promptkd.training.collapse import findings

_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_BASELINE = "baseline"
CHOOSING = ("kl_to_teacher", "loss")  # by which a setting is chosen on validation rows
NEAR = 0.005  # nats: less between two values of the KL is no reason to choose one


def row_of(study: Committed, group: str, metric: str, data: str) -> ComparisonRow:
    """What was measured of a group, or of the teacher or the untrained student, with its cells as text."""
    rows = {row.model: row for row in rows_on(study, data, [metric])}
    if group not in rows:
        raise RequestError(f"On {data} study {study.name} has {', '.join(rows)}. Got {group}.")
    if metric not in rows[group].cells:
        raise RequestError(f"On {data} {group} of study {study.name} has no {metric}.")
    return rows[group]


def rows_on(study: Committed, data: str, metrics: Sequence[str]) -> list[ComparisonRow]:
    """What was measured on one data set, which has the decoding in its name where it was decoded in two ways."""
    rows = _rows(study, tuple(metrics))
    if not (found := [row for row in rows if row.data == data]):
        known = "; ".join(dict.fromkeys(row.data for row in rows))
        raise RequestError(f"Study {study.name} was measured on {known}. Got {data}.")
    return found


@cache
def _rows(study: Committed, metrics: tuple[str, ...]) -> list[ComparisonRow]:
    return comparison_table([study.shown(metrics)])


def leaders(study: Committed, metric: str, data: str) -> list[str]:
    """The best group and those not told apart from it, as promptkd's report marks them; empty where all are tied."""
    return [row.model for row in rows_on(study, data, [metric]) if metric in row.cells and row.cells[metric].best]


def difference_text(study: Committed, group: str, metric: str, data: str, less: str = "") -> str:
    """ "+0.7 [−1.7, 2.9], p 0.410", and "better" or "worse" before it where the difference is claimed.

    It is that from the group `less`, by default the study's baseline.
    """
    if group == (less or study.baseline):
        return _BASELINE
    if (row := _differences(study, less).get((group, metric, data))) is None:
        return DASH  # the study does not test the metric, or not there
    claimed = f"**{row.verdict}** " if row.change else ""
    interval = f" {row.interval}" if row.interval else ""
    return f"{claimed}{row.value}{interval}, p {probability(row.source.p_adjusted)}"


def raw_p_text(study: Committed, group: str, metric: str, data: str) -> str:
    """The p of a difference from the study's baseline, adjusted over none."""
    return probability(_differences(study)[group, metric, data].source.p_value)


def by_seed_text(study: Committed, group: str, metric: str, data: str) -> str:
    """The differences from the baseline under each seed, in their order, with a decimal more than the metric has."""
    info = metric_info(metric)
    own, others = (_by_seed(study, each, metric, data) for each in (group, study.baseline))
    found = [(own[seed] - others[seed]) * info.scale for seed in sorted(own.keys() & others.keys())]
    return listed([number(each, info.decimals + 1, signed=True) for each in found])


def _by_seed(study: Committed, group: str, metric: str, data: str) -> dict[int, float]:
    wanted, _, decoding = data.partition(", ")
    return {
        run.planned.seed: each.metrics[metric].value
        for run in study.runs(group)
        for each in run.measured.evaluations
        if each.data == wanted and decoding in ("", "sampled" if each.decoding.get("seeds") else "greedy")
    }


def half_width_text(study: Committed, group: str, metric: str, data: str, less: str = "", times: float = 1.0) -> str:
    """Half the width of the interval of a difference, in the metric's own unit, so many times."""
    row, info = _differences(study, less).get((group, metric, data)), metric_info(metric)
    if row is None or (ends := row.source.difference).low is None or ends.high is None:
        raise RequestError(f"Study {study.name} has no interval of the difference of {group} in {metric} on {data}.")
    return number((ends.high - ends.low) / 2 * info.scale * times, info.decimals)


def intervals(study: Committed, metric: str, data: str, groups: Sequence[str]) -> list[Interval]:
    """The differences of groups from the baseline in a metric, in its unit; untested ones are left out."""
    found, info = [], metric_info(metric)
    for group in groups:
        if (row := _differences(study).get((group, metric, data))) is not None:
            own = row.source.difference
            ends = [own.value if end is None else end for end in (own.low, own.value, own.high)]
            low, value, high = (end * info.scale for end in ends)
            found.append(Interval(study.label(group), value, low, high, bool(row.change)))
    if not found:
        raise RequestError(f"Study {study.name} tests no difference in {metric} on {data}.")
    return found


@cache
def _differences(study: Committed, baseline: str = "") -> dict[tuple[str, str, str], DifferenceRow]:
    """From the baseline, by group, metric and data set."""
    rows = difference_table([study.tested(baseline)])
    return {(row.pair.model, row.source.metric, row.pair.data): row for row in rows}


def metrics_table(study: Committed, data: str, groups: Sequence[str], metrics: Sequence[str]) -> str:
    """A line per group; by metric its value, interval and ±, and its difference from the baseline.

    A metric that was not measured there, such as the KL on greedy answers, has no column.
    """
    rows = {row.model: row for row in rows_on(study, data, metrics)}
    shown = [name for name in metrics if any(name in row.cells for row in rows.values())]
    tested = {name for name in shown for group in groups if (group, name, data) in _differences(study)}
    heads = ["", "seeds"]
    for name in shown:
        info = metric_info(name)
        unit = f", {info.unit}" if info.unit else ""
        heads += [f"{info.label}{unit}{_ARROWS[info.better]}"]
        heads += [f"vs {study.baseline}"] if name in tested else []
    lines = []
    references = [each.label for each in study.study.references if each.label in rows]
    for group in [*references, *groups]:
        own = group in study.groups
        cells = [study.label(group) if own else group, str(len(study.runs(group))) if own else DASH]
        for name in shown:
            cells.append(_cell(rows[group], name))
            cells += [difference_text(study, group, name, data) if own else DASH] if name in tested else []
        lines.append(cells)
    return _markdown(heads, lines)


def _cell(row: ComparisonRow, metric: str) -> str:
    if (cell := row.cells.get(metric)) is None:
        return DASH
    return " ".join(filter(None, [f"**{cell.value}**" if cell.best else cell.value, cell.interval, cell.deviation]))


def chosen(study: Committed, setting: str, data: str) -> dict[str, float]:
    """By method, the value of a setting with the lowest KL; of those within `NEAR` of it, that with the lowest loss.

    Where the KL is to a teacher of the method's own, and so not compared, by the loss alone.
    """
    found = {}
    for method, groups in study.by_method(setting).items():
        kl, loss = (
            {value: _mean(study, group, metric, data) for value, group in groups.items()} for metric in CHOOSING
        )
        held = [each for each in kl.values() if each is not None]
        near = [value for value in groups if not held or kl[value] <= min(held) + NEAR]
        found[method] = min(near, key=loss.__getitem__)
    return found


def choices_table(study: Committed, setting: str, data: str) -> str:
    """A line per method, with KL and loss of each value of a setting; what is `chosen` in bold."""
    methods, best = study.by_method(setting), chosen(study, setting, data)
    values = sorted({value for groups in methods.values() for value in groups})
    lines = []
    for method, groups in methods.items():
        cells = [
            " / ".join(
                DASH if (mean := _mean(study, groups[value], metric, data)) is None else number(mean, 3)
                for metric in CHOOSING
            )
            for value in values
        ]
        lines.append(
            [method, *(f"**{cell}**" if at == best[method] else cell for at, cell in zip(values, cells, strict=True))]
        )
    return _markdown(["", *(f"{value:g}" for value in values)], lines)


def _mean(study: Committed, group: str, metric: str, data: str) -> float | None:
    rows = {row.model: row for row in rows_on(study, data, CHOOSING)}
    return rows[group].metrics[metric].value if metric in rows[group].metrics else None


def costs_table(study: Committed, groups: Sequence[str]) -> str:
    """What a run of each group took: means over seeds, and the most memory; and how many numbers of the teacher it
    trained, where several groups trained any.
    """
    heads = ["", "steps", "time", "seconds per step", "tokens per second", "peak memory"]
    trained = {group: _trained_numbers(study, group) for group in groups}
    heads += ["trained in the teacher"] if (is_shown := sum(each > 0 for each in trained.values()) > 1) else []
    lines = []
    for group in groups:
        cost = study.cost(group)
        speed = DASH if cost.tokens_per_second is None else number(cost.tokens_per_second, 0)
        memory = f"{cost.peak_memory_bytes / 2**30:.1f} GiB"
        pace = number(cost.seconds / max(1, cost.steps), 2)
        cells = [study.label(group), f"{cost.steps:,}", duration(cost.seconds), pace, speed, memory]
        lines.append([*cells, *([f"{trained[group]:,}" if trained[group] else DASH] if is_shown else [])])
    return _markdown(heads, lines)


def _trained_numbers(study: Committed, group: str) -> int:
    """Trainable numbers in the teacher, 0 without any."""
    held = study.runs(group)[0].trained.metrics.get("teacher_trained_numbers")
    return 0 if held is None else round(held.value)


def log_table(study: Committed, groups: Sequence[str], metrics: Sequence[str], count: int) -> str:
    """What training logged: each metric as a mean over the first and over the last `count` steps; and its warnings.

    Raises `RequestError` for runs of more steps than records keep.
    """
    infos = [logged_info(metric) for metric in metrics]
    heads = [f"{info.label}{f', {info.unit}' if info.unit else ''}" for info in infos]
    lines = []
    for group in groups:
        cells = [ends_text(study, group, metric, count) for metric in metrics]
        lines.append([study.label(group), *cells, _warnings(study, group)])
    return _markdown(["", *heads, "warnings"], lines)


def ends_text(study: Committed, group: str, metric: str, count: int) -> str:
    """ "3.1 → 1.8": a logged metric as a mean over the first and over the last `count` steps; see `log_table`."""
    if (steps := study.cost(group).steps) > MOST_STEPS:
        raise RequestError(f"Records keep {MOST_STEPS} steps of a run's log. {group} has {steps}.")
    info = logged_info(metric)
    values = [point.value * info.scale for point in study.history(group, info.name)]
    ends = [mean(values[:count]), mean(values[-count:])] if values else []
    decimals = 0 if info.unit == "%" else info.decimals
    return " → ".join(number(each, decimals) for each in ends) or DASH


def _warnings(study: Committed, group: str) -> str:
    """By kind, under how many seeds it came and the first step at which it did."""
    found: dict[str, dict[int, int]] = {}
    runs = study.runs(group)
    for run in runs:
        lines = (point for series in run.trained.history for point in series.points)
        for each in findings(lines):
            found.setdefault(each.kind, {}).setdefault(run.planned.seed, each.step)
    told = [
        f"{kind} ({len(steps)} of {len(runs)} seeds, from step {min(steps.values())})" for kind, steps in found.items()
    ]
    return ", ".join(told) or "none"


def pairs_table(studies: Sequence[Committed]) -> str:
    """A line per study: teacher and student before training by the beginning of their SHA-256, and what it ran on."""
    heads = ["study", "teacher", "student before training", "training computed in", "processor", "torch"]
    lines = []
    for study in studies:
        held = study.study
        trained = held.runs[0].trained
        starts = [each.record.models[each.model] for each in held.references if each.model == "student"]
        computed = "bfloat16" if trained.config.get("bf16") else "float32"
        shown = [trained.models["teacher"].sha256[:8], starts[0].sha256[:8] if starts else DASH, computed]
        lines.append(
            [study.name, *shown, trained.machine.get("processor") or DASH, str(trained.code["torch"]).partition("+")[0]]
        )
    return _markdown(heads, lines)


def reached_table(study: Committed, metric: str, target: float, groups: Sequence[str]) -> str:
    """Steps, seconds and tokens until the mean over seeds of a logged metric is at most `target`, between two logs."""
    info = logged_info(metric)
    heads = ["", f"steps to {info.label} {target:g}", "time", "tokens", "peak memory", "its lowest"]
    lines = []
    for group in groups:
        points, cost = study.history(group, metric), study.cost(group)
        if not points:
            raise RequestError(f"No run of {group} in study {study.name} logged {metric}.")
        lowest = number(min(point.value for point in points) * info.scale, info.decimals)
        steps = _first_at_most(target, [(point.x, point.value * info.scale) for point in points])
        memory = f"{cost.peak_memory_bytes / 2**30:.1f} GiB"
        if steps is None:
            lines.append([study.label(group), "not reached", DASH, DASH, memory, lowest])
            continue
        seconds = cost.seconds / max(1, cost.steps) * steps
        tokens = DASH if cost.tokens_per_second is None else f"{round(cost.tokens_per_second * seconds, -3):,.0f}"
        lines.append([study.label(group), number(steps, 0), duration(seconds), tokens, memory, lowest])
    return _markdown(heads, lines)


def _first_at_most(target: float, points: Sequence[tuple[float, float]]) -> float | None:
    """Where the line through the points first is at most `target`."""
    for at, (x, y) in enumerate(points):
        if y <= target:
            before_x, before_y = points[max(0, at - 1)]
            return x if before_y <= target else before_x + (x - before_x) * (before_y - target) / (before_y - y)
    return None


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """With numbers aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
