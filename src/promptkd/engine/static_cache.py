"""Rows of different lengths decoded by one model without padding, on a key-value store that is written in place.

Prompts are packed, each attending to itself alone; then rows go on a token at a time. Keys and values stand in one
buffer per layer, aligned at the right end of the prompts, so that a step writes one column for all rows. transformers'
cache copies everything it holds at every step.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.data.prefixes import Pack
from promptkd.engine.attention import Attention, attention_in_place, softcapped_attention
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import DecodeSession
from promptkd.engine.packed import PackedScorer, pack_inputs, supports_packing

__all__ = ["Attend", "Backbone", "Layer", "RowSession", "StepAttention", "attend_to_columns", "supports_rows"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""The index of a layer, its query (R, heads, 1, D), key and value (R, key-value heads, 1, D), to (R, 1, heads, D)."""

Backbone = Callable[[Tensor, Tensor, Attend], Tensor]
"""Tokens (R,), their positions (R,) and the attention of every layer, to hidden states (R, H)."""


def supports_rows(model: PreTrainedModel) -> bool:
    """Whether rows of this model may be decoded so, as far as its configuration tells."""
    return supports_packing(model)


@dataclass
class Layer:
    """The key-value store of one layer, and what its attention asks for."""

    keys: Tensor
    """(R, G, columns, D) for R rows and G key-value heads."""
    values: Tensor
    scaling: float | None
    sliding_window: int | None
    softcap: float | None


class RowSession(DecodeSession):
    """Rows of one model. How columns are counted, and which are seen, is left to each kind of device.

    Args:
        model: in evaluation mode.
        packed: how prompts are packed.
        backbone: takes a token per row in place of the model's own layers; None for those.
        project: hidden states (R, H) to logits (R, V).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: PackedScorer,
        backbone: Backbone | None,
        project: Callable[[Tensor], Tensor],
    ):
        self.model, self.packed, self.backbone, self.project = model, packed, backbone, project
        self.layers: dict[int, Layer] = {}

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        before = 0 if soft_prompt is None else soft_prompt.shape[0]
        self.begin([before + len(ids) for ids in prompts])
        share = self.packed.shares_prefixes(self.model)
        pack, inputs = pack_inputs(self.model, prompts, soft_prompt, share=share)
        attention = _Prefill(self, pack, self.packed.attention(pack, embedding_device(self.model)))
        with attention_in_place(self.model, attention):
            hidden = self.model.base_model(use_cache=False, **inputs).last_hidden_state[0]
        return self.project(hidden[on_device([path[-1] for path in pack.paths], hidden.device)])

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (R, H) behind `tokens` (R,) at `positions` (R,), whose keys and values go into the store."""
        if self.backbone is not None:
            return self.backbone(tokens, positions, self.attend_to_past)
        with attention_in_place(self.model, StepAttention(self.attend_to_past)):
            hidden = self.model.base_model(
                input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False
            ).last_hidden_state
        return hidden[:, -1]

    @abstractmethod
    def begin(self, lengths: Sequence[int]) -> None:
        """Make room for prompts of these lengths, soft prompt included."""

    @abstractmethod
    def store(self, index: int, pack: Pack, key: Tensor, value: Tensor, **settings: Any) -> None:
        """Put a pack's keys and values (1, G, S, D) of a layer into its rows; `settings` are those of `Layer`."""

    @abstractmethod
    def attend_to_past(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(R, 1, heads, D) of one token per row, whose keys and values take the place of the running column."""


class _Prefill:
    """Attention of the prompts, which stores keys and values on the way."""

    def __init__(self, session: RowSession, pack: Pack, inner: Attention):
        self.session, self.pack, self.inner = session, pack, inner

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        layer = {name: settings[name] for name in ("scaling", "sliding_window", "softcap")}
        self.session.store(int(module.layer_idx), self.pack, key, value, **layer)  # type: ignore[arg-type]
        return self.inner.attend(module, query, key, value, **settings)


class StepAttention:
    """Attention of one token per row inside a model's own layers."""

    def __init__(self, attend: Attend):
        self._attend = attend

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        return self._attend(int(module.layer_idx), query, key, value)  # type: ignore[arg-type]


def attend_to_columns(layer: Layer, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """(R, 1, heads, D) of `query` (R, heads, 1, D) over columns of a store.

    Args:
        keys, values: (R, G, columns, D).
        seen: (R, 1, 1, columns), True where a row has something.
    """
    rows = query.shape[0]
    grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1])  # heads that share keys stand together
    grouped = grouped.to(keys.dtype)
    if layer.softcap is None:
        attended = scaled_dot_product_attention(grouped, keys, values, seen, scale=layer.scaling)
    else:
        scale = query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
        attended = softcapped_attention(grouped, keys, values, seen, scale=scale, softcap=layer.softcap)
    return attended.reshape(rows, 1, -1, values.shape[-1])
