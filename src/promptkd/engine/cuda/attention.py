"""Varlen attention on CUDA: causal within each row of a pack, by torch's own kernel."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from promptkd.data.batch import moved
from promptkd.engine.attention import Attention, AttentionSettings
from promptkd.engine.backbone import applies_dropout, model_matmul_dtype
from promptkd.engine.packed import PackedRows, PackedScorer

_DTYPES = {torch.bfloat16, torch.float16}
_WIDEST_HEAD = 256
_PARAMETERS = inspect.signature(varlen.varlen_attn).parameters
_HAS_WINDOWS = {"scale", "window_size"} <= _PARAMETERS.keys()  # torch 2.11 and later
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
        raise NotImplementedError("varlen attention has no soft cap, no dropout, and no heads wider than 256")
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
