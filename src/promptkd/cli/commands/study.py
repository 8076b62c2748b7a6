"""`promptkd study`."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import write_config
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_comparison import (
    Finished,
    Study,
    exposure_of,
    is_study,
    page_records,
    references_in,
    started_in,
)
from promptkd.cli.study_disk import delete_models
from promptkd.cli.study_runs import StudyRun, checked_runs, notes_on, plan_text
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.errors import PromptKDError, RequestError
from promptkd.io.atomic import write_atomic
from promptkd.io.lock import locked
from promptkd.report import render_report, terminal_table
from promptkd.results import Results
from promptkd.study.loop import carry_out
from promptkd.study.processes import Job, LocalPool, Phase, RayCluster, shares, shell_line


def run(options: Options, training: dict[str, Any]) -> None:
    if options.engine == "ray" and options.workers != 1:
        advice = "on a Ray cluster --cpus-per-run and --gpus-per-run say what fits"
        raise RequestError(f"--workers is of this machine; {advice}.")
    if options.engine == "local" and options.ray_address is not None:
        raise RequestError("--ray-address goes with --engine ray.")
    kept = options.out / "config.yaml"
    if kept.is_file() and not (is_study(options.out) or kept.samefile(options.config)):
        raise RequestError(f"--out must be a study's folder, or a new one. {kept} is no study's. Give another --out.")
    quiet_libraries()
    runs, references = checked_runs(options)
    if options.dry_run:
        print(plan_text(runs, references, options.workers, keep_models=options.keep_models))
        return
    cluster = None
    if options.engine == "ray":
        cluster = RayCluster(options.ray_address, cpus=options.cpus_per_run, gpus=options.gpus_per_run)
    with locked(options.out, folder=True) as lock:
        config = {k: v for k, v in merged_config(options, {}).items() if k not in ("config", "dry_run")}
        write_config(options.out / "config.yaml", config)
        for note in notes_on(runs):
            say(note)
        if finished := sum(not each.job.commands for each in runs):
            say(f"{finished} of {len(runs)} runs are done already.")
        # references first: what is wrong with a measurement shows before hours of training
        jobs, of_runs = [*references, *(each.job for each in runs)], {each.job.name for each in runs}

        def clear(job: Job) -> str:
            return "" if options.keep_models or job.name not in of_runs else delete_models(job.folder)

        for told in (clear(job) for job in jobs if job.phase is Phase.DONE):
            if told:
                say(told)
        signal = carry_out(jobs, cluster or _local_pool(options.workers, lock), on_done=clear)
        if signal is None:
            compare_and_report(options, [each for each in runs if each.job.phase is Phase.DONE])
    again = shell_line(["study", str(options.out / "config.yaml")])
    if signal is not None:
        left = sum(each.job.phase is not Phase.DONE for each in runs)
        told = f"Stopped. {left} of {len(runs)} runs are left. Resume by: {again}"
        if left < len(runs):
            page = shell_line(["report", str(options.out), "--out", f"{options.out.name}.html"])
            told += f"\nThe finished runs are compared by: {page}"
        stopped = PromptKDError(told)
        stopped.exit_status = 128 + signal
        raise stopped
    if failed := [job for job in jobs if job.phase is Phase.FAILED]:
        lines = [f"\n  - {job.name} (status {job.status}), see {job.log}: {job.last_words()}" for job in failed]
        own = sum(job not in references for job in failed)
        besides = " (and models beside them could not be measured)" if own < len(failed) else ""
        told = f"{own} of {len(runs)} runs failed{besides}:{''.join(lines)}"
        raise PromptKDError(f"{told}\nTry them again by: {again}")


def _local_pool(workers: int, lock: int) -> LocalPool:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(index) for index in range(torch.cuda.device_count())]
    return LocalPool(shares(workers, cores, gpus, os.environ), keep_open=[lock])


def compare_and_report(options: Options, runs: Sequence[StudyRun]) -> None:
    """Compare the finished runs, write the record and the page, and print the table."""
    if not runs:
        return
    finished = [
        Finished(
            run.planned,
            Results.read(run.job.folder / "results.json"),
            Results.read(run.results),
            exposure_of(options.out, run.planned.name),
        )
        for run in runs
    ]
    study = Study(options, finished, references_in(options.out), started_in(options.out))
    records, told = page_records(study)
    if told:
        say(told)
    else:
        records[0].write(options.out / "comparison.json")
        print(terminal_table(records[:1]))
    page = options.out / "report.html"
    write_atomic(page, render_report(records, title=f"Study {options.out.name}"))
    say(f"The page is {page}.")
