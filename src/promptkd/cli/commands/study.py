"""`promptkd study`."""

import os
from typing import Any

import torch

from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import write_config
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_outcome import compare_and_report
from promptkd.cli.study_plan import plan_text
from promptkd.cli.study_runs import StudyRun, checked_runs
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.errors import PromptKDError, RequestError
from promptkd.io.lock import locked
from promptkd.study.local import LocalPool, cores, shares
from promptkd.study.loop import Engine, Outcome, StoppedError, carry_out
from promptkd.study.processes import shell_line
from promptkd.study.progress import last_words
from promptkd.study.ray_cluster import RayCluster
from promptkd.study.table import Table


def run(options: Options, training: dict[str, Any]) -> None:
    _check(options)
    quiet_libraries()
    runs = checked_runs(options)
    if options.dry_run:
        print(plan_text(runs, options.workers))
        return
    _carry_out(options, runs)


def _check(options: Options) -> None:
    if options.engine == "ray" and options.workers != 1:
        raise RequestError(
            "--workers is of this machine; on a Ray cluster --cpus-per-run and --gpus-per-run say what fits."
        )
    if options.engine == "local" and options.ray_address is not None:
        raise RequestError("--ray-address goes with --engine ray.")


def _carry_out(options: Options, runs: list[StudyRun]) -> None:
    cluster = _cluster(options) if options.engine == "ray" else None
    with locked(options.out, folder=True) as lock:
        config = {k: v for k, v in merged_config(options, {}).items() if k not in ("config", "dry_run")}
        write_config(options.out / "config.yaml", config)
        jobs = [each.job for each in runs if each.job.commands]
        if finished := len(runs) - len(jobs):
            say(f"{finished} of {len(runs)} runs are done already.")
        outcome = carry_out(jobs, cluster or _pool(options, lock), Table([each.row for each in runs]))
        if outcome.signal is None:
            compare_and_report(options, [each for each in runs if not outcome.statuses.get(each.job.name, 0)])
    _conclude(options, runs, outcome)


def _cluster(options: Options) -> Engine:
    return RayCluster(options.ray_address, cpus=options.cpus_per_run, gpus=options.gpus_per_run)


def _pool(options: Options, lock: int) -> Engine:
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(index) for index in range(torch.cuda.device_count())]
    return LocalPool(shares(options.workers, cores(), gpus, os.environ), keep_open=[lock])


def _conclude(options: Options, runs: list[StudyRun], outcome: Outcome) -> None:
    """Raise what the study ends with, if any run is not done."""
    again = shell_line(["study", str(options.out / "config.yaml")])
    if outcome.signal is not None:
        left = sum(bool(each.job.commands) and outcome.statuses.get(each.job.name) != 0 for each in runs)
        raise StoppedError(f"Stopped. {left} of {len(runs)} runs are left. Resume by: {again}", outcome.signal)
    failed = [each.job for each in runs if outcome.statuses.get(each.job.name, 0)]
    if failed:
        lines = [
            f"\n  - {job.name} (status {outcome.statuses[job.name]}), see {job.log}: {last_words(job.log)}"
            for job in failed
        ]
        raise PromptKDError(f"{len(failed)} of {len(runs)} runs failed:{''.join(lines)}\nTry them again by: {again}")
