"""Rows side by side in one sequence, so that no padding is computed.

Positions begin anew with every row, and the rows' ends go along as the `cu_seq_lens` that transformers hands to its
attention functions. Flash attention reads them on GPUs; on CPU `row_attention` does, which is in place only while a
pack runs: it needs no mask, and decoding, which does need one, must never meet it.

Whether a model keeps the rows of a pack apart is tried once, on four tokens; the others are scored padded.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from promptkd.data.packing import TokenBatch
from promptkd.switches import switched_on

__all__ = ["attention_in_place", "packed_hidden", "packs", "row_attention", "softcapped_attention"]

_ROWS = "promptkd_rows"
_LONGEST = 1024  # tokens in a pack on CPU: more make the matrix products no faster

_known: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_logger = logging.getLogger(__name__)


def packs(inner: PreTrainedModel) -> bool:
    """Whether rows that stand side by side in one sequence do not see each other in this model."""
    if not switched_on("packing") or not _has_row_attention(inner):
        return False
    if inner not in _known:
        _known[inner] = _keeps_rows_apart(inner)
        _logger.info("%s scores rows %s.", type(inner).__name__, "packed" if _known[inner] else "padded")
    return _known[inner]


def _has_row_attention(inner: PreTrainedModel) -> bool:
    """Whether attention can be told where rows end: what transformers says of a class for flash attention."""
    if inner.get_input_embeddings().weight.device.type == "cpu":
        # transformers recomputes activations after the pack, when `row_attention` is no longer in place.
        recomputes = inner.is_activation_checkpointing and torch.is_grad_enabled()
        return inner._supports_flash_attn and not recomputes
    return "flash_attention" in str(inner.config._attn_implementation)


def _keeps_rows_apart(inner: PreTrainedModel) -> bool:
    device = inner.get_input_embeddings().weight.device
    ids = torch.tensor([0, 1, 2, 3], device=device)
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            both = _run_pack(inner, {"input_ids": ids[None]}, [2, 2])
            alone = inner.base_model(input_ids=ids[None, 2:], use_cache=False).last_hidden_state[0]
    finally:
        inner.train(training)
    tolerance = max(1e-3, torch.finfo(alone.dtype).eps ** 0.5)
    return float((both[2:] - alone).abs().max()) <= tolerance * float(alone.abs().max())


def packed_hidden(inner: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
    """`response_hidden` without padding: (N, H), in the order of `batch.targets`."""
    parts = batch.parts(_LONGEST) if batch.input_ids.device.type == "cpu" else [batch]
    return torch.cat([_pack(inner, part, prompt) for part in parts])


def _pack(inner: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
    ids = torch.cat([row[:length] for row, length in zip(batch.input_ids, batch.lengths, strict=True)])
    length = 0 if prompt is None else prompt.shape[0]
    sizes = [tokens + length for tokens in batch.lengths]
    if prompt is None:
        inputs = {"input_ids": ids[None]}
    else:
        embedded = inner.get_input_embeddings()(ids)  # (S, E), scaled where the model scales
        before = prompt.to(embedded.dtype)
        pieces = embedded.split(list(batch.lengths))
        inputs = {"inputs_embeds": torch.cat([part for piece in pieces for part in (before, piece)])[None]}
    hidden = _run_pack(inner, inputs, sizes)
    starts = torch.tensor([0, *sizes[:-1]], device=hidden.device).cumsum(0)
    return hidden[starts[batch.rows] + batch.columns + length]


def _run_pack(inner: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int]) -> Tensor:
    """Last hidden states (S, H) of rows of `sizes` tokens that stand side by side, S = Σ sizes."""
    device = next(iter(inputs.values())).device
    positions = torch.cat([torch.arange(size, device=device) for size in sizes])
    ends = torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)
    rows = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(sizes), "max_length_k": max(sizes)}
    with attention_in_place(inner, _ROWS) if device.type == "cpu" else contextlib.nullcontext():
        output = inner.base_model(**inputs, position_ids=positions[None], use_cache=False, **rows)
    return output.last_hidden_state[0]


@contextmanager
def attention_in_place(inner: PreTrainedModel, name: str) -> Iterator[None]:
    """The attention function of that name for a while."""
    before = inner.config._attn_implementation
    inner.config._attn_implementation = name
    try:
        yield
    finally:
        inner.config._attn_implementation = before


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack, as transformers calls its attention functions.

    Args:
        query: (1, heads, S, D).
        key, value: (1, key-value heads, S, D).
        attention_mask: none; the rows' ends say it all.
        cu_seq_lens_q: (rows + 1,) ends of the rows, from 0 to S.
        sliding_window: a token sees itself and the `sliding_window` - 1 tokens before it.
        softcap: scores become softcap · tanh(scores / softcap).

    Returns:
        (1, S, heads, D), and no attention weights.
    """
    sizes = cu_seq_lens_q.diff().tolist()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, k, v in zip(*(each.split(sizes, dim=2) for each in (query, key, value)), strict=True):
        if softcap is not None:
            seen = _visible(q.shape[2], sliding_window, q.device)
            output = softcapped_attention(q, k, v, seen, scale=scale, softcap=softcap, dropout=dropout)
        elif sliding_window is not None and q.shape[2] > sliding_window:
            mask = _visible(q.shape[2], sliding_window, q.device)
            output = scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=True)
        else:
            output = scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float, softcap: float, dropout: float = 0.0
) -> Tensor:
    """(B, heads, T, D) attention with scores softcap · tanh(scale · query · key / softcap).

    Args:
        query: (B, heads, T, D).
        key, value: (B, key-value heads, S, D).
        seen: True where a position sees a column, of a shape that (B, heads, T, S) takes.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    wide = torch.promote_types(torch.float32, query.dtype)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(query.dtype)
    return drop(weights, dropout) @ value


def _visible(size: int, window: int | None, device: torch.device) -> Tensor:
    """(size, size), True where a token of the row sees another: itself and what stands before it, within the window."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


AttentionInterface.register(_ROWS, row_attention)
