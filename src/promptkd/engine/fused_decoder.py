"""A fused decoder: one token per row through the layers of the Llama family, in about twenty operations per layer.

For a handful of rows, transformers' modules spend nearly as much time around the matrices as on reading the weights.
Here, matrices that read the same input are joined into one, and everything else is one operation where possible.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

from promptkd.engine.fused_layers import head_norms, rotate, rotation, supports_fused_forward, swiglu
from promptkd.engine.static_cache import CachedAttention, outside_inference_mode

JoinedLinear = Callable[[Tensor, Tensor | None], Tensor]
"""Linear layers that read the same input, as one. Takes the input and what to add, or None; returns the outputs side by
side, (…, all outputs), in the precision of what is added."""


class CastLinear:
    """A `JoinedLinear` with a copy of the weights (all with a bias or all without one) in another precision."""

    @outside_inference_mode
    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype):
        weights, biases = [each.weight for each in layers], [each.bias for each in layers if each.bias is not None]
        self.weight = torch.cat(weights).to(dtype)
        self.bias = torch.cat(biases).to(dtype) if biases else None
        sizes = [each.out_features for each in layers]
        self.copies = list(zip(self.weight.split(sizes), weights, strict=True))  # with what each is a copy of
        if self.bias is not None:
            self.copies += zip(self.bias.split(sizes), biases, strict=True)

    def __call__(self, inputs: Tensor, plus: Tensor | None) -> Tensor:
        outputs = linear(inputs.to(self.weight.dtype), self.weight, self.bias)
        return outputs if plus is None else plus + outputs


def supports_fused_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has fused layers, and those to be joined are plain and have all a bias or none."""
    if not supports_fused_forward(model):
        return False
    groups = [group for layer in model.base_model.layers for group in _groups(layer)]
    return all(type(each) is nn.Linear for each in chain(*groups)) and all(
        len({each.bias is None for each in group}) == 1 for group in groups
    )


class FusedDecoder:
    """The backbone of a model that `supports_fused_decoder`, for one token per row; `join` joins its linear layers."""

    def __init__(self, model: PreTrainedModel, join: Callable[[Sequence[nn.Linear]], JoinedLinear]):
        backbone, attention = model.base_model, model.base_model.layers[0].self_attn
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
