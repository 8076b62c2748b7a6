"""Causal attention within each row of a pack, row by row, on torch's flash attention for CPUs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from promptkd.data.prefixes import Pack
from promptkd.engine.attention import softcapped_attention
from promptkd.engine.backbone import applies_dropout
from promptkd.engine.packed import PackedScorer

__all__ = ["CpuPackedScorer", "RowByRowAttention"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuPackedScorer(PackedScorer):
    """Packed rows; what several of them begin with is read once."""

    def attention(self, pack: Pack, device: torch.device) -> "RowByRowAttention":
        return RowByRowAttention(pack)

    def shares_prefixes(self, model: Any) -> bool:
        return not applies_dropout(model)  # dropout would drop the same in all rows that share a token


class RowByRowAttention:
    """Attention within each row of a pack.

    A row is attended to as a whole; of what comes out for places that it shares, the first row's is taken, as all are
    equal. (A mask that spared them would cost more: they are few.)
    """

    def __init__(self, pack: Pack):
        self.pack = pack

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
        """(1, S, heads, D) of `query` (1, heads, S, D). See `Attention.attend`."""
        pack, scale = self.pack, query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions widen them
        fits = sliding_window is None or max(map(len, pack.paths)) <= sliding_window
        if fits and softcap is None and dropout == 0 and query.shape[-1] == value.shape[-1]:
            return _WholeRows.apply(query, key, value, pack, scale)
        outputs = []
        for runs, owned in zip(pack.runs, pack.owned, strict=True):
            if owned == 0:
                continue
            q, k, v = (_joined(each, runs) for each in (query, key, value))
            seen = None if fits and softcap is None else _visible(q.shape[2], sliding_window, q.device)
            if softcap is None:
                output = scaled_dot_product_attention(
                    q, k, v, seen, dropout, seen is None, scale=scale, enable_gqa=True
                )
            else:
                assert seen is not None
                output = softcapped_attention(q, k, v, seen, scale=scale, softcap=softcap, dropout=dropout)
            outputs.append(output[:, :, -owned:].transpose(1, 2))
        return torch.cat(outputs, dim=1)


class _WholeRows(torch.autograd.Function):
    """Plain causal attention of every row.

    With a function for all rows, gradients are summed where they belong; autograd would fill and add a tensor of the
    whole pack for every row. It calls what `scaled_dot_product_attention` calls on CPU.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
        outputs = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)  # (1, S, heads, D)
        sums = []
        for runs, owned in zip(pack.runs, pack.owned, strict=True):
            if owned > 0:
                row = (_joined(each, runs) for each in (query, key, value))
                output, sums_of_row = _flash(*row, 0.0, True, scale=scale)
                outputs[:, runs[-1].stop - owned : runs[-1].stop] = output[:, :, -owned:].transpose(1, 2)
                sums.append(sums_of_row)
        ctx.save_for_backward(query, key, value, outputs, *sums)
        ctx.pack, ctx.scale = pack, scale
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, outputs, *sums = ctx.saved_tensors
        gradients = [_zeros(each) for each in (query, key, value)]
        rows = [(runs, owned) for runs, owned in zip(ctx.pack.runs, ctx.pack.owned, strict=True) if owned > 0]
        for (runs, owned), sums_of_row in zip(rows, sums, strict=True):
            row = [_joined(each, runs) for each in (query, key, value, outputs.transpose(1, 2))]
            upstream = gradient[:, runs[-1].stop - owned : runs[-1].stop].transpose(1, 2)
            shared = row[0].shape[2] - owned
            if shared > 0:  # what comes out there belongs to an earlier row
                upstream = pad(upstream, (0, 0, shared, 0))
            parts = _flash_backward(upstream, *row, sums_of_row, 0.0, True, scale=ctx.scale)
            for whole, part in zip(gradients, parts, strict=True):
                for run, piece in zip(runs, part.split([run.stop - run.start for run in runs], dim=2), strict=True):
                    whole[:, :, run] += piece
        to_query, to_key, to_value = (each.to(query.dtype) for each in gradients)
        return to_query, to_key, to_value, None, None


def _zeros(states: Tensor) -> Tensor:
    """For sums over rows that share a place, in float32 or wider."""
    wide = torch.promote_types(torch.float32, states.dtype)
    return torch.zeros_like(states, dtype=wide, memory_format=torch.contiguous_format)


def _joined(states: Tensor, runs: Sequence[slice]) -> Tensor:
    """The states (1, heads, T, D) of a row that stands in `runs` of the pack."""
    pieces = [states[:, :, run] for run in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _visible(size: int, window: int | None, device: torch.device) -> Tensor:
    """(size, size), True where a token of the row sees another: itself and what stands before it, within the window."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)
