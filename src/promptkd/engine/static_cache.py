"""Decoding on a static key-value cache: preallocated, and written in place.

Prompts are packed. The cache is one buffer per layer in which all prompts end at the same column, so that a step writes
one column for all rows. (transformers' dynamic cache copies all of its contents at every step.)
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine.attention import AttentionSettings, softcapped_attention, use_attention
from promptkd.engine.backbone import embedding_device
from promptkd.engine.base import DecodeSession
from promptkd.engine.packed import PackedScorer, pack_inputs

P = ParamSpec("P")
R = TypeVar("R")

CachedAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes the index of a layer, its query (R, heads, 1, D), key and value (R, key-value heads, 1, D), and returns
(R, 1, heads, D)."""

DecodeBackbone = Callable[[Tensor, Tensor, CachedAttention], Tensor]
"""Takes tokens (R,), their positions (R,) and the attention of every layer, and returns hidden states (R, H)."""


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """For methods whose tensors outlive the call: those made in inference mode cannot be overwritten outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@dataclass
class LayerCache:
    """Keys and values of one layer, for R rows and G key-value heads."""

    keys: Tensor  # (R, G, columns, D)
    values: Tensor
    settings: AttentionSettings


Allocation = tuple[int, dict[int, LayerCache], Tensor, Tensor]
"""Filled columns; the cache of each layer, as `StaticCacheSession.layer` makes them; and in the first R places, the
position of each row's next token and the column of its first one."""


@dataclass
class StaticCacheSession(DecodeSession):
    """Rows of one model. Each kind of device allocates and masks columns in its own way."""

    model: PreTrainedModel  # in evaluation mode
    packed: PackedScorer  # packs the prompts
    backbone: DecodeBackbone
    project: Callable[[Tensor], Tensor]  # hidden states (R, H) to logits (R, V)
    max_new_tokens: int  # most tokens that may follow a prompt

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        device = embedding_device(self.model)
        pack, inputs = pack_inputs(self.model, prompts, soft_prompt, share=self.packed.shares_prefixes(self.model))
        lengths = [len(indices) for indices in pack.row_indices]
        self.rows = len(lengths)
        self.width, self.layers, self.positions, self.first = self.allocate(lengths, device)
        rows = [row for row, length in enumerate(lengths) for _ in range(length)]
        columns = [column for length in lengths for column in range(self.width - length, self.width)]
        places = on_device([rows, columns, [*chain(*pack.row_indices)]], device)
        attention = self.packed.attention(pack, device)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
            self._store(self.layer(int(module.layer_idx), key, value, settings), places, key, value)
            return attention(module, query, key, value, settings)

        with use_attention(self.model, attend):
            hidden = self.model.base_model(use_cache=False, **inputs).last_hidden_state[0]
        return self.project(hidden[on_device([indices[-1] for indices in pack.row_indices], hidden.device)])

    @outside_inference_mode
    def _store(self, layer: LayerCache, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Put keys and values (1, G, S, D) of a pack's tokens into their rows and columns."""
        rows, columns, tokens = places
        for cache, states in ((layer.keys, key), (layer.values, value)):
            cache[rows, :, columns] = states[0].transpose(0, 1)[tokens].to(cache.dtype)

    def select(self, rows: Sequence[int]) -> None:
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        if moves:
            to, source = on_device(moves, self.positions.device).T
            for layer in self.layers.values():
                for each in (layer.keys, layer.values):
                    each[to, :, : self.width] = each[source, :, : self.width]
            for numbers in (self.positions, self.first):
                numbers[to] = numbers[source]
        self.rows = len(rows)

    @abstractmethod
    def allocate(self, lengths: Sequence[int], device: torch.device) -> Allocation:
        """For prompts of these lengths, soft prompt included."""

    @abstractmethod
    def layer(self, index: int, key: Tensor, value: Tensor, settings: AttentionSettings) -> LayerCache:
        """The cache of a layer, for keys and values of these widths."""

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
    """(R, 1, heads, D) attention of `query` (R, heads, 1, D) to keys and values (R, G, columns, D).

    `mask` (R, 1, 1, columns) is True where a row sees a column.
    """
    rows, settings = query.shape[0], layer.settings
    # heads that share keys, side by side
    grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
    if settings.softcap is None:
        attended = scaled_dot_product_attention(grouped, keys, values, mask, scale=settings.scaling)
    else:
        attended = softcapped_attention(grouped, keys, values, mask, settings)
    return attended.reshape(rows, 1, -1, values.shape[-1])
