"""Train a student on a teacher, with PromptKD or one of its rivals.

The student goes into OUT/student, the soft prompt into OUT/prompt (PEFT loads it), every logged step into
OUT/metrics.jsonl, the record into OUT/results.json and the page into OUT/report.html.

    promptkd distill --student student --teacher runs/teacher \\
        --data train.jsonl --eval-data valid.jsonl --out runs/promptkd

What a run will need, without starting it: --dry-run.

Several processes: accelerate launch -m promptkd distill ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from promptkd.cli.training_run import TrainingRun
    from promptkd.methods import Method
    from promptkd.training import DistillConfig

GOES_ON = ("--resume",)
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
_STALE = (
    "--prompt_refresh stale: the student learns from the prompted teacher of before each update of the prompt. "
    "This is another algorithm than PromptKD as published."
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


def run(options: Options, training: dict[str, Any]) -> None:
    from promptkd.cli.forecast import print_forecast
    from promptkd.errors import RequestError
    from promptkd.models import check_same_vocabulary
    from promptkd.training import DistillTrainer
    from promptkd.training.dry_run import at_its_most, longest_rows_first, take_trial_steps
    from promptkd.training.teacher_options import teacher_settings

    job, args, method = checked(options, training)
    tokenizer, teacher_tokenizer = job.tokenizer(options.student), job.tokenizer(options.teacher)
    check_same_vocabulary(tokenizer, teacher_tokenizer)
    train, valid = job.encode(tokenizer, args, need_response=method.responses.needs_data)
    student = job.load("student", options.student)
    teacher = job.load("teacher", options.teacher, teacher_settings(args, method))
    if options.dry_run:
        train, method = longest_rows_first(train, args, method), at_its_most(method)
    with _trial_folder(args) if options.dry_run else job.opened():
        trainer = DistillTrainer(
            student,
            teacher,
            args,
            train,
            valid,
            tokenizer,
            method=method,
            teacher_processing_class=teacher_tokenizer,
            peft_config=_lora(options),
        )
        if options.merge and trainer.is_sharded:
            raise RequestError("--merge needs the student's weights whole: leave it out, and merge by promptkd export.")
        job.take_notes(trainer)
        if options.dry_run:
            print_forecast(trainer, take_trial_steps(trainer))
            return
    job.tell_trained_share(*trainer.trainable_share())
    if args.prompt_refresh == "stale":
        job.note(_STALE)
    job.train(trainer, "Distilling")
    if options.merge:
        trainer.merge_student()
    job.save(trainer, "student")
    trainer.save_adapter(job.folder.path)
    job.record(trainer, "student")


def checked(options: Options, training: dict[str, Any]) -> "tuple[TrainingRun, DistillConfig, Method]":
    """The run, once everything that can be checked without a model is sound; nothing is written."""
    from promptkd.cli.training_run import TrainingRun
    from promptkd.methods import named_method
    from promptkd.training import DistillConfig

    _check(options)
    job = TrainingRun("distill", options, training)
    args = job.arguments(DistillConfig)
    return job, args, named_method(args.method, args.method_settings())


@contextmanager
def _trial_folder(args: Any) -> Iterator[None]:
    """Where a dry run's trainer may write: a folder that is gone afterwards."""
    from promptkd.training.dry_run import leave_nothing

    with TemporaryDirectory() as folder:
        leave_nothing(args, folder)
        yield


def _check(options: Options) -> None:
    from promptkd.errors import RequestError

    if options.dry_run and options.resume:
        raise RequestError("--dry-run looks at a run from its first step on. Leave --resume out.")
    if options.student_lora_rank is not None and options.student_lora_rank < 1:
        raise RequestError(f"--student-lora-rank must be at least 1. Got {options.student_lora_rank}.")
    if options.merge and options.student_lora_rank is None:
        raise RequestError("--merge merges the student's LoRA weights: give --student-lora-rank with it.")


def _lora(options: Options) -> Any:
    if options.student_lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=options.student_lora_rank,
        lora_alpha=options.student_lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
