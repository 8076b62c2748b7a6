"""Weights in the computing precision, for CUDA graphs: they stay where they are, and are refilled as they change."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from promptkd.engine.attention import attention_in_place
from promptkd.engine.static_cache import Attend, StepAttention

__all__ = ["CastLinear", "LiveLinear", "OwnLayers", "lasting"]

P = ParamSpec("P")
R = TypeVar("R")


def lasting(method: Callable[P, R]) -> Callable[P, R]:
    """For what outlives a call: tensors that are made in inference mode could not be written over outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class CastLinear:
    """Linear layers that read the same input, as one weight in the computing precision; refilled as they change."""

    @lasting
    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype):
        self._layers = layers
        size = sum(each.out_features for each in layers)
        weight, bias = layers[0].weight, layers[0].bias
        self._weight = torch.empty(size, weight.shape[1], dtype=dtype, device=weight.device)
        self._bias = None if bias is None else torch.empty(size, dtype=dtype, device=weight.device)

    @lasting
    def refill(self) -> None:
        sizes = [each.out_features for each in self._layers]
        for place, layer in zip(self._weight.split(sizes), self._layers, strict=True):
            place.copy_(layer.weight)
        if self._bias is not None:
            for place, layer in zip(self._bias.split(sizes), self._layers, strict=True):
                place.copy_(layer.bias)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """See `JoinedLinear`."""
        outputs = linear(inputs.to(self._weight.dtype), self._weight, self._bias)
        return outputs if plus is None else plus + outputs


class LiveLinear:
    """The same for weights that are in the computing precision already: a second copy would only cost memory."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self._layers = layers

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """See `JoinedLinear`."""
        parts = [linear(inputs.to(each.weight.dtype), each.weight, each.bias) for each in self._layers]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return outputs if plus is None else plus + outputs


class OwnLayers:
    """The model's own layers for one token per row, their matrices in the computing precision.

    Embeddings and norms keep theirs, as under autocast: rows are sampled from the distribution that is scored.
    """

    @lasting
    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self._dtype, own = dtype, model.base_model
        tables = {id(each.weight) for each in own.modules() if isinstance(each, nn.Embedding)}
        cast = [
            each
            for each in own.parameters()
            if each.ndim >= 2 and each.dtype not in (dtype, torch.float64) and id(each) not in tables
        ]
        # what is not cast is shared with the model
        copies = {id(each): nn.Parameter(each.detach().to(dtype), requires_grad=False) for each in cast}
        self._casts = [(copies[id(each)], each) for each in cast]
        shared = {id(each): each for each in (*own.parameters(), *own.buffers())}
        self._backbone = copy.deepcopy(own, shared | copies).eval() if cast else own

    @lasting
    def refill(self) -> None:
        for ours, theirs in self._casts:
            ours.copy_(theirs)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `Backbone`."""
        kind = tokens.device.type
        mixed = self._dtype in (torch.bfloat16, torch.float16)
        # a cache of casts would outlive the graph that they were made in
        precision = torch.autocast(kind, dtype=self._dtype, cache_enabled=False) if mixed else nullcontext()
        with precision, attention_in_place(self._backbone, StepAttention(attend)):
            hidden = self._backbone(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False)
        return hidden.last_hidden_state[:, -1]
