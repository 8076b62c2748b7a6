"""What a `DistillTrainer` is given, in the forms that transformers' and TRL's trainers take, and what it refuses."""

from collections.abc import Iterable, Mapping, Sized
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data import EncodedData
from promptkd.data.chat_form import template_of_training
from promptkd.data.messages import without_nulls
from promptkd.data.templates import Template
from promptkd.engine import unwrap_peft
from promptkd.errors import RequestError
from promptkd.models import load_tokenizer, resolve_model
from promptkd.models.merge import base_name
from promptkd.training.config import DistillConfig, PromptKDConfig, student_revision

_METRICS = "validation measures what `promptkd evaluate` does; for a metric of your own see its --metrics"
_INSTEAD = {  # of the arguments of transformers' Trainer and of TRL's trainers
    "compute_loss_func": "the loss is the method's: give a `Method` of your own as method",
    "compute_metrics": _METRICS,
    "data_collator": "rows are batched without one; leave it out",
    "formatting_func": "rows are read in the forms of docs/data.md; give `columns` or `template` in the settings",
    "model_init": "give the student as model",
    "optimizer_cls_and_kwargs": "give `optim` and `optim_args` in the settings, or optimizers",
    "preprocess_logits_for_metrics": _METRICS,
    "tools": "no tool is called while responses are sampled; for tools that the prompt only lists, give every row a "
    "column `tools` of their JSON schemas",
}


def own_settings(args: Any) -> DistillConfig:
    """A trainer's own copy of the settings, in which it may settle some, so that another can be made with them too.

    `RequestError` for settings of another class: fields of the same name have other defaults and meanings there.
    """
    if args is None:
        return DistillConfig("distilled")
    if not isinstance(args, DistillConfig):
        raise RequestError(
            f"Expected a DistillConfig or PromptKDConfig as `args`. Got {_class(args)}. Give the same settings to "
            "DistillConfig(...): it has every field of trl.DistillationConfig, but some defaults and `temperature` "
            "differ, as docs/differences.md says."
        )
    return copy(args)


def promptkd_settings(args: Any) -> Any:
    """The settings of a `PromptKDTrainer`. `RequestError` for those of another method."""
    if args is None:
        return PromptKDConfig("promptkd")
    if isinstance(args, DistillConfig) and not args.method.startswith("promptkd"):
        told = f"PromptKDTrainer trains PromptKD alone. Got settings of method {args.method!r}"
        raise RequestError(f"{told}; give them to DistillTrainer.")
    return args


def template_to_save(data: EncodedData | None, args: Any, tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The template of the training's prompts, which is saved with the model; None where it is not known."""
    if data is None:
        return None
    return template_of_training(data, args.template, tokenizer, args.chat_template_kwargs)


def refuse_others(given: Mapping[str, Any], trainer: str) -> None:
    """Refuse arguments of other trainers, unless they are None or empty; `TypeError` for those of none."""
    for name, value in given.items():
        if name not in _INSTEAD:
            raise TypeError(f"{trainer} has no argument {name!r}.")
        if value:
            raise RequestError(f"{trainer} has no argument {name!r}: {_INSTEAD[name]}.")


def student_and_tokenizer(
    model: str | Path | PreTrainedModel, processing_class: Any, args: DistillConfig
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """The student, or where its files are, and its tokenizer: the given one, or that of the model's name.

    `RequestError` if that name leads to no tokenizer, and for a processor of images.
    """
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        advice = "models are trained on text alone: of a processor give its tokenizer"
        raise RequestError(f"Expected a tokenizer as `processing_class`. Got {_class(processing_class)}; {advice}.")
    of_files: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "revision": student_revision(args)}
    if isinstance(model, str | Path):
        model = resolve_model(model)
        return model, processing_class or load_tokenizer(model, **of_files)
    if processing_class is not None:
        return model, processing_class
    expected = "Expected the tokenizer as `processing_class` beside a loaded model"
    name = base_name(model) or unwrap_peft(model).name_or_path
    if not name:
        raise RequestError(f"{expected} that has no name. Got None.")
    try:
        return model, load_tokenizer(name, **of_files)
    except RequestError as error:
        raise RequestError(f"{expected}, since its name, {name}, leads to none. {error}") from error


def training_rows(rows: Any, args: DistillConfig) -> Any:
    """Rows to train on, of which `len` is known: of a stream the first `max_steps` x rows of an optimizer step.

    `RequestError` for several data sets, for what holds no rows, and for a stream without `max_steps`.
    """
    if isinstance(rows, Mapping):
        first, names = next(iter(rows), "train"), ", ".join(map(repr, rows)) or "none"
        raise RequestError(f"Expected one data set as `train_dataset`, such as data[{first!r}]. Got several: {names}.")
    rows = listed(rows, "train_dataset")
    if rows is None or isinstance(rows, EncodedData | Sized):
        return rows
    if args.max_steps < 1:
        raise RequestError(
            f"`train_dataset` is a stream ({_class(rows)}), which may have no end. Give max_steps, which takes as many "
            "rows as its steps need, or a list of the rows."
        )
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    taken = islice(rows, args.max_steps * window)
    return [without_nulls(row) for row in taken] if isinstance(rows, IterableDataset) else list(taken)


def listed(rows: Any, name: str) -> Any:
    """`rows`, unless they are a text or nothing to go through."""
    if isinstance(rows, str | Path):
        advice = "`datasets.load_dataset` reads a file"
        raise RequestError(f"Expected rows as `{name}`. Got the text {str(rows)!r:.100}; {advice}.")
    if not (rows is None or isinstance(rows, EncodedData | Sized | Iterable)):
        raise RequestError(f"Expected rows as `{name}`, such as a list of dictionaries. Got {_class(rows)}.")
    return rows


def evaluation_sets(rows: Any) -> dict[str, Any]:
    """Rows to validate on, by the names of their sets; the only one has none. Empty without."""
    if not isinstance(rows, Mapping):
        return {} if rows is None else {"": listed(rows, "eval_dataset")}
    if not (rows and all(map(str, rows))):
        raise RequestError(
            f"Expected data sets under their names in `eval_dataset`. Got {', '.join(map(repr, rows)) or 'none'}."
        )
    return {str(name): listed(each, f"eval_dataset[{name!r}]") for name, each in rows.items()}


def refuse_prediction(trainer: Any, *args: Any, **kwargs: Any) -> None:
    """For `Trainer.predict`, which would return logits of whole rows."""
    raise RequestError(
        "`predict` is not supported: `evaluate` measures rows, and `promptkd generate` writes responses."
    )


def _class(value: Any) -> str:
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}"
