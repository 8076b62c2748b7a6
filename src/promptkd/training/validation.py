"""Validation: the metrics of `promptkd evaluate`, on models that may be spread over processes."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.errors import RequestError
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import BY_REFERENCES, Rows, has_references, summarize
from promptkd.evaluation.rouge_tokenizer import DEFAULT, rouge_tokens
from promptkd.evaluation.statistics import token_mean_interval
from promptkd.generation import Decoding
from promptkd.methods import Method
from promptkd.models import check_rows_fit
from promptkd.results import Metric, RowResult
from promptkd.training.arguments import evaluation_sets
from promptkd.training.checkpoint import kept_step
from promptkd.training.distributed import autocast, is_sharded
from promptkd.training.out_of_memory import out_of_memory_told
from promptkd.training.setup import encode, read_teacher_prompts
from promptkd.training.window import labeled

_LOGGER = logging.getLogger(__name__)


class Validated(NamedTuple):
    """What a trainer's validation rows showed after a step."""

    rows: list[RowResult]
    """Of all processes, in the order of the rows; of several sets one after the other."""
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


def validation_notes(args: Any, rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What to say of metrics on these validation rows. Where ROUGE cannot score them, `args` then choose by the loss.

    `RequestError` if `metric_for_best_model` is measured on no set.
    """
    sets = {name: each for name, each in evaluation_sets(rows).items() if each}
    if sets:
        _check_selection(args, sets)
    told: list[str] = []
    compared = ""  # the tokens of ROUGE
    for name, each in sets.items():
        if not has_references(each):
            left_out = f"{', '.join(BY_REFERENCES[:-1])} and {BY_REFERENCES[-1]} are not measured"
            told.append(f"{_called(name)} has no references: {left_out}.")
            continue
        tokens = rouge_tokens(args.rouge_tokenizer, tokenizer)
        compared = tokens.name
        if unread := tokens.told_unread([row.references for row in each]):
            told.append(unread)
            chosen_by = (args.metric_for_best_model or "").removeprefix("eval_")
            if chosen_by in (labeled_set("rouge_l", name), labeled_set("rouge_1", name)):
                args.metric_for_best_model, args.greater_is_better = labeled_set("loss", name), False
                told.append("The checkpoint is chosen by the validation loss, since ROUGE cannot tell them apart here.")
    told = list(dict.fromkeys(told))
    for note in told:
        _LOGGER.warning(note)
    return told + ([] if compared in ("", DEFAULT) else [f"ROUGE compares {compared} (--rouge_tokenizer)."])


def labeled_set(metric: str, name: str) -> str:
    """What transformers calls a metric on the set `name` of several: NAME_METRIC."""
    return f"{name}_{metric}" if name else metric


def set_of(metric: str, names: Iterable[str]) -> str:
    """The one of several sets that `metric` is of; "" where there is one set, or it is of none."""
    return max((name for name in names if name and metric.startswith(f"{name}_")), key=len, default="")


def _check_selection(args: Any, sets: Mapping[str, Rows]) -> None:
    """Refuse a metric to choose the checkpoint by that no validation will measure."""
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    name = set_of(metric, sets)
    if name not in sets:
        listed = ", ".join(labeled_set("loss", each) for each in sets)
        told = f"of one of the sets of eval_dataset, such as {listed}"
        raise RequestError(f"Expected `metric_for_best_model` {told}. Got {args.metric_for_best_model!r}.")
    measured = metric.removeprefix(labeled_set("", name))
    if measured in BY_REFERENCES and not has_references(sets[name]):
        problem = f"{_called(name)} has no references, and `metric_for_best_model` {measured} needs them"
        raise RequestError(f"{problem}. Choose by another, such as kl_to_teacher, or give rows with a response.")


def _called(name: str) -> str:
    return f"eval_dataset[{name!r}]" if name else "eval_dataset"


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
    if isinstance(data, Sequence) and len(data) > 0 and all(isinstance(each, EncodedExample) for each in data):
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
    Rows without references are measured by what needs none. Metrics of several sets are called PREFIX_NAME_METRIC.

    Args:
        data: rows in any of the forms of an eval_dataset, or `EncodedExample`s; a dictionary of them, or the name of
            one of the trainer's own sets; None for all of the trainer's own.
        method: that of a distillation, whose source of responses hears of the loss on the trainer's own rows.

    Raises:
        RequestError: without rows, or for rows that cannot be used.
    """
    own_sets = evaluation_sets(trainer.validation_rows)
    own = data is None or data is trainer.validation_rows
    if own:
        sets = own_sets
    elif isinstance(data, str) and data in own_sets:
        sets = {"": own_sets[data]}
    else:
        sets = {name: _other_rows(trainer, each, method) for name, each in evaluation_sets(data).items()}
    if not any(sets.values()):
        raise RequestError("Validation needs rows: give an eval_dataset.")
    every: list[RowResult] = []
    metrics: dict[str, float] = {}
    seconds = 0.0
    for name, rows in sets.items():
        label = f"{prefix}_{name}" if name else prefix
        found, scored = _validate_set(trainer, rows, label)
        metrics |= found
        every += scored
        seconds += found[f"{label}_seconds"]
    if own:
        best = trainer.state.best_global_step
        others = {step: found for step, found in trainer.validated.items() if step == best}
        trainer.validated = others | {trainer.state.global_step: Validated(every, seconds)}
        losses = [(each.scores["loss"], each.tokens["loss"]) for each in every if "loss" in each.scores]
        if losses and method is not None:
            sums, counts = [loss * tokens for loss, tokens in losses], [tokens for _, tokens in losses]
            method.responses.on_validation(token_mean_interval(sums, counts).value)
    return metrics


def _validate_set(
    trainer: Any, rows: Sequence[EncodedExample], prefix: str
) -> tuple[dict[str, float], list[RowResult]]:
    """Measure one set and log its metrics, all called PREFIX_METRIC; the results are those of all processes."""
    started, args, accelerator = time.perf_counter(), trainer.args, trainer.accelerator
    index, count = accelerator.process_index, accelerator.num_processes
    if is_sharded(accelerator):
        index, count = 0, 1  # a sharded teacher runs on all processes together, so each measures all rows

    with out_of_memory_told(trainer), trainer.phases("validation"):
        scored = measure_student(trainer, rows[index::count])
    scored = _in_order(gather_object(scored), rows) if count > 1 else scored
    metrics = {f"{prefix}_{name}": metric.value for name, metric in summarize(scored).items()}
    metrics |= {f"{prefix}_{name}": kl.value for name, kl in kl_by_teacher(trainer, scored, rows).items()}
    metrics[f"{prefix}_seconds"] = time.perf_counter() - started
    trainer.model.eval()  # what is logged in training mode is a training step's
    trainer.log(dict(metrics))
    trainer.model.train()
    trainer.control = trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
    return metrics, scored
