"""Scoring on CPU: varlen attention row by row, by torch's flash attention for CPUs, and products with the head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from promptkd.engine.backbone import Attention, AttentionSettings, applies_dropout, softcapped_attention
from promptkd.engine.heads import HeadBackend, Projection
from promptkd.engine.packed import PackedRows, PackedScorer

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuPackedScorer(PackedScorer):
    """Packed rows that share their common prefixes."""

    def attention(self, pack: PackedRows, device: torch.device) -> Attention:
        return partial(varlen_attention, pack)

    def shares_prefixes(self, model: Any) -> bool:
        return not applies_dropout(model)  # rows that share a token would share what dropout drops


def varlen_attention(
    pack: PackedRows, module: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings
) -> Tensor:
    """An `Attention` within each row of a pack.

    Each row is attended to completely. At shared tokens the output of the first row is taken, since all are equal.
    Skipping these tokens by a mask would cost more where they are few; where a pack `skips_shared`, that is done for
    the rows of which they are half or more.
    """
    scale, window, softcap = settings.scale(query), settings.sliding_window, settings.softcap
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions are float32
    fits = window is None or max(map(len, pack.row_indices)) <= window
    if fits and softcap is None and settings.dropout == 0 and query.shape[-1] == value.shape[-1]:
        return _CausalAttention.apply(query, key, value, pack, scale)
    outputs = []
    for slices, own in _rows(pack):
        q, k, v = (_gather(each, slices) for each in (query, key, value))
        length, causal = q.shape[2], fits and softcap is None
        mask = None
        if not causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - (window or length))
        if softcap is None or mask is None:
            output = scaled_dot_product_attention(q, k, v, mask, settings.dropout, causal, scale=scale, enable_gqa=True)
        else:
            output = softcapped_attention(q, k, v, mask, settings)
        outputs.append(output[:, :, -own:].transpose(1, 2))
    return torch.cat(outputs, dim=1)


class _CausalAttention(torch.autograd.Function):
    """Plain causal attention of every row, by what `scaled_dot_product_attention` calls on CPU.

    One function for all rows sums gradients where they belong. Autograd would fill and add a tensor of the size of the
    pack for every row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: PackedRows, scale: float) -> Tensor:
        outputs = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)  # (1, S, heads, D)
        log_sum_exps = []
        for slices, own in _rows(pack):
            row, causal = _read(pack, slices, own, query, key, value)
            output, log_sum_exp = _flash(*row, 0.0, scale=scale, **causal)
            outputs[:, slices[-1].stop - own : slices[-1].stop] = output[:, :, -own:].transpose(1, 2)
            log_sum_exps.append(log_sum_exp)
        ctx.save_for_backward(query, key, value, outputs, *log_sum_exps)
        ctx.pack, ctx.scale = pack, scale
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, outputs, *log_sum_exps = ctx.saved_tensors
        inputs, wide = (query, key, value), torch.promote_types(torch.float32, query.dtype)
        # over the rows that share a token
        sums = [torch.zeros_like(each, dtype=wide, memory_format=torch.contiguous_format) for each in inputs]
        for (slices, own), log_sum_exp in zip(_rows(ctx.pack), log_sum_exps, strict=True):
            row, causal = _read(ctx.pack, slices, own, *inputs)
            length, last = row[0].shape[2], slice(slices[-1].stop - own, slices[-1].stop)
            upstream = gradient[:, last].transpose(1, 2)
            if length > own:  # the outputs of shared tokens are those of an earlier row
                upstream = pad(upstream, (0, 0, length - own, 0))
            read = slices if length == row[1].shape[2] else [last]  # the queries
            output = _gather(outputs.transpose(1, 2), read)
            parts = _flash_backward(upstream, *row, output, log_sum_exp, 0.0, scale=ctx.scale, **causal)
            for total, part, places in zip(sums, parts, (read, slices, slices), strict=True):
                lengths = [each.stop - each.start for each in places]
                for place, piece in zip(places, part.split(lengths, dim=2), strict=True):
                    total[:, :, place] += piece
        return *(each.to(query.dtype) for each in sums), None, None


def _rows(pack: PackedRows) -> Iterator[tuple[list[slice], int]]:
    """The slices of each row that has tokens of its own, and their number."""
    return ((slices, own) for slices, own in zip(pack.row_slices, pack.own_lengths, strict=True) if own > 0)


def _read(
    pack: PackedRows, slices: Sequence[slice], own: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and value of a row, and how it is attended to: by its own queries alone where others are skipped."""
    keys = [_gather(each, slices) for each in (key, value)]
    length = keys[0].shape[2]
    if not pack.skips_shared or 2 * own > length:
        return [_gather(query, slices), *keys], {"is_causal": True}
    unseen = torch.ones(own, length, dtype=torch.bool, device=query.device).triu(length - own + 1)
    mask = torch.zeros(own, length, dtype=query.dtype, device=query.device).masked_fill(unseen, -torch.inf)
    return [query[:, :, slices[-1].stop - own : slices[-1].stop], *keys], {"is_causal": False, "attn_mask": mask}


def _gather(states: Tensor, slices: Sequence[slice]) -> Tensor:
    """The states (1, heads, T, D) of a row, from those of the pack."""
    pieces = [states[:, :, each] for each in slices]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class _CpuProjection(Projection):
    """Logits in one buffer, since fresh memory costs about as much as the arithmetic on it.

    torch has no bfloat16 products on CPU with float32 sums. So the factors are float32, and where bfloat16 was asked
    for, oneDNN may round them, as it does on CPUs that multiply bfloat16.
    """

    _buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = self.weight.new_empty(len(hidden), len(self.weight))
        products, wide = self._buffer[: len(hidden)], hidden.to(self.head.logits_dtype)
        with _factors_may_round_to(self.dtype):
            if self.bias is None:
                torch.mm(wide, self.weight.T, out=products)
            else:
                torch.addmm(self.bias, wide, self.weight.T, out=products)
        return self.head.transform_(products)

    def hidden_gradient(self, prepared: Tensor) -> Tensor:
        with _factors_may_round_to(self.dtype):
            return super().hidden_gradient(prepared)

    def add_weight_gradient(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        with _factors_may_round_to(self.dtype):
            return super().add_weight_gradient(total, prepared, hidden)


@contextmanager
def _factors_may_round_to(dtype: torch.dtype) -> Iterator[None]:
    """For bfloat16, float32 products whose factors may be rounded to it; otherwise torch's own setting."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if dtype != torch.bfloat16:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


# Divergences want few tokens at a time: a block has 2 MiB in float32, so that its few temporaries stay in cache.
HEAD = HeadBackend(block=2**19, projection=_CpuProjection)
