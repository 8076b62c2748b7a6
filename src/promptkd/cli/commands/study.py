"""`promptkd study`."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from promptkd.cli.library_logging import quiet_libraries
from promptkd.cli.options.study import Options
from promptkd.cli.parsing.config_file import write_config
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.study_outcome import compare_and_report
from promptkd.cli.study_runs import StudyRun, checked_runs
from promptkd.cli.terminal import say
from promptkd.errors import PromptKDError, RequestError
from promptkd.io.lock import locked
from promptkd.report.terminal import text_table
from promptkd.study.loop import carry_out, clock
from promptkd.study.plan import Planned
from promptkd.study.processes import LocalPool, Phase, shares, shell_line
from promptkd.study.ray_cluster import RayCluster


def run(options: Options, training: dict[str, Any]) -> None:
    if options.engine == "ray" and options.workers != 1:
        raise RequestError(
            "--workers is of this machine; on a Ray cluster --cpus-per-run and --gpus-per-run say what fits."
        )
    if options.engine == "local" and options.ray_address is not None:
        raise RequestError("--ray-address goes with --engine ray.")
    quiet_libraries()
    runs = checked_runs(options)
    if options.dry_run:
        print(_plan_text(runs, options.workers))
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


def _plan_text(runs: Sequence[StudyRun], workers: int) -> str:
    """A line per run, the sum, and the commands of what is not done, to be copied."""
    lines, times = [("run", "state", "steps", "about")], []
    for each in runs:
        step, _ = each.job.progress()
        state = "to evaluate" if each.trained else f"begun, step {step}" if step else "new"
        pace, left = _pace(each, runs), 0 if each.trained else each.job.steps
        about = clock(pace * left) if pace is not None and left else ""
        lines.append((each.job.name, state if each.job.commands else "done", f"{each.job.steps:,}", about))
        if each.job.commands:
            times.append((left, pace))
    total = f"{len(times)} of {len(runs)} runs to do, {sum(left for left, _ in times):,} steps."
    seconds = [left * pace for left, pace in times if pace is not None]
    if times and len(seconds) == len(times):
        with_workers = f" with {workers} workers" if workers > 1 else ""
        total += (
            f" About {clock(sum(seconds) / min(workers, len(times)))} of training{with_workers}, by the finished runs; "
            "loading, validation and evaluation come on top."
        )
    elif times:
        total += " Seconds per step are known once a run of each method is done."
    commands = [shell_line(arguments) for run in runs for arguments in run.job.commands]
    return "\n\n".join(filter(None, [text_table(lines, left=(0, 1)), total, "\n".join(commands)]))


def _pace(run: StudyRun, runs: Sequence[StudyRun]) -> float | None:
    """Seconds per step, by finished runs of the same group, else of the same method; None if there is none."""
    keys: list[Callable[[Planned], str]] = [lambda each: each.group, lambda each: each.settings["method"]]
    for key in keys:
        alike = [each.trained for each in runs if each.trained and key(each.planned) == key(run.planned)]
        costs = [cost for record in alike for cost in record.training.values()]
        if steps := sum(cost.steps for cost in costs):
            return sum(cost.seconds for cost in costs) / steps
    return None
