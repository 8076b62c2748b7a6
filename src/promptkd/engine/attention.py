"""Attention of our own inside a transformers model, for as long as a forward runs.

Under the name that is registered here no mask function is registered, so transformers makes no mask. What is in place
must therefore never outlast a forward: without rows to keep apart, every row would see padding and every other row.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from transformers import AttentionInterface, PreTrainedModel

__all__ = ["Attention", "attention_in_place", "in_place_again", "softcapped_attention"]

_NAME = "promptkd"
_running: list["Attention"] = []  # of the forwards that run; the last one counts


class Attention(Protocol):
    """What takes the place of a model's attention."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        dropout: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(B, T, heads, D) of `query` (B, heads, T, D), `key` and `value` (B, key-value heads, T, D).

        Args:
            module: the attention layer that asks.
            sliding_window: a token sees itself and the `sliding_window` - 1 tokens before it.
            softcap: scores become softcap · tanh(scores / softcap).
        """


@contextmanager
def attention_in_place(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Every attention layer of `model` asks `attention` while this is entered."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    _running.append(attention)
    try:
        yield
    finally:
        _running.pop()
        model.config._attn_implementation = before


def in_place_again(model: PreTrainedModel) -> AbstractContextManager[None]:
    """What is in place for the pass of `model` that runs now, for its layers to be computed again when it is over."""
    if model.config._attn_implementation != _NAME:
        return nullcontext()
    return attention_in_place(model, _running[-1])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if not _running:
        raise RuntimeError("The attention of promptkd was left on outside of a forward of promptkd.")
    if settings.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    attended = _running[-1].attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        dropout=dropout,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return attended, None


AttentionInterface.register(_NAME, _attend)


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
