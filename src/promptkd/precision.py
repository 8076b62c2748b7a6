"""The precision in which a model computes.

Trained weights are float32 everywhere, since an update is often smaller than what bfloat16 can add to a weight. Matrix
products run in bfloat16 under autocast where the device has units for it, otherwise in float32. Logits,
log-probabilities, losses and sums are always float32. docs/precision.md has the consequences for each command.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""A precision to compute in. "auto" is bfloat16 where the device has units for it, otherwise float32."""
WeightPrecision = Literal["float32", "bfloat16", "float16", "auto"]
"""A precision to load weights in. "auto" is that of the model's files."""


def has_bfloat16_units(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulated, it is slower than float32.

    CUDA from compute capability 8.0 on, ROCm, CPUs with AVX512-BF16 or AMX, ARM CPUs with the BF16 extension.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if platform.machine() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(choice: Precision, device: torch.device | str) -> torch.dtype:
    """The dtype of a choice; with "auto", the one that suits the device."""
    if choice == "auto":
        return torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def computing(device: torch.device | str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which a model with float32 weights computes in `dtype`: autocast, or none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype=dtype)


def teacher_precision(
    choice: WeightPrecision | None, device: torch.device | str, *, trained: bool = False
) -> WeightPrecision:
    """The precision to load a teacher in: unless chosen, bfloat16 if it is frozen and the device has units for it."""
    return choice or ("bfloat16" if has_bfloat16_units(device) and not trained else "float32")
