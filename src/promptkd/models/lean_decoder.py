"""A token a row through the layers of Llama's family, in some twenty operations a layer.

For a handful of rows, what goes on around the matrices in transformers' modules costs nearly as much time as reading
the weights. Here matrices that read the same input are one, and everything else is one operation where it can be.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from promptkd.models.lean_layers import head_norms, is_lean, rotation, turned
from promptkd.models.prepacked import PackedLinear, prepacks
from promptkd.switches import switched_on

__all__ = ["Attend", "LeanDecoder"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""The index of a layer, its query (R, heads, 1, D), key and value (R, key-value heads, 1, D), to (R, 1, heads, D)."""


class _Layer(NamedTuple):
    norm: nn.Module
    query_key_value: PackedLinear
    head_norms: list[nn.Module]
    output: PackedLinear
    middle_norm: nn.Module
    gate_up: PackedLinear
    activation: nn.Module
    down: PackedLinear


class LeanDecoder:
    """The backbone of a model, for one token a row, with the weights that it has when this is made.

    Args:
        model: one for which `suits` holds.
        rows: how many rows a step will have, about.
    """

    def __init__(self, model: PreTrainedModel, rows: int):
        backbone, attention = model.base_model, model.base_model.layers[0].self_attn
        self._embed, self._norm, self._rotary = backbone.embed_tokens, backbone.norm, backbone.rotary_emb
        self._head_size: int = attention.head_dim
        self._queries = attention.q_proj.out_features // self._head_size
        self._keys = attention.k_proj.out_features // self._head_size
        self._layers = [_layer(each, rows) for each in backbone.layers]

    @staticmethod
    def suits(model: PreTrainedModel) -> bool:
        """Whether `is_lean` holds, and the weights of joined layers may be copied."""
        if not switched_on("lean_decoder") or not is_lean(model) or not prepacks(model):
            return False
        linears = [_linears(layer) for layer in model.base_model.layers]
        return all(type(linear) is nn.Linear for linear in chain(*linears)) and all(
            _alike(query, key, value) and _alike(gate, up) for query, key, value, _, gate, up, _ in linears
        )

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states (R, H) behind `tokens` (R,), which stand at `positions` (R,) of their rows."""
        rows = len(tokens)
        hidden = self._embed(tokens)  # (R, H)
        cosines, sines = (each[:, 0] for each in rotation(self._rotary, hidden, positions[:, None]))  # (R, 1, D)
        rotated = self._queries + self._keys
        for index, layer in enumerate(self._layers):
            mixed = layer.query_key_value(_normed(layer.norm, hidden))
            mixed = mixed.view(rows, -1, self._head_size)  # (R, heads, D): of queries, keys and values
            heads = mixed[:, :rotated]
            if layer.head_norms:
                both = mixed[:, : self._queries], mixed[:, self._queries : rotated]
                heads = torch.cat([_normed(*each) for each in zip(layer.head_norms, both, strict=True)], 1)
            heads = turned(heads, cosines, sines)
            query, key, value = heads[:, : self._queries], heads[:, self._queries :], mixed[:, rotated:]
            seen = attend(index, query[:, :, None], key[:, :, None], value[:, :, None])
            hidden = layer.output(seen.reshape(rows, -1), plus=hidden)
            gate, up = layer.gate_up(_normed(layer.middle_norm, hidden)).chunk(2, -1)
            hidden = layer.down(layer.activation(gate) * up, plus=hidden)
        return _normed(self._norm, hidden)


def _linears(layer: Any) -> list[nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _alike(*linears: nn.Linear) -> bool:
    """Whether all of them have a bias, or none has."""
    return len({linear.bias is None for linear in linears}) == 1


def _layer(layer: Any, rows: int) -> _Layer:
    query, key, value, output, gate, up, down = _linears(layer)
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm,
        PackedLinear([query, key, value], rows),
        head_norms(attention),
        PackedLinear([output], rows),
        layer.post_attention_layernorm,
        PackedLinear([gate, up], rows),
        mlp.act_fn,
        PackedLinear([down], rows),
    )


def _normed(norm: nn.Module, inputs: Tensor) -> Tensor:
    return rms_norm(inputs, norm.weight.shape, norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]
