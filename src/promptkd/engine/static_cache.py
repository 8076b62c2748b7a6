"""Decoding on a static key-value cache: preallocated, without padding, and written in place.

Prompts are packed. Then each step appends one token to every row. The cache is one buffer per layer in which all
prompts end at the same column, so that a step writes one column for all rows. (transformers' dynamic cache copies all
of its contents at every step.)
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class StaticCacheSession(DecodeSession):
    """Rows of one model. Each kind of device allocates and masks columns in its own way.

    Args:
        model: in evaluation mode.
        packed: packs the prompts.
        backbone: the layers for one token per row.
        project: hidden states (R, H) to logits (R, V).
        max_new_tokens: most tokens that may follow a prompt.
    """

    layers: dict[int, LayerCache]
    positions: Tensor  # of each row's next token, in the first R places
    first: Tensor  # the column of each row's first token, in the first R places

    def __init__(
        self,
        model: PreTrainedModel,
        packed: PackedScorer,
        backbone: DecodeBackbone,
        project: Callable[[Tensor], Tensor],
        max_new_tokens: int,
    ):
        self.model, self.packed, self.backbone, self.project = model, packed, backbone, project
        self.max_new_tokens, self.device = max_new_tokens, embedding_device(model)
        self.rows = self.width = 0  # rows, and filled columns

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        before = 0 if soft_prompt is None else soft_prompt.shape[0]
        self.rows = len(prompts)
        self.allocate([before + len(ids) for ids in prompts])
        pack, inputs = pack_inputs(self.model, prompts, soft_prompt, share=self.packed.shares_prefixes(self.model))
        rows = [row for row, indices in enumerate(pack.row_indices) for _ in indices]
        columns = [self.width - place for indices in pack.row_indices for place in range(len(indices), 0, -1)]
        tokens = [index for indices in pack.row_indices for index in indices]
        places = on_device([rows, columns, tokens], self.device)
        attention = self.packed.attention(pack, self.device)

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
            to, source = on_device(moves, self.device).T
            for layer in self.layers.values():
                for each in (layer.keys, layer.values):
                    each[to, :, : self.width] = each[source, :, : self.width]
            for numbers in (self.positions, self.first):
                numbers[to] = numbers[source]
        self.rows = len(rows)

    @abstractmethod
    def allocate(self, lengths: Sequence[int]) -> None:
        """Set `layers`, `positions`, `first` and `width`, for prompts of these lengths with the soft prompt."""

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
