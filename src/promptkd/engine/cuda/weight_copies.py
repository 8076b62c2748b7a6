"""Weights in the precision of matrix products, for CUDA graphs: updated in place, since graphs read fixed addresses.

See also `CastLinear` in `fused_decoder.py`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from promptkd.engine.fused_decoder import outside_inference_mode
from promptkd.engine.static_cache import CachedAttention, own_layers


class UncopiedLinear:
    """A `JoinedLinear` of weights that already have the right precision, so that a copy would only cost memory."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self._layers = layers

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        parts = [linear(inputs.to(each.weight.dtype), each.weight, each.bias) for each in self._layers]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return outputs if plus is None else plus + outputs


class CastBackbone:
    """A `DecodeBackbone` of the model's own layers, with their matrices cast.

    Embeddings and norms keep their precision, as under autocast: rows are sampled from the distribution that is scored.
    """

    @outside_inference_mode
    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self._dtype, original = dtype, model.base_model
        tables = {id(module.weight) for module in original.modules() if isinstance(module, nn.Embedding)}
        matrices = [
            weight
            for weight in original.parameters()
            if weight.ndim >= 2 and weight.dtype not in (dtype, torch.float64) and id(weight) not in tables
        ]
        copies = {id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in matrices}
        self._casts = [(copies[id(weight)], weight) for weight in matrices]
        shared = {id(each): each for each in (*original.parameters(), *original.buffers())}  # all that is not cast
        self._backbone = copy.deepcopy(original, shared | copies).eval() if matrices else original
        self._layers = own_layers(self._backbone)

    @outside_inference_mode
    def refill(self) -> None:
        for cast, weight in self._casts:
            cast.copy_(weight)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        if self._dtype not in (torch.bfloat16, torch.float16):
            return self._layers(tokens, positions, attend)
        # autocast's cache of casts would outlive the graph that they were made in
        with torch.autocast(tokens.device.type, dtype=self._dtype, cache_enabled=False):
            return self._layers(tokens, positions, attend)
