"""Linear layers by oneDNN, with weights in its own blocks, while a model decodes.

Decoding reads every weight once per token, for a handful of rows. oneDNN does that about twice as fast as the BLAS
behind `nn.Linear` if the weights are reordered first, which costs about as much as reading them once, and a second copy
in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from promptkd.engine.backbone import matmul_dtype
from promptkd.engine.fused_decoder import CastLinear

_MOST_BYTES = 4 * 2**30  # of weights; a second copy of more is not worth its memory


class OneDNNLinear:
    """A `JoinedLinear` by oneDNN, with the weights of the time when it is made.

    Args:
        weight: (outputs, inputs), in a precision for which `onednn_multiplies` holds.
        bias: (outputs,) or None.
        rows: about how many rows a call will have.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.dtype, self.bias = weight.dtype, bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        inputs = inputs.to(self.dtype)
        if plus is not None and plus.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, self.weight, self.bias, "add")
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs if plus is None else plus + outputs


def join(layers: Sequence[nn.Linear], rows: int) -> OneDNNLinear | CastLinear:
    """One layer of several (all with a bias or all without one), in the precision of their products at this moment."""
    dtype = matmul_dtype(layers[0].weight)
    if not onednn_multiplies(dtype):
        return CastLinear(layers, dtype)
    weight = _join([layer.weight for layer in layers], dtype)
    bias = None if layers[0].bias is None else _join([layer.bias for layer in layers], dtype)
    return OneDNNLinear(weight, bias, rows)


def _join(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return joined.detach().to(dtype)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this precision on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def copy_is_affordable(model: nn.Module) -> bool:
    """Whether a second copy of the linear layers, in the precision of their products, is worth its memory."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return sum(weight.numel() * matmul_dtype(weight).itemsize for weight in weights) <= _MOST_BYTES


@contextmanager
def onednn_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run the linear layers of `model` by oneDNN within this context. Its weights must not change meanwhile.

    Results differ from `nn.Linear` by rounding. Layers in a precision that oneDNN does not multiply in remain as they
    are, and so do all layers of a model with more than 4 GiB of weights.

    Args:
        rows: the most rows of a step; calls with more are left to torch.
    """
    layers = [
        module
        for module in (model.modules() if copy_is_affordable(model) else ())
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and onednn_multiplies(matmul_dtype(module.weight))
    ]
    try:
        for layer in layers:
            vars(layer)["forward"] = _StepForward(layer, rows)  # found before the class's method
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _StepForward:
    """The forward of a layer: by oneDNN for a step, by torch for prompts, since oneDNN compiles each length anew."""

    def __init__(self, layer: nn.Linear, rows: int):
        self._product, self._layer, self._rows = join([layer], rows), layer, rows

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > self._rows * self._layer.in_features:
            return linear(inputs, self._layer.weight, self._layer.bias)
        return self._product(inputs)
