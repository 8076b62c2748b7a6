"""`promptkd study`."""

import os
import sys
from collections.abc import Sequence
from statistics import mean, median
from typing import Any, Literal

import torch

from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import write_config
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_runs import StudyRun, checked_runs, plan_text
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.pairing import Candidate
from promptkd.io.atomic import write_atomic
from promptkd.io.lock import locked
from promptkd.report import render_report, terminal_table
from promptkd.report.differences import compared_sentences
from promptkd.report.metrics import metric_info
from promptkd.results import Results, Training
from promptkd.study.loop import carry_out
from promptkd.study.pooling import compare_groups
from promptkd.study.processes import LocalPool, Phase, RayCluster, shares, shell_line


def run(options: Options, training: dict[str, Any]) -> None:
    if options.engine == "ray" and options.workers != 1:
        advice = "on a Ray cluster --cpus-per-run and --gpus-per-run say what fits"
        raise RequestError(f"--workers is of this machine; {advice}.")
    if options.engine == "local" and options.ray_address is not None:
        raise RequestError("--ray-address goes with --engine ray.")
    quiet_libraries()
    runs = checked_runs(options)
    if options.dry_run:
        print(plan_text(runs, options.workers))
        return
    cluster = None
    if options.engine == "ray":
        cluster = RayCluster(options.ray_address, cpus=options.cpus_per_run, gpus=options.gpus_per_run)
    with locked(options.out, folder=True) as lock:
        config = {k: v for k, v in merged_config(options, {}).items() if k not in ("config", "dry_run")}
        write_config(options.out / "config.yaml", config)
        if finished := sum(not each.job.commands for each in runs):
            say(f"{finished} of {len(runs)} runs are done already.")
        signal = carry_out([each.job for each in runs], cluster or _local_pool(options.workers, lock))
        if signal is None:
            compare_and_report(options, [each for each in runs if each.job.phase is Phase.DONE])
    again = shell_line(["study", str(options.out / "config.yaml")])
    if signal is not None:
        left = sum(each.job.phase is not Phase.DONE for each in runs)
        stopped = PromptKDError(f"Stopped. {left} of {len(runs)} runs are left. Resume by: {again}")
        stopped.exit_status = 128 + signal
        raise stopped
    if failed := [each.job for each in runs if each.job.phase is Phase.FAILED]:
        lines = [f"\n  - {job.name} (status {job.status}), see {job.log}: {job.last_words()}" for job in failed]
        raise PromptKDError(f"{len(failed)} of {len(runs)} runs failed:{''.join(lines)}\nTry them again by: {again}")


def _local_pool(workers: int, lock: int) -> LocalPool:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(index) for index in range(torch.cuda.device_count())]
    return LocalPool(shares(workers, cores, gpus, os.environ), keep_open=[lock])


def compare_and_report(options: Options, runs: Sequence[StudyRun]) -> None:
    """Compare the finished runs, write the record and the page, and print the table."""
    if not runs:
        return
    trained = [Results.read(run.job.folder / "results.json") for run in runs]
    # what a run measured is pooled in the comparison; its answers are on its own page
    records, page = [each.model_copy(update={"evaluations": []}) for each in trained], options.out / "report.html"
    try:
        comparison = _comparison(options, runs, trained)
    except RequestError as error:
        say(f"The methods were not compared: {error}")
    else:
        comparison.write(options.out / "comparison.json")
        print(terminal_table([comparison]))
        records = [comparison, *records]
    write_atomic(page, render_report(records, title=f"Study {options.out.name}"))
    say(f"The page is {page}.")


def _comparison(options: Options, runs: Sequence[StudyRun], trained: Sequence[Results]) -> Results:
    """The record of the comparison. Raises `RequestError` if there is nothing to compare."""
    baseline = options.baseline or runs[0].planned.group
    if baseline not in {run.planned.group for run in runs}:
        raise RequestError(f"no run of the baseline, {baseline}, is done.")
    several = len({run.planned.seed for run in runs}) > 1
    by_group: dict[str, dict[int, Candidate]] = {}
    for planned, record in ((run.planned, Results.read(run.results)) for run in runs):
        if not record.evaluations:
            raise RequestError("the runs hold no measurement. Give `eval_data` in `base`, or `evaluate` with its data.")
        candidate = Candidate(planned.name if several else planned.group, record, record.evaluations[0].model)
        by_group.setdefault(planned.group, {})[planned.seed] = candidate
    how: Any = {"better": lambda metric: metric_info(metric).better, "baseline": baseline, "metrics": options.metrics}
    every = [candidate for seeds in by_group.values() for candidate in seeds.values()]
    comparison = compare_groups(by_group, **how) if several else compare(every, **how)
    costs: dict[str, list[Training]] = {}
    for run, record in zip(runs, trained, strict=True):
        costs.setdefault(run.planned.group, []).extend(record.training.values())
    kind: Literal["study", "compare"] = "study" if several else "compare"
    results = Results(kind=kind, config=merged_config(options, {}), data=comparison.data)
    results.training = {group: _mean_cost(of_group) for group, of_group in costs.items()}
    results.evaluations, results.differences = comparison.evaluations, comparison.differences
    results.notes = [*compared_sentences(results), *comparison.notes]
    return results


def _mean_cost(costs: list[Training]) -> Training:
    """What a run of a group cost: means over its seeds, and the most memory."""
    speeds = [each.tokens_per_second for each in costs if each.tokens_per_second is not None]
    phases = dict.fromkeys(phase for each in costs for phase in each.peak_memory_by_phase)
    return Training(
        method=costs[0].method,
        steps=round(mean(each.steps for each in costs)),
        seconds=mean(each.seconds for each in costs),
        peak_memory_bytes=max(each.peak_memory_bytes for each in costs),
        peak_memory_by_phase={name: max(each.peak_memory_by_phase.get(name, 0) for each in costs) for name in phases},
        tokens_per_second=median(speeds) if speeds else None,
    )
