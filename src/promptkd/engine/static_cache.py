"""Decoding on a static key-value cache: preallocated, and written in place.

The cache is one buffer per layer in which all prompts end at the same column, so that a step writes one column for all
rows. Steps are run by the model's own layers or by a fused decoder: for a handful of rows, transformers' modules spend
nearly as much time around the matrices as on reading the weights.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine.backbone import (
    AttentionSettings,
    backbone_of,
    embedding_device,
    joined,
    softcapped_attention,
    use_attention,
)
from promptkd.engine.base import DecodeSession
from promptkd.engine.fused_layers import head_norms, rotate, rotation, supports_fused_forward, swiglu
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

    def attend(self, query: Tensor, columns: slice, mask: Tensor) -> Tensor:
        """(R, g, heads, D) attention of `query` (R, heads, g, D) to some columns, where `mask` (R, 1, g, columns)."""
        (rows, heads, length, _), settings = query.shape, self.settings
        keys, values = self.keys[:rows, :, columns], self.values[:rows, :, columns]
        # heads that share keys, side by side
        grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
        if length > 1:
            mask = mask.repeat(1, 1, heads // keys.shape[1], 1)
        if settings.softcap is None:
            attended = scaled_dot_product_attention(grouped, keys, values, mask, scale=settings.scaling)
        else:
            attended = softcapped_attention(grouped, keys, values, mask, settings)
        return attended.reshape(rows, heads, length, values.shape[-1]).transpose(1, 2)


@dataclass(eq=False)
class StaticCache:
    """The keys and values of R rows, and where they are; there may be room for more rows."""

    positions: Tensor  # (R,) of each row's next token
    first: Tensor  # (R,) the column of each row's first token
    columns: int
    dtype: torch.dtype | None  # None for that of the values
    layers: dict[int, LayerCache] = field(default_factory=dict)

    @outside_inference_mode
    def store(self, index: int, places: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> None:
        """Put a layer's keys and values (1, G, S, D) into rows and columns: `places` has those, and which of the S."""
        if index not in self.layers:
            dtype, device = self.dtype or value.dtype, self.first.device
            # zeros, since what a row does not see is multiplied by a weight of 0, and NaN times 0 is NaN
            sizes = [(len(self.first), each.shape[1], self.columns, each.shape[-1]) for each in (key, value)]
            keys, values = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
            self.layers[index] = LayerCache(keys, values, settings)
        rows, columns, tokens = places
        for cache, states in ((self.layers[index].keys, key), (self.layers[index].values, value)):
            cache[rows, :, columns] = states[0].transpose(0, 1)[tokens].to(cache.dtype)


@dataclass(eq=False)
class StaticCacheSession(DecodeSession):
    """Rows of one model. Each kind of device allocates and masks columns in its own way."""

    model: PreTrainedModel  # in evaluation mode
    packed: PackedScorer  # packs the prompts
    backbone: DecodeBackbone
    project: Callable[[Tensor], Tensor]  # hidden states (R, H) to logits (R, V)
    max_new_tokens: int  # most tokens that may follow a prompt
    width: int = field(init=False)  # filled columns, at least those of the longest row
    ends: list[int] = field(init=False)  # filled columns of each row, after the first call of `extend`

    def prefill(self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None = None) -> Tensor:
        before = 0 if soft_prompt is None else len(soft_prompt)
        lengths = [before + len(each) for each in prompts]
        self.rows, self.cache = len(lengths), self.allocate(lengths, embedding_device(self.model))
        self.ends = [self.width] * self.rows
        parts = consecutive(lengths, self.packed.max_tokens)
        return self.project(joined([self._prefilled(part, prompts[part], soft_prompt) for part in parts]))

    def _prefilled(self, part: slice, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None) -> Tensor:
        """The states (R, H) behind the prompts of these rows, whose keys and values go into the cache."""
        device = embedding_device(self.model)
        pack, inputs = pack_inputs(self.model, prompts, soft_prompt, share=self.packed.shares_prefixes(self.model))
        lengths = [len(indices) for indices in pack.row_indices]
        rows = [row for row, length in enumerate(lengths, part.start) for _ in range(length)]
        columns = [column for length in lengths for column in range(self.width - length, self.width)]
        places = on_device([rows, columns, [*chain(*pack.row_indices)]], device)
        attention = self.packed.attention(pack, device)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
            self.cache.store(int(module.layer_idx), places, key, value, settings)
            return attention(module, query, key, value, settings)

        with use_attention(self.model, attend):
            hidden = backbone_of(self.model)(use_cache=False, **inputs).last_hidden_state[0]
        return hidden[on_device([indices[-1] for indices in pack.row_indices], hidden.device)]

    def select(self, rows: Sequence[int]) -> None:
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        if moves:
            to, source = on_device(moves, self.cache.first.device).T
            for layer in self.cache.layers.values():
                for each in (layer.keys, layer.values):
                    each[to, :, : self.width] = each[source, :, : self.width]
            for numbers in (self.cache.positions, self.cache.first):
                numbers[to] = numbers[source]
        self.rows, self.ends = len(rows), [self.ends[row] for row in rows]

    def extend(self, tokens: Tensor) -> Tensor:
        self.ends = [end + tokens.shape[1] for end in self.ends]
        self.width = max(self.ends)
        logits = self.extended(tokens)
        self.cache.positions[: self.rows] += tokens.shape[1]
        return logits

    def rollback(self, counts: Sequence[int]) -> None:
        # what they left behind is no longer seen, and the next tokens of the row overwrite it
        self.ends = [end - count for end, count in zip(self.ends, counts, strict=True)]
        self.cache.positions[: self.rows] -= on_device(list(counts), self.cache.positions.device)

    def extended(self, tokens: Tensor) -> Tensor:
        """Logits (R, g, V) of `extend`."""
        return self.run_block(tokens, self.width)

    def run_block(self, tokens: Tensor, span: int) -> Tensor:
        """Logits (R, g, V) of tokens (R, g), each row's behind its last, over the first `span` columns.

        Each row writes into columns of its own, behind its last one. Nothing is advanced.
        """
        (rows, length), cache, device = tokens.shape, self.cache, tokens.device
        index, first = torch.arange(rows, device=device)[:, None], cache.first[:rows, None]
        positions = cache.positions[:rows, None] + torch.arange(length, device=device)
        columns, seen = first + positions, torch.arange(span, device=device)
        mask = ((seen >= first[..., None]) & (seen <= columns[..., None]))[:, None]  # (R, 1, g, span)

        def attend(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """A `CachedAttention` of R · g rows of one token, (R g, heads, 1, D)."""
            layer = cache.layers[layer_index]
            for each, states in ((layer.keys, key), (layer.values, value)):
                each[index, :, columns] = states[:, :, 0].unflatten(0, (rows, length)).to(each.dtype)
            window = layer.settings.sliding_window
            visible = mask if window is None else mask & (seen > columns[:, None, :, None] - window)
            query = query[:, :, 0].unflatten(0, (rows, length)).transpose(1, 2)  # (R, heads, g, D)
            return layer.attend(query, slice(span), visible).flatten(0, 1)[:, None]

        return self.project(self.backbone(tokens.flatten(), positions.flatten(), attend)).unflatten(0, tokens.shape)

    @abstractmethod
    def allocate(self, lengths: Sequence[int], device: torch.device) -> StaticCache:
        """An empty cache for prompts of these lengths and what follows. Sets `width` to the columns of the prompts."""

    @abstractmethod
    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A `CachedAttention` that first writes key and value into the current column."""


def consecutive(lengths: Sequence[int], most: int) -> list[slice]:
    """Consecutive rows of at most `most` tokens together, or a single longer one; all together where `most` is 0."""
    parts, start, held = [], 0, 0
    for row, length in enumerate(lengths):
        if most and held and held + length > most:
            parts.append(slice(start, row))
            start, held = row, 0
        held += length
    return [*parts, slice(start, len(lengths))]


def own_layers(model: PreTrainedModel) -> DecodeBackbone:
    """The model's own layers, with their attention replaced."""

    def backbone(tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        with use_attention(model, lambda module, q, k, v, _: attend(int(module.layer_idx), q, k, v)):
            outputs = backbone_of(model)(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False)
        return outputs.last_hidden_state[:, -1]

    return backbone


JoinedLinear = Callable[[Tensor, Tensor | None], Tensor]
"""Linear layers that read the same input, as one. Takes the input and what to add, or None; returns the outputs side by
side, (…, all outputs), in the precision of what is added."""


class CastLinear:
    """A `JoinedLinear` with a copy of the weights (all with a bias or all without one) in another precision."""

    @outside_inference_mode
    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype):
        weights: list[Tensor] = [each.weight for each in layers]
        biases: list[Tensor] = [each.bias for each in layers if each.bias is not None]
        self.weight = _joined(weights, dtype)
        self.bias = _joined(biases, dtype) if biases else None
        sizes = [each.out_features for each in layers]
        self.copies = list(zip(self.weight.split(sizes), weights, strict=True))  # with what each is a copy of
        if self.bias is not None:
            self.copies += zip(self.bias.split(sizes), biases, strict=True)

    def __call__(self, inputs: Tensor, plus: Tensor | None) -> Tensor:
        outputs = linear(inputs.to(self.weight.dtype), self.weight, self.bias)
        return outputs if plus is None else plus + outputs


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """In another precision, or a single one as it is, without a further copy."""
    return torch.cat([each.to(dtype) for each in parts]) if len(parts) > 1 else parts[0].detach().to(dtype)


def supports_fused_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has fused layers, and those to be joined are plain and have all a bias or none."""
    if not supports_fused_forward(model):
        return False
    groups = [group for layer in backbone_of(model).layers for group in _groups(layer)]
    return all(type(each) is nn.Linear for each in chain(*groups)) and all(
        len({each.bias is None for each in group}) == 1 for group in groups
    )


class FusedDecoder:
    """The backbone of a model that `supports_fused_decoder`, for one token per row; `join` joins its linear layers."""

    def __init__(self, model: PreTrainedModel, join: Callable[[Sequence[nn.Linear]], JoinedLinear]):
        backbone, attention = backbone_of(model), backbone_of(model).layers[0].self_attn
        self._embed, self._norm, self._rotary = backbone.embed_tokens, backbone.norm, backbone.rotary_emb
        self._head_size: int = attention.head_dim
        self._queries = attention.q_proj.out_features // self._head_size
        self._rotated = self._queries + attention.k_proj.out_features // self._head_size
        self._norms = [
            (layer.input_layernorm, head_norms(layer.self_attn), layer.post_attention_layernorm)
            for layer in backbone.layers
        ]
        self._linears = [[join(group) for group in _groups(layer)] for layer in backbone.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        """Hidden states (R, H) of `tokens` (R,) at `positions` (R,) of their rows."""
        rows, queries, rotated = len(tokens), self._queries, self._rotated
        hidden = self._embed(tokens)  # (R, H)
        cosines, sines = (each[:, 0] for each in rotation(self._rotary, hidden, positions[:, None]))  # (R, 1, D)
        for index, (norms, linears) in enumerate(zip(self._norms, self._linears, strict=True)):
            (norm, of_heads, middle_norm), (query_key_value, output, gate_up, down) = norms, linears
            projected = query_key_value(_rms_norm(norm, hidden), None)
            projected = projected.view(rows, -1, self._head_size)  # (R, heads, D): queries, keys and values
            heads = projected[:, :rotated]
            if of_heads:
                parts = heads[:, :queries], heads[:, queries:]
                heads = torch.cat([_rms_norm(*each) for each in zip(of_heads, parts, strict=True)], 1)
            heads = rotate(heads, cosines, sines)
            query, key, value = heads[:, :queries], heads[:, queries:], projected[:, rotated:]
            attended = attend(index, query[:, :, None], key[:, :, None], value[:, :, None])
            hidden = output(attended.reshape(rows, -1), hidden)
            gate, up = gate_up(_rms_norm(middle_norm, hidden), None).chunk(2, -1)
            hidden = down(swiglu(gate, up), hidden)
        return _rms_norm(self._norm, hidden)


def _groups(layer: Any) -> list[list[nn.Linear]]:
    """The linear layers of a layer; those that read the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [joined, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _rms_norm(norm: nn.Module, inputs: Tensor) -> Tensor:
    return rms_norm(inputs, norm.weight.shape, norm.weight.to(inputs.dtype), norm.variance_epsilon)  # type: ignore[arg-type]
