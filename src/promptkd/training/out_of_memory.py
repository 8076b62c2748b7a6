"""Training that runs out of memory ends with one message: where, on what, and which settings need less there."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from promptkd.errors import PromptKDError
from promptkd.memory import is_out_of_memory, memory_status
from promptkd.training.checkpoint import told_last_checkpoint

if TYPE_CHECKING:
    from promptkd.training.phases import Phase

_CHUNK = 128  # tokens


@dataclass(frozen=True)
class Savings:
    """Which settings of the models would still save memory in this run."""

    recompute_teacher: bool = False
    lower_teacher: bool = False
    """Whether the teacher stands in float32 and need not."""
    lora_student: bool = False


@contextmanager
def out_of_memory_told(trainer: Any) -> Iterator[None]:
    """Turn what an allocator raises in the body into a `PromptKDError` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        message = _message(trainer, error)
        traceback.clear_frames(
            error.__traceback__
        )  # which hold the tensors: a notebook can go on with smaller settings
        raise PromptKDError(message) from error


def _message(trainer: Any, error: BaseException) -> str:
    phase = trainer.phases.failing
    parts = [f"Out of memory {_where(phase, trainer.state.global_step)}.", memory_status(error)]
    now, anew = advice(trainer.args, "" if phase is None else phase.name, trainer.savings())
    if trainer.is_trial:
        parts.append(_listed("Less is needed with:", [*now, *anew]))
    else:
        parts.append(told_last_checkpoint(trainer.args))
        parts.append(_listed("Less is needed with these, which --resume may change:", now))
        parts.append(_listed("For a new run only:", anew))
    return " ".join(part for part in parts if part) + " See docs/memory.md."


def _where(phase: "Phase | None", steps: int) -> str:
    """`steps`: optimizer steps that are done."""
    if phase is None:
        return f"after step {steps}"
    if phase.name == "validation":
        return f"in the validation after step {steps}"
    where = f"in the {phase.name} phase of step {steps + 1}"
    if not phase.lengths:
        return where
    rows = f"{len(phase.lengths)} row{'' if len(phase.lengths) == 1 else 's'}"
    return f"{where}, on {rows}, the longest of {max(phase.lengths):,} tokens, {sum(phase.lengths):,} tokens in all"


def _listed(words: str, flags: list[str]) -> str:
    return f"{words} {', '.join(flags)}." if flags else ""


def advice(args: Any, phase: str, savings: Savings) -> tuple[list[str], list[str]]:
    """Settings that need less memory in a phase: those that a resumed run may change, and those of a new run.

    A setting that is at its least already is left out.
    """
    teacher = ["--teacher_dtype bfloat16"] if savings.lower_teacher else []
    lora = ["--student-lora-rank 16"] if savings.lora_student else []
    recomputed_teacher = ["--teacher_gradient_checkpointing"] if savings.recompute_teacher else []
    recomputed_student = [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    decoded = _half(args, "generation_batch_size")
    student = [*recomputed_student, *_micro_batches(args), *_chunks(args)]
    by_phase = {
        "rollout": (decoded, teacher),
        "prompt": ([*recomputed_teacher, *_micro_batches(args)], teacher),
        "student": (student, [*teacher, *lora]),
        "training": (student, []),
        "update": ([], [*lora, "--optim adafactor", *teacher]),
        "validation": ([*_half(args, "per_device_eval_batch_size"), *decoded], teacher),
    }
    return by_phase.get(phase, ([], [*teacher, *lora]))


def _half(args: Any, name: str) -> list[str]:
    """Half of a number of rows."""
    size = vars(args)[name]
    return [f"--{name} {size // 2}"] if size > 1 else []


def _micro_batches(args: Any) -> list[str]:
    """The same optimizer step over twice as many micro-batches, or over single rows where the batch is odd."""
    rows, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows == 1:
        return []
    size = rows // 2 if rows % 2 == 0 else 1
    return [f"--per_device_train_batch_size {size} --gradient_accumulation_steps {batches * rows // size}"]


def _chunks(args: Any) -> list[str]:
    """Fewer tokens whose logits are held at a time. Fine-tuning has no such setting."""
    holds_fewer = 0 < (vars(args).get("chunk_tokens") or 0) <= _CHUNK  # None takes more, 0 all
    return [] if "chunk_tokens" not in vars(args) or holds_fewer else [f"--chunk_tokens {_CHUNK}"]
