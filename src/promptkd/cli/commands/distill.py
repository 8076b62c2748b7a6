"""`promptkd distill`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig

from promptkd.cli.forecast import print_forecast
from promptkd.cli.options.distill import Options
from promptkd.cli.training_run import TrainingRun
from promptkd.data import Example, read_examples
from promptkd.errors import RequestError
from promptkd.methods import Method
from promptkd.models import check_same_vocabulary
from promptkd.training import DistillConfig, DistillTrainer
from promptkd.training.config import chosen_method
from promptkd.training.dry_run import at_its_most, leave_nothing, longest_rows_first, take_trial_steps
from promptkd.training.teacher import teacher_settings

_STALE = (
    "--prompt_refresh stale: the student learns from the prompted teacher of before each update of the prompt. "
    "This is another algorithm than PromptKD as published."
)


def run(options: Options, training: dict[str, Any]) -> None:
    job, args, method = checked(options, training)
    with nullcontext() if options.dry_run else job.folder.locked():
        _distill(options, job, args, method)


def _distill(options: Options, job: TrainingRun, args: DistillConfig, method: Method) -> None:
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
        for note in trainer.notes:
            job.note(note)
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


def checked(
    options: Options, training: dict[str, Any], read: Callable[..., list[Example]] = read_examples
) -> tuple[TrainingRun, DistillConfig, Method]:
    """The run, once everything that can be checked without a model is sound; nothing is written.

    Args:
        read: reads a data set, as `read_examples` does.
    """
    _check(options)
    job = TrainingRun("distill", options, training, read)
    args = job.arguments(DistillConfig)
    return job, args, chosen_method(args)


@contextmanager
def _trial_folder(args: Any) -> Iterator[None]:
    """Where a dry run's trainer may write: a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        leave_nothing(args, folder)
        yield


def _check(options: Options) -> None:
    if options.dry_run and options.resume:
        raise RequestError("--dry-run looks at a run from its first step on. Leave --resume out.")
    if options.merge and options.student_lora_rank is None:
        raise RequestError("--merge merges the student's LoRA weights: give --student-lora-rank with it.")


def _lora(options: Options) -> Any:
    if options.student_lora_rank is None:
        return None

    return LoraConfig(
        r=options.student_lora_rank,
        lora_alpha=options.student_lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
