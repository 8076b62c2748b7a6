"""Decoding on CPU: each step attends only to the columns filled so far, and linear layers are run by oneDNN.

Decoding reads every weight once per token, for a handful of rows. oneDNN does that about twice as fast as the BLAS
behind `nn.Linear` if the weights are reordered first, which costs about as much as reading them once, and a copy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from promptkd.engine.backbone import backbone_of, matmul_dtype
from promptkd.engine.base import Decoder, SessionFactory
from promptkd.engine.cpu.scoring import CpuPackedScorer
from promptkd.engine.heads import head_logits, linear_head
from promptkd.engine.packed import supports_packing
from promptkd.engine.static_cache import (
    CastLinear,
    FusedDecoder,
    JoinedLinear,
    StaticCache,
    StaticCacheSession,
    own_layers,
    supports_fused_decoder,
)

_MOST_BYTES = 4 * 2**30  # of weights; a second copy of more is not worth its memory


class CpuDecoder(Decoder):
    """Decodes on a static cache, with weights reordered for oneDNN, by the model's own layers or by `FusedDecoder`."""

    def __init__(self, *, fused: bool):
        self.fused = fused
        self.name = "fused decoder" if fused else "static cache"

    def supports(self, model: PreTrainedModel) -> bool:
        fits = not self.fused or (supports_fused_decoder(model) and _copy_is_affordable(model))
        return fits and supports_packing(model)

    @contextmanager
    def open(self, model: PreTrainedModel, rows: int, vocabulary: int | None) -> Iterator[SessionFactory]:
        packed, project = CpuPackedScorer(max_tokens=0), _projection(model, rows, vocabulary)
        backbone = FusedDecoder(model, partial(_join, rows=rows)) if self.fused else own_layers(model)
        with nullcontext() if self.fused else onednn_linears(backbone_of(model), rows):
            yield lambda max_new_tokens: nullcontext(_CpuSession(model, packed, backbone, project, max_new_tokens))


class _CpuSession(StaticCacheSession):
    def allocate(self, lengths: Sequence[int], device: torch.device) -> StaticCache:
        self.width, positions = max(lengths), torch.tensor(lengths, device=device)
        return StaticCache(positions, self.width - positions, self.width + self.max_new_tokens, dtype=None)

    def decode(self, tokens: Tensor) -> Tensor:
        self.width += 1
        columns = torch.arange(self.width, device=tokens.device)
        self._mask = (columns >= self.cache.first[: self.rows, None])[:, None, None]  # (R, 1, 1, columns)
        positions = self.cache.positions[: self.rows]
        self.cache.positions = positions + 1
        return self.project(self.backbone(tokens, positions, self.attend_to_cache))

    def attend_to_cache(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer, column = self.cache.layers[index], self.width - 1
        layer.keys[: self.rows, :, column] = key[:, :, 0]
        layer.values[: self.rows, :, column] = value[:, :, 0]
        window = layer.settings.sliding_window
        first = 0 if window is None else max(0, self.width - window)
        return layer.attend(query, slice(first, self.width), self._mask[..., first:])


def _projection(model: PreTrainedModel, rows: int, vocabulary: int | None) -> Callable[[Tensor], Tensor]:
    """Hidden states (R, H) to logits (R, V) by the head's current weights, in float32 or wider."""
    head = linear_head(model)
    if head is None or not onednn_multiplies(head.logits_dtype):
        return partial(head_logits, model, vocabulary=vocabulary)
    head = head.limited_to(vocabulary)
    with torch.no_grad():
        product = OneDNNLinear(*head.weights(), rows)
    return lambda hidden: head.transform_(product(hidden))


class OneDNNLinear:
    """A `JoinedLinear` by oneDNN, for calls of about `rows` rows, of weights for which `onednn_multiplies` holds."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.dtype, self.bias = weight.dtype, bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        inputs = inputs.to(self.dtype)
        if plus is not None and plus.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, self.weight, self.bias, "add")
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs if plus is None else plus + outputs


def _join(layers: Sequence[nn.Linear], rows: int) -> JoinedLinear:
    """One layer of several (all with a bias or all without one), in the precision of their products at this moment."""
    dtype = matmul_dtype(layers[0].weight)
    joined = CastLinear(layers, dtype)
    return OneDNNLinear(joined.weight, joined.bias, rows) if onednn_multiplies(dtype) else joined


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this precision on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _copy_is_affordable(model: nn.Module) -> bool:
    """Whether a second copy of the linear layers, in the precision of their products, is worth its memory."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return sum(weight.numel() * matmul_dtype(weight).itemsize for weight in weights) <= _MOST_BYTES


@contextmanager
def onednn_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run the linear layers of `model` by oneDNN within this context. Its weights must not change meanwhile.

    Layers in a precision that oneDNN does not multiply remain as they are, and so do all layers of a model with more
    than 4 GiB of weights. Calls with more than `rows` rows are left to torch.
    """
    plain = [each for each in model.modules() if type(each) is nn.Linear and "forward" not in vars(each)]
    affordable = _copy_is_affordable(model)
    layers = [each for each in plain if affordable and onednn_multiplies(matmul_dtype(each.weight))]
    try:
        for layer in layers:
            vars(layer)["forward"] = _step_forward(layer, rows)  # found before the class's method
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _step_forward(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The forward of a layer: by oneDNN for a step, by torch for prompts, since oneDNN compiles each length anew."""
    product = _join([layer], rows)

    def forward(inputs: Tensor) -> Tensor:
        if inputs.numel() > rows * layer.in_features:
            return linear(inputs, layer.weight, layer.bias)
        return product(inputs, None)

    return forward
