"""Train a student on a teacher, with PromptKD or one of its rivals.

The student goes into OUT/student, the soft prompt into OUT/prompt (PEFT loads it), every logged step into
OUT/metrics.jsonl, the record into OUT/results.json and the page into OUT/report.html.

    promptkd distill --student student --teacher runs/teacher \\
        --data train.jsonl --eval-data valid.jsonl --out runs/promptkd

What a run will need, without starting it: --dry-run.

Several processes: accelerate launch -m promptkd distill ...
"""

from dataclasses import dataclass
from typing import Literal

from promptkd.cli.options.common import Training

RESUMED_BY = ("--resume",)
LESS_MEMORY = ("--teacher_dtype bfloat16", "--teacher_quantization 8bit")  # to load; training tells of its phases
TRAINING_CONFIG = "promptkd.training:DistillConfig"
COMMON_TRAINING_FLAGS = {
    "method": (
        "NAME",
        "promptkd, promptkd-lora, promptkd-full, kd, seqkd, imitkd, gkd, minillm, distillm, akl, dpkd or okd "
        "(default promptkd).",
    ),
    "max_steps": ("INT", "Optimiser steps; by default num_train_epochs decides."),
    "num_train_epochs": ("NUMBER", "Passes over the data (default 3)."),
    "learning_rate": ("NUMBER", "Peak learning rate of the student (default 5e-05)."),
    "per_device_train_batch_size": ("INT", "Rows a micro-batch (default 8)."),
    "gradient_accumulation_steps": ("INT", "Micro-batches an optimiser step (default 1)."),
    "prompt_length": ("INT", "Vectors of the soft prompt (default 7)."),
    "prompt_learning_rate": ("NUMBER", "Learning rate of the soft prompt (default 0.001)."),
    "prompt_start": ("text|padding|random", "What the soft prompt starts from (default text)."),
    "prompt_kl": ("reverse|forward", "Direction of the prompt's KL with the student (default reverse)."),
    "regularizer_kl": ("reverse|forward", "Direction of the regulariser (default reverse)."),
    "regularizer_schedule": ("linear|constant|none", "How the regulariser's weight goes (default linear)."),
    "student_share": ("NUMBER", "Share of responses by the student, for imitkd, gkd and distillm."),
    "beta": ("NUMBER", "gkd: 0 forward KL, 1 reverse KL, between them Jensen-Shannon (default 1)."),
    "regularizer_coefficient": ("NUMBER", "Weight of the regulariser at the first step (default 1)."),
    "max_prompt_length": ("INT", "Most tokens of a prompt (default 256)."),
    "max_completion_length": ("INT", "Most tokens of a response (default 256)."),
    "template": ("TEXT", "auto, alpaca, chat, or a Jinja text (default auto)."),
    "overlong": ("drop|error", "What happens to rows over a limit (default drop, and count)."),
    "eval_strategy": ("no|steps|epoch", "When to validate, given --eval-data (default epoch)."),
    "eval_steps": ("INT", "Optimiser steps between validations."),
    "prompt_refresh": (
        "fresh|stale",
        "stale: the student learns from the prompted pass of before the prompt's update; saves a pass of the teacher, "
        "and is not PromptKD as published (default fresh).",
    ),
    "teacher_dtype": (
        "NAME",
        "Precision of the teacher's weights: float32, bfloat16, float16, or auto for that of its files (default "
        "bfloat16 where the device has units for it, else float32).",
    ),
    "bf16": ("true|false", "Compute in bfloat16 (default true where the device has units for it)."),
    "teacher_quantization": ("8bit|4bit", "Quantise the teacher by bitsandbytes (default none)."),
    "teacher_gradient_checkpointing": ("", "Recompute the teacher's activations in the prompt's backward."),
    "seed": ("INT", "Seed of everything random (default 42)."),
    "on_nan": ("stop|skip", "What happens at a NaN or infinite loss or gradient (default stop)."),
    "report_to": ("NAME", "Tracker, such as wandb or tensorboard (default none)."),
}


@dataclass(kw_only=True)
class Options(Training):
    student: str
    """The student: a hub name, folder, run folder or GGUF file."""
    teacher: str
    """The teacher, likewise. It must share the student's vocabulary."""
    student_lora_rank: int | None = None
    """Train LoRA weights of this rank beside the student's in place of the whole student."""
    student_lora_alpha: float = 32.0
    """Scale of the student's LoRA weights."""
    merge: bool = False
    """Merge the student's LoRA weights into OUT/student at the end; else it holds the adapter alone."""
    select: Literal["rouge_l", "loss", "kl_to_teacher", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last."""
    dry_run: bool = False
    """Take two real steps on the longest rows; print peak memory, seconds and expected time; write nothing."""
