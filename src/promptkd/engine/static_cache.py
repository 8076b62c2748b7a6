"""Decoding on a static key-value cache: preallocated, without padding, and written in place.

Prompts are packed. Then each step appends one token to every row. The cache is one buffer per layer in which all
prompts end at the same column, so that a step writes one column for all rows. (transformers' dynamic cache copies all
of its contents at every step.)
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine.attention import AttentionSettings, softcapped_attention, use_attention
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import DecodeSession
from promptkd.engine.packed import PackedRows, PackedScorer, pack_inputs

CachedAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes the index of a layer, its query (R, heads, 1, D), key and value (R, key-value heads, 1, D), and returns
(R, 1, heads, D)."""

DecodeBackbone = Callable[[Tensor, Tensor, CachedAttention], Tensor]
"""Takes tokens (R,), their positions (R,) and the attention of every layer, and returns hidden states (R, H)."""


@dataclass
class LayerCache:
    """Keys and values of one layer, for R rows and G key-value heads."""

    keys: Tensor  # (R, G, columns, D)
    values: Tensor
    settings: AttentionSettings


class StaticCacheSession(DecodeSession):
    """Rows of one model. Each kind of device has its own way to count columns and to mask them.

    Args:
        model: in evaluation mode.
        packed: packs the prompts.
        backbone: the layers for one token per row.
        project: hidden states (R, H) to logits (R, V).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: PackedScorer,
        backbone: DecodeBackbone,
        project: Callable[[Tensor], Tensor],
    ):
        self.model, self.packed, self.backbone, self.project = model, packed, backbone, project
        self.layers: dict[int, LayerCache] = {}

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        before = 0 if soft_prompt is None else soft_prompt.shape[0]
        self.allocate([before + len(ids) for ids in prompts])
        pack, inputs = pack_inputs(self.model, prompts, soft_prompt, share=self.packed.shares_prefixes(self.model))
        attention = self.packed.attention(pack, embedding_device(self.model))

        def store_and_attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings
        ) -> Tensor:
            self.store(int(module.layer_idx), pack, key, value, settings)
            return attention(module, query, key, value, settings)

        with use_attention(self.model, store_and_attend):
            hidden = self.model.base_model(use_cache=False, **inputs).last_hidden_state[0]
        return self.project(hidden[on_device([indices[-1] for indices in pack.row_indices], hidden.device)])

    @abstractmethod
    def allocate(self, lengths: Sequence[int]) -> None:
        """Make room for prompts of these lengths, soft prompt included."""

    @abstractmethod
    def store(self, index: int, pack: PackedRows, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Put a pack's keys and values (1, G, S, D) of a layer into its rows."""

    @abstractmethod
    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A `CachedAttention` that first writes key and value into the current column."""


def own_layers(model: PreTrainedModel) -> DecodeBackbone:
    """The model's own layers, with their attention replaced."""

    def backbone(tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        with use_attention(model, lambda module, q, k, v, _: attend(int(module.layer_idx), q, k, v)):
            outputs = model.base_model(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False)
        return outputs.last_hidden_state[:, -1]

    return backbone


def attend_to_columns(layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """(R, 1, heads, D) attention of `query` (R, heads, 1, D) to columns of a cache.

    Args:
        keys, values: (R, G, columns, D).
        mask: (R, 1, 1, columns), True where a row sees a column.
    """
    rows, settings = query.shape[0], layer.settings
    # heads that share keys, side by side
    grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
    if settings.softcap is None:
        attended = scaled_dot_product_attention(grouped, keys, values, mask, scale=settings.scaling)
    else:
        attended = softcapped_attention(grouped, keys, values, mask, settings)
    return attended.reshape(rows, 1, -1, values.shape[-1])
