"""Causal attention within each row of a pack, by torch's varlen attention. It needs no package beside torch."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from promptkd.data.batch import moved
from promptkd.data.prefixes import Pack
from promptkd.engine.attention import Attention
from promptkd.engine.backbone import applies_dropout, compute_dtype
from promptkd.engine.packed import PackedScorer, supports_packing

__all__ = ["CudaPackedScorer", "VarlenAttention"]

_PRECISIONS = {torch.bfloat16, torch.float16}
_WIDEST_HEAD = 256
_PARAMETERS = inspect.signature(varlen.varlen_attn).parameters
_HAS_WINDOWS = {"scale", "window_size"} <= _PARAMETERS.keys()  # torch 2.11 and later
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}  # before 2.12, always


class CudaPackedScorer(PackedScorer):
    """Packed rows, each whole: what several of them begin with is read for each."""

    def attention(self, pack: Pack, device: torch.device) -> Attention:
        return VarlenAttention(pack, device)

    def supports(self, model: PreTrainedModel) -> bool:
        # In float32, rows stay padded. A soft cap is found by the trial, since `attend` refuses it.
        precise = compute_dtype(model) in _PRECISIONS
        return precise and _HAS_WINDOWS and supports_packing(model) and not applies_dropout(model)


class VarlenAttention:
    """Attention within each row of a pack whose rows stand whole."""

    def __init__(self, pack: Pack, device: torch.device):
        ends = torch.tensor([0, *pack.owned]).cumsum(0, dtype=torch.int32)
        self.ends, self.longest = moved(ends, device), max(pack.owned)

    def attend(
        self,
        module: nn.Module | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """(1, S, heads, D) of `query` (1, heads, S, D). See `Attention.attend`.

        Raises:
            NotImplementedError: for a soft cap, dropout, or heads wider than 256, which varlen attention does not have.
        """
        if softcap is not None or dropout > 0 or query.shape[-1] > _WIDEST_HEAD:
            raise NotImplementedError("varlen attention has no soft cap, no dropout, and no heads wider than 256")
        # The operator is not on autocast's lists, and under autocast rotary positions widen queries and keys.
        query, key, value = (each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value))  # (S, heads, D)
        # torch counts the tokens that are seen before a token, transformers those with it
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        ends, longest = self.ends.to(value.device), self.longest  # of a model on several GPUs, the layer's
        attended = varlen.varlen_attn(
            query, key, value, ends, ends, longest, longest, scale=scaling, window_size=window, **_GROUPED
        )
        assert isinstance(attended, Tensor)  # log-sum-exps were not asked for
        return attended[None]
