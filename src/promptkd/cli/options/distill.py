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
from promptkd.settings import option

REPEATABLE = ("teacher",)
RESUMED_BY = ("--resume",)
LESS_MEMORY = ("--teacher_dtype bfloat16", "--teacher_quantization 8bit")  # to load; training tells of its phases
TRAINING_CONFIG = "promptkd.training:DistillConfig"
SETTINGS_SOURCES = ("precision.py", "training/config.py", "models/adapters.py", "methods/*.py")
COMMON_TRAINING_FLAGS = (
    *("method", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "prompt_length", "prompt_learning_rate", "prompt_start", "prompt_kl"),
    *("regularizer_kl", "regularizer_schedule", "regularizer_coefficient", "student_share", "beta"),
    *("max_prompt_length", "max_completion_length", "template", "overlong", "eval_strategy", "eval_steps"),
    *(
        "prompt_every",
        "prompt_refresh",
        "teacher_dtype",
        "bf16",
        "teacher_quantization",
        "teacher_gradient_checkpointing",
    ),
    *("kept_logits", "seed", "on_nan", "report_to"),
)


@dataclass(kw_only=True)
class Options(Training):
    student: str
    """The student: a hub name, folder, run folder or GGUF file."""
    teacher: str | list[str] | None = None
    """The teacher, likewise. It must share the student's vocabulary. For self-distillation: self, the student's start,
    or ema, its moving average (--teacher_ema_decay); a folder of such a name is ./self. Several, as --teacher A
    --teacher NAME=B: each row names its own in the column teacher (docs/several-teachers.md). Needed unless
    --kept_logits takes its place."""
    student_lora_rank: int | None = option(None, at_least=1)
    """Train LoRA weights of this rank beside the student's in place of the whole student."""
    student_lora_alpha: float = 32.0
    """Scale of the student's LoRA weights."""
    student_lora_continue: bool = False
    """Go on training the adapter of a student that is a LoRA folder, in place of a new one on the merged student."""
    merge: bool = False
    """Merge the student's LoRA weights into OUT/student at the end; else it holds the adapter alone."""
    select: Literal["rouge_l", "loss", "kl_to_teacher", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last. Where ROUGE
    cannot score the rows, loss takes the place of rouge_l (see --rouge_tokenizer)."""
    measure: Literal["all", "student"] = "all"
    """With --eval-data: all also measures the student before training, the teacher, and the speed of both; student
    measures the trained student alone."""
    preflight: bool = True
    """Measure student and teacher on 8 rows before training, which takes seconds, and give advice."""
    dry_run: bool = False
    """Take two real steps on the longest rows, with --prompt_every above 1 a third one without the prompt's part; print
    peak memory, seconds and expected time; write nothing."""
