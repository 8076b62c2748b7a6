"""What a study leaves: the methods compared over their seeds, and one page over all runs."""

from collections.abc import Sequence
from statistics import mean, median

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
    trained = [Results.read(run.folder / "results.json") for run in runs]
    made = []
    try:
        made.append(_comparison(options, runs, trained))
    except RequestError as error:
        say(f"The methods were not compared: {error}")
    for results in made:
        results.write(options.out / "comparison.json")
        print(terminal_table([results]))
    # what a run measured is pooled in the comparison; its answers are on its own page
    records = [record.model_copy(update={"evaluations": []}) for record in trained]
    page = options.out / "report.html"
    write_atomic(page, render_report([*made, *records], title=f"Study {options.out.name}"))
    say(f"The page is {page}.")


def _comparison(options: Options, runs: Sequence[StudyRun], trained: Sequence[Results]) -> Results:
    """The record of the comparison. Raises `RequestError` if there is nothing to compare."""
    comparison = _compared(options, runs)
    costs: dict[str, list[Training]] = {}
    for run, record in zip(runs, trained, strict=True):
        costs.setdefault(run.planned.group, []).extend(record.training.values())
    results = Results(
        kind="study" if len({run.planned.seed for run in runs}) > 1 else "compare",
        config=merged_config(options, {}),
        training={group: _mean_cost(of_group) for group, of_group in costs.items()},
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


def _mean_cost(costs: list[Training]) -> Training:
    """What a run of a group cost: means over its seeds, and the most memory."""
    speeds = [each.tokens_per_second for each in costs if each.tokens_per_second is not None]
    phases = dict.fromkeys(phase for each in costs for phase in each.peak_memory_by_phase)
    return Training(
        method=costs[0].method,
        steps=round(mean(each.steps for each in costs)),
        seconds=mean(each.seconds for each in costs),
        peak_memory_bytes=max(each.peak_memory_bytes for each in costs),
        peak_memory_by_phase={
            phase: max(each.peak_memory_by_phase.get(phase, 0) for each in costs) for phase in phases
        },
        tokens_per_second=median(speeds) if speeds else None,
    )
