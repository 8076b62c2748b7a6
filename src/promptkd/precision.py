"""The precision in which a model computes (docs/precision.md).

Trained weights are float32 everywhere, since an update is often smaller than what bfloat16 can add to a weight. Matrix
products run in bfloat16 under autocast where the device has units for it; logits, losses and sums are always float32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from promptkd.engine.units import has_bfloat16_units

Precision = Literal["auto", "float32", "bfloat16"]  # to compute in; auto is what suits the device
WeightPrecision = Literal["float32", "bfloat16", "float16", "auto"]  # to load weights in; auto is that of their files


def compute_dtype(choice: Precision, device: torch.device | str) -> torch.dtype:
    """The dtype of a choice; "auto" is bfloat16 where the device has units for it, otherwise float32."""
    if choice == "auto":
        return torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def computing(device: torch.device | str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which a model with float32 weights computes in `dtype`: autocast, or none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype=dtype)


def model_precision(
    choice: WeightPrecision | None, device: torch.device | str, *, computes: torch.dtype, saved: str
) -> WeightPrecision:
    """The precision to hold a model in that is only run, by the dtype it was `saved` in and the one it `computes` in.

    Unless chosen, that is bfloat16 if it was saved so and a GPU computes in it, else float32.
    """
    is_native = saved == "bfloat16" and computes == torch.bfloat16 and torch.device(device).type != "cpu"
    return choice or ("bfloat16" if is_native else "float32")


def teacher_precision(
    choice: WeightPrecision | None, device: torch.device | str, *, trained: bool = False
) -> WeightPrecision:
    """The precision to load a teacher in: unless chosen, bfloat16 if it is frozen and the device has units for it."""
    return choice or ("bfloat16" if has_bfloat16_units(device) and not trained else "float32")
