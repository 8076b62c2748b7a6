"""The device that measures: its precision, its rows at a time, and models and rows loaded for it."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from promptkd.cli.terminal import say
from promptkd.data import encode_examples, read_examples
from promptkd.engine import check_scoring, engine_for
from promptkd.memory import gibibytes, peak_memory
from promptkd.models import load_model
from promptkd.precision import Precision, WeightPrecision, compute_dtype, computing, teacher_precision


def settled_rows(batch_size: int | None) -> int:
    """How many rows --batch-size comes to on the device that measures: as many as in training, unless it says so."""
    return engine_for(measuring_device()).decode_rows if batch_size is None else batch_size


def measuring_device() -> torch.device:
    """The fastest device there is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settled_precision(choice: Precision) -> str:
    """The precision that --dtype comes to on the device that measures: float32 or bfloat16. It is said."""
    device = measuring_device()
    name = str(compute_dtype(choice, device)).removeprefix("torch.")
    say(f"Computing in {name} on {device.type}.")
    return name


def computing_in(precision: str) -> AbstractContextManager[object]:
    """What models with float32 weights run in, to compute as `settled_precision` says."""
    return computing(measuring_device(), {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision])


def precision_notes(precision: str, teacher_dtype: str | None = None) -> list[str]:
    """What the record says of it; its config holds what was asked for, the same on every machine."""
    notes = [f"Computed in {precision} on {measuring_device().type}."]
    return notes if teacher_dtype is None else [*notes, f"The teacher's weights were loaded in {teacher_dtype}."]


def teacher_precision_here(choice: WeightPrecision | None) -> WeightPrecision:
    """The precision of a teacher's weights that --teacher-dtype comes to on the device that measures."""
    return teacher_precision(choice, measuring_device())


def load_subject(name: str, trust_remote_code: bool, dtype: WeightPrecision = "float32") -> Any:
    """A model that can be scored, with weights of `dtype`, on the device that measures."""
    model = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).to(measuring_device())
    check_scoring(model)
    return model


def measured_rows(
    options: Any, source: str, tokenizer: Any, *, need_response: bool = True, max_reference_length: int | None = None
) -> Any:
    """The rows of one data set, encoded as the options say; a reference has a response's limit unless one is given."""
    return encode_examples(
        read_examples(source, limit=options.limit),
        tokenizer,
        options.template,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_completion_length if max_reference_length is None else max_reference_length,
        need_response=need_response,
    )


def say_peak() -> None:
    """Say the peak of a command that measures: of the GPU where it used one, else of the process."""
    of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    say(f"Peak memory {gibibytes(of_device or peak_memory())}.")
