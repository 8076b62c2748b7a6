"""Linear layers with weights laid out anew for the processor while a model decodes.

A decode reads every weight once per token, for a handful of rows. On CPUs oneDNN does that about twice as fast as the
BLAS behind `nn.Linear`, if the weights are in blocks of its own; laying them out costs about as much as one pass over
them, and as much memory again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from promptkd.engine.backbone import computing_with
from promptkd.engine.fused_decoder import joined_weights

__all__ = ["PackedLinear", "PlainLinear", "fits_twice", "joined", "onednn_multiplies", "prepacked_linears"]

_MOST_BYTES = 4 * 2**30  # of weights: a second copy of more is not worth its memory


class PackedLinear:
    """Linear layers that read the same input as one, with the weights that they have when this is made.

    Args:
        weight: (outputs, inputs), in a precision for which `onednn_multiplies` holds.
        bias: (outputs,) or None.
        rows: how many rows a call will have, about.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.dtype = weight.dtype
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """The outputs side by side, (…, all outputs); with `plus`, of that shape, added, in its precision."""
        inputs = inputs.to(self.dtype)
        if plus is not None and plus.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, self.weight, self.bias, "add")
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs if plus is None else plus + outputs


class PlainLinear:
    """The same by torch's own product, for precisions that oneDNN does not multiply in here."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """As `PackedLinear`."""
        outputs = linear(inputs.to(self.weight.dtype), self.weight, self.bias)
        return outputs if plus is None else plus + outputs


def joined(layers: Sequence[nn.Linear], rows: int) -> PackedLinear | PlainLinear:
    """One of several layers that read the same input, in the precision in which they multiply here and now.

    Args:
        rows: how many rows a call will have, about.
    """
    dtype = computing_with(layers[0].weight)
    weight, bias = (None if each is None else each.to(dtype) for each in joined_weights(layers))
    assert weight is not None
    return PackedLinear(weight, bias, rows) if onednn_multiplies(dtype) else PlainLinear(weight, bias)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this precision on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fits_twice(model: nn.Module) -> bool:
    """Whether a second copy of the linear layers, in the precision in which they multiply, is worth its memory."""
    layers = [each for each in model.modules() if type(each) is nn.Linear]
    return sum(each.weight.numel() * computing_with(each.weight).itemsize for each in layers) <= _MOST_BYTES


@contextmanager
def prepacked_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run the linear layers of `model` by oneDNN while this is entered; its weights must stay as they are.

    Nothing is changed in precisions that oneDNN does not multiply in, or for more than 4 GiB of weights. Results differ
    from `nn.Linear` by rounding.

    Args:
        rows: the most rows that a step has; calls with more are left to torch.
    """
    layers = _suitable(model) if fits_twice(model) else []
    try:
        for layer in layers:
            vars(layer)["forward"] = _Step(layer, rows)  # found before the class's own
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _Step:
    """The forward of a layer: packed for a step, its own for prompts, of whose every length oneDNN keeps a program."""

    def __init__(self, layer: nn.Linear, rows: int):
        self._packed, self._layer, self._rows = joined([layer], rows), layer, rows

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > self._rows * self._layer.in_features:
            return linear(inputs, self._layer.weight, self._layer.bias)
        return self._packed(inputs)


def _suitable(model: nn.Module) -> list[nn.Linear]:
    layers = [each for each in model.modules() if type(each) is nn.Linear and "forward" not in vars(each)]
    return [each for each in layers if onednn_multiplies(computing_with(each.weight))]
