"""Training that runs out of memory ends with one message: where, on what, and which settings need less there."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from promptkd.errors import PromptKDError
from promptkd.memory import is_out_of_memory, memory_status
from promptkd.training.checkpoint import told_last_checkpoint

_CHUNK = 128  # tokens


@contextmanager
def out_of_memory_told(trainer: Any) -> Iterator[None]:
    """Turn what an allocator raises in the body into a `PromptKDError` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        message = _message(trainer, error)
        traceback.clear_frames(error.__traceback__)  # they hold tensors, which a notebook needs to have freed
        raise PromptKDError(message) from error


def _message(trainer: Any, error: BaseException) -> str:
    phase, steps = trainer.phases.failing, trainer.state.global_step
    where = f"in the {phase.name} phase of step {steps + 1}" if phase else f"after step {steps}"
    if phase and phase.name == "validation":
        where = f"in the validation after step {steps}"
    elif phase and (lengths := phase.lengths):
        rows = f"{len(lengths)} row{'' if len(lengths) == 1 else 's'}"
        where += f", on {rows}, the longest of {max(lengths):,} tokens, {sum(lengths):,} tokens in all"
    resumed, fresh = advice(trainer.args, phase.name if phase else "", **trainer.savings())
    if trainer.is_trial:
        hints = [("Less is needed with:", [*resumed, *fresh])]
    else:
        hints = [("Less is needed with these, which --resume may change:", resumed), ("For a new run only:", fresh)]
    parts = [f"Out of memory {where}.", memory_status(error)]
    parts += [] if trainer.is_trial else [told_last_checkpoint(trainer.args)]
    parts += [f"{words} {', '.join(flags)}." for words, flags in hints if flags]
    return " ".join(part for part in parts if part) + " See docs/memory.md."


def advice(
    args: Any,
    phase: str,
    *,
    recompute_teacher: bool = False,
    lower_teacher: bool = False,
    lora_student: bool = False,
    take_turns: bool = False,
) -> tuple[list[str], list[str]]:
    """Settings that need less memory in a phase: those that a resumed run may change, and those of a new run.

    A setting that is at its least already is left out; the flags say which of the models' would still save memory.
    """

    def half(name: str) -> list[str]:
        size = vars(args)[name]
        return [f"--{name} {size // 2}"] if size > 1 else []

    teacher = ["--teacher_dtype bfloat16"] if lower_teacher else []
    lora = ["--student-lora-rank 16"] if lora_student else []
    recomputed = ["--teacher_gradient_checkpointing"] if recompute_teacher else []
    rows, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    size = rows // 2 if rows % 2 == 0 else 1  # the same optimizer step, over more micro-batches
    smaller = [f"--per_device_train_batch_size {size} --gradient_accumulation_steps {batches * rows // size}"]
    student = [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    student += smaller if rows > 1 else []
    chunk = vars(args).get("chunk_tokens", _CHUNK)  # fine-tuning has no such setting; None takes more, 0 all
    student += [] if 0 < (chunk or 0) <= _CHUNK else [f"--chunk_tokens {_CHUNK}"]
    decoded = half("generation_batch_size")
    by_phase = {
        "rollout": (decoded, teacher),
        "prompt": (recomputed + (smaller if rows > 1 else []), teacher),
        "student": (student, [*teacher, *lora]),
        "training": (student, []),
        "update": ([], [*lora, "--optim adafactor", *teacher]),
        "validation": ([*half("per_device_eval_batch_size"), *decoded], teacher),
    }
    resumed, fresh = by_phase.get(phase, ([], [*teacher, *lora]))
    return (["--teachers_resident one"] if take_turns else []) + resumed, fresh  # first what helps most
