"""Linear layers with weights laid out anew for the processor while a model decodes.

A decode reads every weight once a token, for a handful of rows. On CPUs oneDNN does that about twice as fast as the
BLAS behind `nn.Linear`, if the weights are in blocks of its own; laying them out costs about as much as one pass over
them, and as much memory again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from promptkd.switches import switched_on

__all__ = ["prepacked_linears"]

_MOST_BYTES = 4 * 2**30  # of weights: a second copy of more is not worth its memory


@contextmanager
def prepacked_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run the float32 linear layers of `model` by oneDNN while this is entered; its weights must stay as they are.

    Nothing is changed on other devices, in other precisions, under autocast, or for more than 4 GiB of weights. Results
    differ from `nn.Linear` by rounding.

    Args:
        rows: how many rows a call will have, about.
    """
    layers = [each for each in model.modules() if type(each) is nn.Linear and _suits(each)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    packs = switched_on("prepacked") and torch.backends.mkldnn.is_available() and size <= _MOST_BYTES
    packs = packs and not torch.is_autocast_enabled("cpu")  # which would hand over inputs in another precision
    try:
        for layer in layers if packs else ():
            vars(layer)["forward"] = _Packed(layer, rows)  # found before the class's own
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _suits(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and "forward" not in vars(layer)


class _Packed:
    """The forward of a linear layer."""

    def __init__(self, layer: nn.Linear, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
