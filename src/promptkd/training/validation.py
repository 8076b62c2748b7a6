"""Validation: the metrics of `promptkd evaluate`, on models that may be spread over processes."""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.errors import RequestError
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import summarize
from promptkd.evaluation.rouge_tokenizer import DEFAULT, rouge_tokens
from promptkd.generation import Decoding
from promptkd.methods import Method
from promptkd.models import check_rows_fit
from promptkd.results import Metric, RowResult
from promptkd.training.checkpoint import kept_step
from promptkd.training.distributed import autocast, is_sharded
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.setup import encode, read_teacher_prompts
from promptkd.training.window import labeled

_LOGGER = logging.getLogger(__name__)


class Validated(NamedTuple):
    """What a trainer's validation rows showed after a step."""

    rows: list[RowResult]
    """Of all processes, in the order of the rows."""
    seconds: float


def validation_decoding(trainer: Any) -> Decoding:
    """How a trainer's validation decodes."""
    args = trainer.args
    return Decoding(
        stop_ids=trainer.stop_ids,
        temperature=args.eval_temperature,
        max_new_tokens=args.max_completion_length,
        seed=args.eval_seed,
        batch_size=args.generation_batch_size,
        masked_ids=trainer.masked_ids,
    )


def rouge_notes(args: Any, rows: Sequence[EncodedExample] | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What to say of ROUGE on these validation rows. Where it cannot score them, `args` then choose by the loss."""
    if not rows:
        return []
    tokens = rouge_tokens(args.rouge_tokenizer, tokenizer)
    notes = [unread] if (unread := tokens.told_unread([row.references for row in rows])) else []
    chosen_by = (args.metric_for_best_model or "").removeprefix("eval_")
    if notes and chosen_by in ("rouge_l", "rouge_1"):
        args.metric_for_best_model, args.greater_is_better = "loss", False
        notes.append("The checkpoint is chosen by the validation loss, since ROUGE cannot tell them apart here.")
    for note in notes:
        _LOGGER.warning(note)
    return notes + ([] if tokens.name == DEFAULT else [f"ROUGE compares {tokens.name} (--rouge_tokenizer)."])


def measure_student(trainer: Any, rows: Sequence[EncodedExample]) -> list[RowResult]:
    """A trainer's student on `rows`, in their order, each with the KL to its own teacher."""
    args, decoding = trainer.args, validation_decoding(trainer)
    scoring = {"batch_size": args.per_device_eval_batch_size, "rouge_tokenizer": args.rouge_tokenizer}

    def measured(student: nn.Module, teacher: nn.Module | None, rows: Sequence[EncodedExample]) -> list[RowResult]:
        with autocast(trainer.accelerator, args):
            return measure_rows(student, trainer.processing_class, rows, decoding, teacher=teacher, **scoring)

    return _in_order(trainer.on_rows(measured, rows), rows)


def _in_order(scored: Sequence[RowResult], rows: Sequence[EncodedExample]) -> list[RowResult]:
    places = {row.row: place for place, row in enumerate(rows)}
    return sorted(scored, key=lambda each: places[each.row])


def measure_kept(trainer: Any) -> Validated:
    """The validation rows under the weights that a finished trainer holds.

    They are measured now only where the last validation and the best one were of other weights. With sharded weights
    every process must come here together.
    """
    if (found := trainer.validated.get(kept_step(trainer))) is not None:
        return found
    started = time.perf_counter()
    return Validated(measure_student(trainer, trainer.validation_rows), time.perf_counter() - started)


def kl_by_teacher(trainer: Any, scored: Sequence[RowResult], rows: Sequence[EncodedExample]) -> dict[str, Metric]:
    """The student's KL to each of several teachers on the rows that are its own, as metrics; none for a single one."""
    teacher_of, metric = {row.row: row.teacher for row in rows}, "kl_to_teacher"
    own = {name: [each for each in scored if teacher_of[each.row] == name] for name in trainer.teacher_names}
    return {labeled(metric, name): summarize(each)[metric] for name, each in own.items() if each}


def _other_rows(trainer: Any, data: Any, method: Method | None) -> list[EncodedExample]:
    """Rows in any of the forms of an eval_dataset, as a trainer's own are encoded; checked against its models."""
    if not isinstance(data, EncodedData) and len(data) > 0 and all(isinstance(each, EncodedExample) for each in data):
        data = EncodedData(list(data), 0)
    encoded = encode(
        data,
        trainer.processing_class,
        trainer.args,
        name="eval_dataset",
        teacher=None if method is None else read_teacher_prompts(method, trainer.args),
        teacher_names=trainer.teacher_names or ("",),
    )
    rows = [] if encoded is None else encoded.examples
    if trainer.shared is not None:
        trainer.shared.check(rows, "eval_dataset")
    if rows:
        check_rows_fit("model", trainer.model, rows, trainer.args.max_completion_length)
    return rows


def validate(trainer: Any, data: Any = None, *, prefix: str, method: Method | None = None) -> dict[str, float]:
    """Validation loss, ROUGE-L, KL to the teacher and more, decoded as `promptkd evaluate` decodes.

    Each process measures its part of the rows (all of them where weights are sharded); the metrics are of all rows.

    Args:
        data: rows in any of the forms of an eval_dataset, or `EncodedExample`s; None for the trainer's own.
        method: that of a distillation, whose source of responses hears of the loss on the trainer's own rows.

    Raises:
        RequestError: without rows, or for rows that cannot be used.
    """
    own = data is None or data is trainer.validation_rows
    rows = trainer.validation_rows if own else _other_rows(trainer, data, method)
    if not rows:
        raise RequestError("Validation needs rows: give an eval_dataset.")
    started = time.perf_counter()
    args, accelerator = trainer.args, trainer.accelerator
    index, count = accelerator.process_index, accelerator.num_processes
    if is_sharded(accelerator):
        index, count = 0, 1  # a sharded teacher runs on all processes together, so each measures all rows

    with out_of_memory_told(trainer), trainer.phases("validation"):
        scored = measure_student(trainer, rows[index::count])
    scored = _in_order(gather_object(scored), rows) if count > 1 else scored
    seconds = time.perf_counter() - started
    if own:
        best = trainer.state.best_global_step
        others = {step: found for step, found in trainer.validated.items() if step == best}
        trainer.validated = others | {trainer.state.global_step: Validated(scored, seconds)}
    metrics = {f"{prefix}_{name}": metric.value for name, metric in summarize(scored).items()}
    metrics |= {f"{prefix}_{name}": kl.value for name, kl in kl_by_teacher(trainer, scored, rows).items()}
    metrics[f"{prefix}_seconds"] = seconds
    trainer.model.eval()  # what is logged in training mode is a training step's
    trainer.log(dict(metrics))
    trainer.model.train()
    trainer.control = trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
    if own and method is not None:
        method.responses.on_validation(metrics[f"{prefix}_loss"])
    return metrics
