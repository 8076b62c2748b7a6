"""A token per row through the layers of Llama's family, in some twenty operations a layer.

For a handful of rows, what goes on around the matrices in transformers' modules costs nearly as much time as reading
the weights. Here matrices that read the same input are one, and everything else is one operation where it can be.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from promptkd.engine.fused_layers import head_norms, supports_fused_forward
from promptkd.engine.fused_ops import rotate, rotation, swiglu
from promptkd.engine.static_cache import Attend

__all__ = ["FusedDecoder", "JoinedLinear", "Joins", "joined_weights", "supports_fused_decoder"]


class JoinedLinear(Protocol):
    """Linear layers that read the same input, as one."""

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """The outputs side by side, (…, all outputs); with `plus`, of that shape, added, in its precision."""


Joins = Callable[[Sequence[nn.Linear]], JoinedLinear]


def joined_weights(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight (all outputs, inputs) and bias of layers that have all a bias, or none."""
    biases = [each.bias.detach() for each in layers if each.bias is not None]
    if 0 < len(biases) < len(layers):
        raise ValueError("Either all layers that are joined have a bias, or none has.")
    weights = [each.weight.detach() for each in layers]
    return _joined(weights), _joined(biases) if biases else None


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _Layer(NamedTuple):
    norm: nn.Module
    query_key_value: JoinedLinear
    head_norms: list[nn.Module]
    output: JoinedLinear
    middle_norm: nn.Module
    gate_up: JoinedLinear
    down: JoinedLinear


def supports_fused_decoder(model: PreTrainedModel) -> bool:
    """Whether the layers are written out here, and the weights of joined ones may be copied."""
    if not supports_fused_forward(model):
        return False
    linears = [_linears(layer) for layer in model.base_model.layers]
    return all(type(linear) is nn.Linear for linear in chain(*linears)) and all(
        _alike(query, key, value) and _alike(gate, up) for query, key, value, _, gate, up, _ in linears
    )


class FusedDecoder:
    """The backbone of a model for which `supports_fused_decoder` holds, for one token per row.

    Args:
        joins: makes one of several linear layers.
    """

    def __init__(self, model: PreTrainedModel, joins: Joins):
        backbone, attention = model.base_model, model.base_model.layers[0].self_attn
        self._embed, self._norm, self._rotary = backbone.embed_tokens, backbone.norm, backbone.rotary_emb
        self._head_size: int = attention.head_dim
        self._queries = attention.q_proj.out_features // self._head_size
        self._keys = attention.k_proj.out_features // self._head_size
        self._layers = [_layer(each, joins) for each in backbone.layers]

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
            heads = rotate(heads, cosines, sines)
            query, key, value = heads[:, : self._queries], heads[:, self._queries :], mixed[:, rotated:]
            attended = attend(index, query[:, :, None], key[:, :, None], value[:, :, None])
            hidden = layer.output(attended.reshape(rows, -1), plus=hidden)
            gate, up = layer.gate_up(_normed(layer.middle_norm, hidden)).chunk(2, -1)
            hidden = layer.down(swiglu(gate, up), plus=hidden)
        return _normed(self._norm, hidden)


def _linears(layer: Any) -> list[nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _alike(*linears: nn.Linear) -> bool:
    """Whether all of them have a bias, or none has."""
    return len({linear.bias is None for linear in linears}) == 1


def _layer(layer: Any, joins: Joins) -> _Layer:
    query, key, value, output, gate, up, down = _linears(layer)
    return _Layer(
        layer.input_layernorm,
        joins([query, key, value]),
        head_norms(layer.self_attn),
        joins([output]),
        layer.post_attention_layernorm,
        joins([gate, up]),
        joins([down]),
    )


def _normed(norm: nn.Module, inputs: Tensor) -> Tensor:
    return rms_norm(inputs, norm.weight.shape, norm.weight.to(inputs.dtype), norm.variance_epsilon)  # type: ignore[arg-type]
