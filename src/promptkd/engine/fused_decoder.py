"""A fused decoder: one token per row through the layers of the Llama family, in about twenty operations per layer.

For a handful of rows, transformers' modules spend nearly as much time around the matrices as on reading the weights.
Here, matrices that read the same input are joined into one, and everything else is one operation where possible.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

from promptkd.engine.fused_layers import head_norms, supports_fused_forward
from promptkd.engine.fused_ops import rotate, rotation, swiglu
from promptkd.engine.static_cache import CachedAttention

P = ParamSpec("P")
R = TypeVar("R")


class JoinedLinear(Protocol):
    """Linear layers that read the same input, as one layer."""

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """The outputs side by side, (…, all outputs), added to `plus` of the same shape, in the precision of `plus`."""


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """For methods whose tensors outlive the call: those made in inference mode cannot be overwritten outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class CastLinear:
    """A `JoinedLinear` with a copy of the weights in another precision, which `refill` updates in place."""

    @outside_inference_mode
    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype):
        self._layers, self._sizes = layers, [layer.out_features for layer in layers]
        weight, bias = layers[0].weight, layers[0].bias
        self._weight = weight.new_empty(sum(self._sizes), weight.shape[1], dtype=dtype)
        self._bias = None if bias is None else bias.new_empty(sum(self._sizes), dtype=dtype)
        self.refill()

    @outside_inference_mode
    def refill(self) -> None:
        """Copy the layers' current weights."""
        for part, layer in zip(self._weight.split(self._sizes), self._layers, strict=True):
            part.copy_(layer.weight)
        if self._bias is not None:
            for part, layer in zip(self._bias.split(self._sizes), self._layers, strict=True):
                part.copy_(layer.bias)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        outputs = linear(inputs.to(self._weight.dtype), self._weight, self._bias)
        return outputs if plus is None else plus + outputs


class _Layer(NamedTuple):
    norm: nn.Module
    query_key_value: JoinedLinear
    head_norms: list[nn.Module]
    output: JoinedLinear
    middle_norm: nn.Module
    gate_up: JoinedLinear
    down: JoinedLinear


def supports_fused_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has fused layers, and those to be joined are plain and have all a bias or none."""
    if not supports_fused_forward(model):
        return False
    linears = [_linears(layer) for layer in model.base_model.layers]
    return all(type(each) is nn.Linear for each in chain(*linears)) and all(
        _biases_agree(query, key, value) and _biases_agree(gate, up) for query, key, value, _, gate, up, _ in linears
    )


class FusedDecoder:
    """The backbone of a model for which `supports_fused_decoder` holds, for one token per row.

    Args:
        join: makes one of several linear layers.
    """

    def __init__(self, model: PreTrainedModel, join: Callable[[Sequence[nn.Linear]], JoinedLinear]):
        backbone, attention = model.base_model, model.base_model.layers[0].self_attn
        self._embed, self._norm, self._rotary = backbone.embed_tokens, backbone.norm, backbone.rotary_emb
        self._head_size: int = attention.head_dim
        self._queries = attention.q_proj.out_features // self._head_size
        self._keys = attention.k_proj.out_features // self._head_size
        self._layers = []
        for layer in backbone.layers:
            query, key, value, output, gate, up, down = _linears(layer)
            self._layers.append(
                _Layer(
                    norm=layer.input_layernorm,
                    query_key_value=join([query, key, value]),
                    head_norms=head_norms(layer.self_attn),
                    output=join([output]),
                    middle_norm=layer.post_attention_layernorm,
                    gate_up=join([gate, up]),
                    down=join([down]),
                )
            )

    def __call__(self, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        """Hidden states (R, H) of `tokens` (R,) at `positions` (R,) of their rows."""
        rows = len(tokens)
        hidden = self._embed(tokens)  # (R, H)
        cosines, sines = (each[:, 0] for each in rotation(self._rotary, hidden, positions[:, None]))  # (R, 1, D)
        rotated = self._queries + self._keys
        for index, layer in enumerate(self._layers):
            projected = layer.query_key_value(_rms_norm(layer.norm, hidden))
            projected = projected.view(rows, -1, self._head_size)  # (R, heads, D): queries, keys and values
            heads = projected[:, :rotated]
            if layer.head_norms:
                parts = projected[:, : self._queries], projected[:, self._queries : rotated]
                heads = torch.cat([_rms_norm(*each) for each in zip(layer.head_norms, parts, strict=True)], 1)
            heads = rotate(heads, cosines, sines)
            query, key, value = heads[:, : self._queries], heads[:, self._queries :], projected[:, rotated:]
            attended = attend(index, query[:, :, None], key[:, :, None], value[:, :, None])
            hidden = layer.output(attended.reshape(rows, -1), plus=hidden)
            gate, up = layer.gate_up(_rms_norm(layer.middle_norm, hidden)).chunk(2, -1)
            hidden = layer.down(swiglu(gate, up), plus=hidden)
        return _rms_norm(self._norm, hidden)


def _linears(layer: Any) -> list[nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _biases_agree(*linears: nn.Linear) -> bool:
    return len({each.bias is None for each in linears}) == 1


def _rms_norm(norm: nn.Module, inputs: Tensor) -> Tensor:
    return rms_norm(inputs, norm.weight.shape, norm.weight.to(inputs.dtype), norm.variance_epsilon)  # type: ignore[arg-type]
