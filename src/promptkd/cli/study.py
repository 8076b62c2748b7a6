"""Run a study: methods x settings x seeds, each run an ordinary `promptkd distill` in a process and folder of its own.

The study is a YAML file whose keys are the options below; flags win over it. Everything is checked before the first run
starts. Run the same command again to go on: finished runs are skipped, the others go on from their last checkpoint.
A run that fails stops no other.

    out: runs/study
    base: {student: student, teacher: runs/teacher, data: train.jsonl, eval_data: valid.jsonl, max_steps: 500}
    methods: [kd, promptkd, {name: promptkd-fast, method: promptkd, prompt_learning_rate: 1e-2}]
    seeds: [1, 2, 3]
    grid: {learning_rate: [5e-5, 1e-4]}
    evaluate: {data: [dolly_test.jsonl], seeds: [10, 20]}

    promptkd study study.yaml --dry-run
    promptkd study study.yaml --workers 2

Each run's folder is OUT/NAME and its log OUT/logs/NAME.log. At the end the methods are compared over their seeds, in
OUT/comparison.json and OUT/report.html.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from promptkd.cli.study_runs import StudyRun
    from promptkd.study.loop import Engine, Outcome

POSITIONAL = "config"


@dataclass
class Options:
    config: Path
    """The study."""
    out: Path
    """Folder of the study, with a folder for each run in it."""
    base: dict[str, Any]
    """Settings of every run, spelled as the flags of `promptkd distill`; `config` names a recipe to start from."""
    methods: list[Any]
    """Methods: names, or mappings with a name, settings of their own (`config` too), and a `grid` of their own."""
    seeds: list[int]
    """Seeds of training."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings to vary, each with its values; every combination is run."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Flags of `promptkd evaluate`, to measure each student after its training; else validation is compared."""
    baseline: str | None = None
    """The method that the others are compared with, with its setting of the grid; by default the first."""
    metrics: list[str] = field(default_factory=list)
    """The metrics to compare, by default all. p is adjusted for their number: name those that you decide by."""
    workers: int = 1
    """Runs at a time on this machine, which share its cores and have a GPU each."""
    engine: Literal["local", "ray"] = "local"
    """Where runs run: local on this machine, ray on a Ray cluster whose nodes share the folders."""
    ray_address: str | None = None
    """Address of the Ray cluster; by default RAY_ADDRESS, or the cluster on this machine."""
    cpus_per_run: int = 1
    """ray: cores of a run."""
    gpus_per_run: float = 0.0
    """ray: GPUs of a run; with 0 it sees none."""
    dry_run: bool = False
    """List the runs, their commands and what they would cost, and write nothing."""


def run(options: Options, training: dict[str, Any]) -> None:
    from promptkd.cli.session import quiet_libraries
    from promptkd.cli.study_runs import checked_runs

    _check(options)
    quiet_libraries()
    runs = checked_runs(options)
    if options.dry_run:
        from promptkd.cli.study_plan import plan_text

        print(plan_text(runs, options.workers))
        return
    _carry_out(options, runs)


def _check(options: Options) -> None:
    from promptkd.errors import RequestError

    checks = [
        (options.workers < 1, f"--workers must be at least 1, got {options.workers}"),
        (options.cpus_per_run < 1, f"--cpus-per-run must be at least 1, got {options.cpus_per_run}"),
        (options.gpus_per_run < 0, f"--gpus-per-run must be 0 or more, got {options.gpus_per_run}"),
        (
            options.engine == "ray" and options.workers != 1,
            "--workers is of this machine; on a Ray cluster --cpus-per-run and --gpus-per-run say what fits",
        ),
        (
            options.engine == "local" and options.ray_address is not None,
            "--ray-address goes with --engine ray",
        ),
    ]
    if problems := [text for wrong, text in checks if wrong]:
        raise RequestError("; ".join(problems) + ".")


def _carry_out(options: Options, runs: "list[StudyRun]") -> None:
    from promptkd.cli.options import merged_config, write_config
    from promptkd.cli.session import say
    from promptkd.cli.study_outcome import compare_and_report
    from promptkd.io.lock import locked
    from promptkd.study.loop import carry_out
    from promptkd.study.table import Table

    cluster = _cluster(options) if options.engine == "ray" else None
    with locked(options.out) as lock:
        config = {k: v for k, v in merged_config(options, {}).items() if k not in ("config", "dry_run")}
        write_config(options.out / "config.yaml", config)
        jobs = [each.job for each in runs if each.job.commands]
        if finished := len(runs) - len(jobs):
            say(f"{finished} of {len(runs)} runs are done already.")
        outcome = carry_out(jobs, cluster or _pool(options, lock), Table([each.row for each in runs]))
        if outcome.signal is None:
            compare_and_report(options, [each for each in runs if not outcome.statuses.get(each.job.name, 0)])
    _conclude(options, runs, outcome)


def _cluster(options: Options) -> "Engine":
    from promptkd.study.ray_cluster import RayCluster

    return RayCluster(options.ray_address, cpus=options.cpus_per_run, gpus=options.gpus_per_run)


def _pool(options: Options, lock: int) -> "Engine":
    import os

    import torch

    from promptkd.study.local import LocalPool, cores, shares

    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(index) for index in range(torch.cuda.device_count())]
    return LocalPool(shares(options.workers, cores(), gpus, os.environ), keep_open=[lock])


def _conclude(options: Options, runs: "list[StudyRun]", outcome: "Outcome") -> None:
    """Raise what the study ends with, if any run is not done."""
    from promptkd.errors import PromptKDError
    from promptkd.study.loop import StoppedError
    from promptkd.study.processes import shell_line
    from promptkd.study.progress import last_words

    again = shell_line(["study", str(options.out / "config.yaml")])
    if outcome.signal is not None:
        left = sum(bool(each.job.commands) and outcome.statuses.get(each.job.name) != 0 for each in runs)
        raise StoppedError(f"Stopped. {left} of {len(runs)} runs are left. Go on by: {again}", outcome.signal)
    failed = [each.job for each in runs if outcome.statuses.get(each.job.name, 0)]
    if failed:
        lines = [
            f"\n  - {job.name} (status {outcome.statuses[job.name]}), see {job.log}: {last_words(job.log)}"
            for job in failed
        ]
        raise PromptKDError(f"{len(failed)} of {len(runs)} runs failed:{''.join(lines)}\nTry them again by: {again}")
