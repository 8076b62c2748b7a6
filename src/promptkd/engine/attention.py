"""Replaces the attention of a transformers model for the duration of a forward pass.

transformers builds no mask for an attention function without a registered mask function, and the one registered here
has none. Left on after the pass, it would let rows see padding and each other.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from transformers import AttentionInterface, PreTrainedModel


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer sets for its attention, named as in transformers."""

    scaling: float | None = None  # factor of the scores; None for 1 / sqrt(D)
    dropout: float = 0.0
    sliding_window: int | None = None  # each token sees so many tokens, the last of which is itself
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap)

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


Attention = Callable[[Any, Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""Takes an attention layer, its query (B, heads, T, D), key and value (B, key-value heads, T, D) and its settings, and
returns (B, T, heads, D)."""

_NAME = "promptkd"
_SETTINGS = [each.name for each in fields(AttentionSettings)]
_in_use: list[Attention] = []  # of the forward passes under way, the innermost last


@contextmanager
def use_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Every attention layer of `model` calls `attention` within this context."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    _in_use.append(attention)
    try:
        yield
    finally:
        _in_use.pop()
        model.config._attn_implementation = before


def reuse_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A context with the attention of the pass under way, to recompute its layers after the pass has ended."""
    return use_attention(model, _in_use[-1]) if model.config._attn_implementation == _NAME else nullcontext()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    if not _in_use:
        raise RuntimeError("promptkd's attention was called outside of a forward pass by promptkd.")
    if settings.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    known = AttentionSettings(**{name: settings[name] for name in _SETTINGS if name in settings})
    return _in_use[-1](module, query, key, value, known), None


AttentionInterface.register(_NAME, _attend)


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: AttentionSettings
) -> Tensor:
    """As torch's `scaled_dot_product_attention` with grouped heads, of scores softcap · tanh(scores / softcap)."""
    assert settings.softcap is not None
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * settings.scale(query) / settings.softcap) * settings.softcap
    wide = torch.promote_types(torch.float32, query.dtype)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(query.dtype)
    return dropout(weights, settings.dropout) @ value
