"""What a study leaves: the methods compared over their seeds, and one page over all runs."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from promptkd.cli.options.study import Options
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_runs import StudyRun
from promptkd.cli.terminal import say
from promptkd.errors import RequestError
from promptkd.evaluation.comparison import Comparison, compare
from promptkd.evaluation.pairing import Candidate
from promptkd.io.atomic import write_atomic
from promptkd.report import render_report, terminal_table
from promptkd.report.differences import compared_sentences
from promptkd.report.metrics import metric_info
from promptkd.results import Results, Training
from promptkd.study.pooling import Member, compare_groups


def compare_and_report(options: Options, runs: Sequence[StudyRun]) -> None:
    """Compare the finished runs, write the record and the page, and print the table."""
    if not runs:
        return
    records = _records(runs)
    page = options.out / "report.html"
    made = _comparison(options, runs)
    if made is not None:
        made.write(options.out / "comparison.json")
        print(terminal_table([made]))
    write_atomic(page, render_report([*([made] if made else []), *records], title=f"Study {options.out.name}"))
    say(f"The page is {page}.")


def _records(runs: Sequence[StudyRun]) -> list[Results]:
    """What each run trained and how. What it measured is pooled in the comparison; its answers are on its own page."""
    records = [Results.read(run.folder / "results.json") for run in runs]
    return [record.model_copy(update={"evaluations": []}) for record in records]


def _comparison(options: Options, runs: Sequence[StudyRun]) -> Results | None:
    """The record of the comparison; None, with a sentence, if there is nothing to compare."""
    try:
        comparison = _compared(options, runs)
    except RequestError as error:
        say(f"The methods were not compared: {error}")
        return None
    results = Results(
        kind="study" if len({run.planned.seed for run in runs}) > 1 else "compare",
        config=merged_config(options, {}),
        training=_costs(runs),
        data=comparison.data,
        evaluations=comparison.evaluations,
        differences=comparison.differences,
    )
    results.notes = [*compared_sentences(results), *comparison.notes]
    return results


def _compared(options: Options, runs: Sequence[StudyRun]) -> Comparison:
    groups = list(dict.fromkeys(run.planned.group for run in runs))
    baseline = options.baseline or groups[0]
    if baseline not in groups:
        raise RequestError(f"no run of the baseline, {baseline}, is done.")
    several = len({run.planned.seed for run in runs}) > 1
    members = [
        Member(run.planned.group, run.planned.seed, _candidate(run, run.planned.name if several else run.planned.group))
        for run in runs
    ]
    better = lambda name: metric_info(name).better  # noqa: E731
    if several:
        return compare_groups(members, better, baseline=baseline, metrics=options.metrics)
    return compare([each.candidate for each in members], better, baseline=baseline, metrics=options.metrics)


def _candidate(run: StudyRun, label: str) -> Candidate:
    record = Results.read(run.results)
    if not record.evaluations:
        raise RequestError("the runs hold no measurement. Give `eval_data` in `base`, or `evaluate` with its data.")
    return Candidate(label, record, record.evaluations[0].model)


def _costs(runs: Sequence[StudyRun]) -> dict[str, Training]:
    """What a run of each group cost: means over its seeds, and the most memory."""
    groups: dict[str, list[Training]] = {}
    for run in runs:
        record = Results.read(run.folder / "results.json")
        groups.setdefault(run.planned.group, []).extend(record.training.values())
    return {group: _mean_cost(costs) for group, costs in groups.items()}


def _mean_cost(costs: list[Training]) -> Training:
    speeds = [each.tokens_per_second for each in costs if each.tokens_per_second is not None]
    settings: dict[str, Any] = {
        "method": costs[0].method,
        "steps": round(mean(each.steps for each in costs)),
        "seconds": mean(each.seconds for each in costs),
        "peak_memory_bytes": max(each.peak_memory_bytes for each in costs),
        "peak_memory_by_phase": _largest_peaks(costs),
        "tokens_per_second": median(speeds) if speeds else None,
    }
    return Training(**settings)


def _largest_peaks(costs: list[Training]) -> dict[str, int]:
    """By phase."""
    peaks: dict[str, int] = {}
    for each in costs:
        for phase, size in each.peak_memory_by_phase.items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return peaks
