"""What `distill --dry-run` prints: sizes, steps, and the measured memory and time of a step by phase."""

from typing import Any

from promptkd.cli.terminal import is_main_process
from promptkd.memory import gibibytes
from promptkd.models import count_parameters
from promptkd.report.formatting import duration
from promptkd.responses import writes_responses
from promptkd.training.dry_run import Trial


def print_forecast(trainer: Any, trial: Trial) -> None:
    """Print what a run will need, from the first process alone."""
    if is_main_process():
        print("\n".join(forecast(trainer, trial)))


def forecast(trainer: Any, trial: Trial) -> list[str]:
    """The lines, of a trainer whose trial is over."""
    return [*_sizes(trainer), *_work(trainer, trial), *_memory(trial), *_time(trial)]


def _sizes(trainer: Any) -> list[str]:
    student = trainer.accelerator.unwrap_model(trainer.model)
    teacher = trainer.teacher.model
    numbers, _ = trainer.trainable_share()
    return [
        _line("student", f"{count_parameters(student, trainable=True):,} of {count_parameters(student):,} trained"),
        _line("teacher", f"{numbers:,} trained, {count_parameters(teacher):,} parameters"),
    ]


def _work(trainer: Any, trial: Trial) -> list[str]:
    args, processes = trainer.args, trainer.accelerator.num_processes
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rollouts = f"up to {window}" if writes_responses(trainer.method.responses) else "none, the data's responses serve"
    return [
        _line("rows", f"{len(trainer.train_dataset):,}"),
        _line("optimizer steps", f"{trial.steps:,} of {window} rows"),
        _line("rollouts per step", rollouts),
    ]


def _memory(trial: Trial) -> list[str]:
    by_size = sorted(trial.peak_memory_by_phase.items(), key=lambda each: each[1], reverse=True)
    how = "held at the ends of phases" if trial.sampled else "the most held in each phase"
    return [
        f"memory, measured on the longest rows, of up to {trial.longest_row:,} tokens; {how}",
        *(_line(f"  {name}", gibibytes(size)) for name, size in by_size),
        _line("  peak", f"{gibibytes(trial.peak_memory_bytes)}, loading included"),
    ]


def _time(trial: Trial) -> list[str]:
    how = "on one step after one to warm up" if trial.warm else "on the run's only step"
    whole = duration(trial.seconds * trial.steps)
    return [
        _line("seconds per step", f"{trial.seconds:.2f}, measured {how} with the longest rows"),
        *(_line(f"  {name}", f"{seconds:.2f}") for name, seconds in trial.seconds_by_phase.items()),
        _line("expected time", f"at most {whole}; loading, validation and checkpoints apart"),
    ]


def _line(name: str, value: str) -> str:
    return f"{name:<34}{value}"
