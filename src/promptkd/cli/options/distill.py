"""Train a student on a teacher, with PromptKD or one of its rivals.

The student goes into OUT/student, the soft prompt into OUT/prompt (PEFT loads it), every logged step into
OUT/metrics.jsonl, the record into OUT/results.json and the page into OUT/report.html.

    promptkd distill --student student --teacher runs/teacher \\
        --data train.jsonl --eval-data valid.jsonl --out runs/promptkd

What a run will need, without starting it: --dry-run.

Several processes: accelerate launch -m promptkd distill ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GOES_ON = ("--resume",)
LESS_MEMORY = ("--teacher_dtype bfloat16", "--teacher_quantization 8bit")  # to load; training tells of its phases
TRAINING_CONFIG = "promptkd.training:DistillConfig"
SETTINGS_SOURCES = (
    "precision.py",  # the names of dtypes
    "training/base_config.py",
    "training/config.py",
    "models/adapters.py",
    "methods/*.py",
)
COMMON_TRAINING_FLAGS = (
    *("method", "max_steps", "num_train_epochs", "learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("prompt_length", "prompt_learning_rate", "prompt_start", "prompt_kl"),
    *("regularizer_kl", "regularizer_schedule", "regularizer_coefficient", "student_share", "beta"),
    *("max_prompt_length", "max_completion_length", "template", "overlong", "eval_strategy", "eval_steps"),
    *("prompt_refresh", "teacher_dtype", "bf16", "teacher_quantization", "teacher_gradient_checkpointing"),
    *("seed", "on_nan", "report_to"),
)


@dataclass
class Options:
    student: str
    """The student: a hub name, folder, run folder or GGUF file."""
    teacher: str
    """The teacher, likewise. It must share the student's vocabulary."""
    data: str
    """Training rows: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """Folder of the run."""
    eval_data: str | None = None
    """Validation rows, in the same forms."""
    limit: int | None = None
    """Use the first so many training rows."""
    eval_limit: int | None = None
    """Use the first so many validation rows."""
    student_lora_rank: int | None = None
    """Train LoRA weights of this rank beside the student's in place of the whole student."""
    student_lora_alpha: float = 32.0
    """Scale of the student's LoRA weights."""
    merge: bool = False
    """Merge the student's LoRA weights into OUT/student at the end; else it holds the adapter alone."""
    select: Literal["rouge_l", "loss", "kl_to_teacher", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last."""
    keep: int | None = 2
    """Checkpoints that stay, the newest and the best always among them; none keeps all."""
    resume: bool = False
    """Go on from the last checkpoint in OUT."""
    overwrite: bool = False
    """Replace the run in OUT."""
    dry_run: bool = False
    """Take two real steps on the longest rows; print peak memory, seconds and expected time; write nothing."""
