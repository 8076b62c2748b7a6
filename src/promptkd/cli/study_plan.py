"""What a study would do, in words: its runs, their cost, and their commands."""

from collections.abc import Sequence

from promptkd.cli.study_runs import StudyRun
from promptkd.report.text import text_table
from promptkd.study.processes import shell_line
from promptkd.study.progress import progress_of
from promptkd.study.table import Phase, clock


def plan_text(runs: Sequence[StudyRun], workers: int) -> str:
    """A line per run, the sum, and the commands of what is not done, to be copied."""
    heads = ("run", "state", "steps", "about")
    lines = [heads, *(_cells(run, _pace(run, runs)) for run in runs)]
    commands = [shell_line(arguments) for run in runs for arguments in run.job.commands]
    return "\n\n".join(filter(None, [text_table(lines, left=(0, 1)), _total(runs, workers), "\n".join(commands)]))


def _total(runs: Sequence[StudyRun], workers: int) -> str:
    left = [run for run in runs if run.job.commands]
    steps = sum(_steps_left(run) for run in left)
    said = f"{len(left)} of {len(runs)} runs to do, {steps:,} steps."
    paces = [_pace(run, runs) for run in left]
    if left and None not in paces:
        seconds = sum(pace * _steps_left(run) for run, pace in zip(left, paces, strict=True) if pace is not None)
        with_workers = f" with {workers} workers" if workers > 1 else ""
        return (
            f"{said} About {clock(seconds / min(workers, len(left)))} of training{with_workers}, by the finished runs; "
            "loading, validation and evaluation come on top."
        )
    return f"{said} Seconds per step are known once a run of each method is done." if left else said


def _cells(run: StudyRun, pace: float | None) -> tuple[str, str, str, str]:
    if run.row.phase is Phase.DONE:
        state = "done"
    elif run.trained is not None:
        state = "to evaluate"
    else:
        step = progress_of(run.folder).step
        state = f"begun, step {step}" if step else "new"
    left = _steps_left(run)
    return run.planned.name, state, f"{run.row.steps:,}", clock(pace * left) if pace is not None and left else ""


def _steps_left(run: StudyRun) -> int:
    return 0 if run.trained is not None else run.row.steps


def _pace(run: StudyRun, runs: Sequence[StudyRun]) -> float | None:
    """Seconds per step, by finished runs of the same group, else of the same method; None if there is none."""
    for alike in (
        lambda other: other.planned.group == run.planned.group,
        lambda other: other.planned.settings["method"] == run.planned.settings["method"],
    ):
        costs = [
            cost
            for other in runs
            if alike(other) and other.trained is not None
            for cost in other.trained.training.values()
        ]
        if steps := sum(cost.steps for cost in costs):
            return sum(cost.seconds for cost in costs) / steps
    return None
