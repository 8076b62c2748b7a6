"""Scoring on CUDA: varlen attention by torch's own kernel, and products with the head.

Factors of these products are in half precision, sums and results in float32.
"""

import inspect
import logging
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from promptkd.data.batch import moved
from promptkd.engine.backbone import (
    Attention,
    AttentionSettings,
    UnsupportedError,
    applies_dropout,
    model_matmul_dtype,
)
from promptkd.engine.heads import Head, HeadBackend, Projection
from promptkd.engine.packed import PackedRows, PackedScorer
from promptkd.engine.static_cache import outside_inference_mode
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

_ALIGNMENT = 64  # columns: fast products need the rows of a matrix to begin at multiples of 128 bytes
_DTYPES = {torch.bfloat16, torch.float16}
_WIDEST_HEAD = 256
_PARAMETERS = inspect.signature(varlen.varlen_attn).parameters
_HAS_WINDOWS = {"scale", "window_size"} <= _PARAMETERS.keys()  # torch 2.11 and later
_casts = WeakIdKeyDictionary()  # from a head's weight or bias to its cast, at an address that CUDA graphs read
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}  # before 2.12, always


class CudaPackedScorer(PackedScorer):
    """Packed rows without shared prefixes, in 16-bit precision; in float32, rows stay padded."""

    def attention(self, pack: PackedRows, device: torch.device) -> Attention:
        ends = torch.tensor([0, *pack.own_lengths]).cumsum(0, dtype=torch.int32)
        return partial(_varlen_attention, moved(ends, device), max(pack.own_lengths))

    def supports(self, model: PreTrainedModel) -> bool:
        # whether attention has a soft cap shows in the trial, since `_varlen_attention` refuses it
        precise = model_matmul_dtype(model) in _DTYPES
        return precise and _HAS_WINDOWS and super().supports(model) and not applies_dropout(model)


def _varlen_attention(
    ends: Tensor, longest: int, module: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings
) -> Tensor:
    """An `Attention` within each of the rows that end before `ends`, the longest of `longest` tokens."""
    if settings.softcap is not None or settings.dropout > 0 or query.shape[-1] > _WIDEST_HEAD:
        raise UnsupportedError("varlen attention has no soft cap, no dropout, and no heads wider than 256")
    # Autocast does not know this operator, and under autocast rotary positions make queries and keys float32.
    query, key, value = (each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value))  # (S, heads, D)
    # torch counts the visible tokens before a token; transformers counts the token itself, too
    window = (-1, 0) if settings.sliding_window is None else (settings.sliding_window - 1, 0)
    ends = ends.to(value.device)  # the layer's device, for a model on several GPUs
    attended = varlen.varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=settings.scaling, window_size=window, **_GROUPED
    )
    assert isinstance(attended, Tensor)  # log-sum-exps were not asked for
    return attended[None]


def _projection(head: Head, dtype: torch.dtype) -> Projection:
    if dtype != torch.bfloat16:  # in float16 the smallest gradients would vanish
        return Projection(head, dtype)
    size, bias = head.vocabulary_size, head.bias
    weight = _aligned(head.weight, size, dtype)
    return _HalfProjection(head, weight, None if bias is None else _aligned(bias, size, torch.float32)[:size])


@outside_inference_mode
def _aligned(weight: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """A weight or bias in `dtype`, (V rounded up to 64, …). Its last rows may hold anything.

    It is cast at every call, in a millisecond: fused optimizers overwrite weights without counting versions.
    """
    columns = rounded_up(vocabulary, _ALIGNMENT)
    if weight.dtype == dtype and len(weight) >= columns:
        return weight.detach()[:columns]
    cast = _casts.get(weight)
    if cast is None or cast.dtype != dtype:
        # all rows, however many are asked for: one cast at one address serves every vocabulary
        shape = (rounded_up(len(weight), _ALIGNMENT), *weight.shape[1:])
        cast = _casts[weight] = torch.zeros(shape, dtype=dtype, device=weight.device)
    cast[: len(weight)].copy_(weight)
    return cast[:columns]


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@cache
def _triton_kernels() -> Kernels:
    """Triton's kernels, if a small one runs: it needs a C compiler and Python's headers, which slim images lack."""
    if find_spec("triton") is None:
        return PLAIN_KERNELS
    from promptkd.engine.cuda.triton_kernels import KERNELS

    logits = torch.zeros(1, 8, device="cuda")
    try:
        KERNELS.reverse_kl(logits, logits.clone())
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a C compiler that fails raises subprocess.CalledProcessError, and there are more
        message = "Divergences run by torch's own operations: Triton compiles nothing here (%s)."
        logging.getLogger(__name__).warning(message, error)
        return PLAIN_KERNELS
    return KERNELS


class _HalfProjection(Projection):
    """Products in float32 of factors in half precision, with a weight (V rounded up, H) whose rows are aligned."""

    def __init__(self, head: Head, weight: Tensor, bias: Tensor | None):
        self.head, self.dtype, self.weight, self.bias = head, weight.dtype, weight, bias

    def logits(self, hidden: Tensor) -> Tensor:
        products = _product(hidden.to(self.dtype), self.weight.T)[:, : self.head.vocabulary_size]
        return self.head.transform_(products if self.bias is None else products.add_(self.bias))

    def prepare(self, gradient: Tensor) -> Tensor:
        """(C, V rounded up) in half precision, 0 in the padding columns."""
        padded = gradient.new_zeros(len(gradient), len(self.weight), dtype=self.dtype)
        padded[:, : gradient.shape[1]] = gradient
        return padded

    def hidden_gradient(self, prepared: Tensor) -> Tensor:
        return _product(prepared, self.weight)

    def add_weight_gradient(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        products = _product(prepared.T, hidden.to(self.dtype))[: self.head.vocabulary_size]
        return products if total is None else total.add_(products)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(A, B) x (B, C) of half precision, with sums and results in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _kernels(dtype: torch.dtype) -> Kernels:
    return _triton_kernels() if dtype == torch.float32 else PLAIN_KERNELS


HEAD = HeadBackend(chunk=2048, projection=_projection, kernels=_kernels)
