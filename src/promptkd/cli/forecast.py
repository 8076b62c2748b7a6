"""What `distill --dry-run` prints: sizes, memory by parts, steps and time."""

from typing import TYPE_CHECKING, Any

from promptkd.cli.session import is_main_process

if TYPE_CHECKING:
    from promptkd.training.memory import MemoryEstimate
    from promptkd.training.trial import Trial

__all__ = ["forecast", "gibibytes", "print_forecast"]


def gibibytes(size: int) -> str:
    """2147483648 -> "2.00 GiB"."""
    return f"{size / 2**30:.2f} GiB"


def print_forecast(trainer: Any, estimate: "MemoryEstimate | None", trial: "Trial") -> None:
    """Print what a run will need, from the first process alone."""
    if is_main_process():
        print("\n".join(forecast(trainer, estimate, trial)))


def forecast(trainer: Any, estimate: "MemoryEstimate | None", trial: "Trial") -> list[str]:
    """The lines, of a trainer whose trial is over."""
    return [*_sizes(trainer), *_work(trainer, trial), *_memory(trainer, estimate, trial), *_time(trial)]


def _sizes(trainer: Any) -> list[str]:
    from promptkd.models import count_parameters

    student = trainer.accelerator.unwrap_model(trainer.model)
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    numbers, _ = trainer.trainable_share()
    return [
        _line("student", f"{count_parameters(student, trainable=True):,} of {count_parameters(student):,} trained"),
        _line("teacher", f"{numbers:,} trained, {count_parameters(teacher):,} parameters"),
    ]


def _work(trainer: Any, trial: "Trial") -> list[str]:
    from promptkd.training.memory import writes_responses

    args, processes = trainer.args, trainer.accelerator.num_processes
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rollouts = f"up to {window}" if writes_responses(trainer.method.responses) else "none, the data's responses serve"
    return [
        _line("rows", f"{len(trainer.train_dataset):,}"),
        _line("optimiser steps", f"{trial.steps:,} of {window} rows"),
        _line("rollouts a step", rollouts),
    ]


def _memory(trainer: Any, estimate: "MemoryEstimate | None", trial: "Trial") -> list[str]:
    measured = _line(
        "memory, measured", f"{gibibytes(trial.peak_memory_bytes)} at the peak of the trial, loading included"
    )
    if estimate is None:
        return [_line("memory", "no estimate where FSDP, DeepSpeed or vLLM hold the weights"), measured]
    lines = [
        f"memory, an estimate for responses of {trainer.args.max_completion_length} tokens where a model writes them"
    ]
    lines += [_line(f"  {part}", gibibytes(size)) for part, size in estimate.standing.items()]
    for phase, parts in estimate.phases.items():
        lines.append(_line(f"  {phase}", f"+ {gibibytes(sum(parts.values()))}"))
        lines += [_line(f"    {part}", gibibytes(size)) for part, size in parts.items()]
    lines.append(_line("  peak", f"{gibibytes(estimate.peak)}, in the {estimate.largest}"))
    return [*lines, measured]


def _time(trial: "Trial") -> list[str]:
    from promptkd.report.provenance import duration

    how = "measured on one step after one to warm up" if trial.warm else "measured on the run's only step"
    return [
        _line("seconds a step", f"{trial.seconds:.2f}, {how}"),
        _line("expected time", f"{duration(trial.seconds * trial.steps)}; loading, validation and checkpoints apart"),
    ]


def _line(name: str, value: str) -> str:
    return f"{name:<34}{value}"
