"""Linear layers with weights laid out anew for the processor while a model decodes.

A decode reads every weight once a token, for a handful of rows. On CPUs oneDNN does that about twice as fast as the
BLAS behind `nn.Linear`, if the weights are in blocks of its own; laying them out costs about as much as one pass over
them, and as much memory again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from promptkd.switches import switched_on

__all__ = ["PackedLinear", "multiplies_by_onednn", "prepacked_linears", "prepacks"]

_MOST_BYTES = 4 * 2**30  # of weights: a second copy of more is not worth its memory


class PackedLinear:
    """Linear layers that read the same input as one, with the weights that they have when this is made.

    Args:
        layers: of as many inputs; all of them have a bias, or none has.
        rows: how many rows a call will have, about.
    """

    def __init__(self, layers: Sequence[nn.Linear], rows: int):
        weights = [each.weight.detach() for each in layers]
        biases = [each.bias.detach() for each in layers if each.bias is not None]
        if 0 < len(biases) < len(layers):
            raise ValueError("Either all layers that are joined have a bias, or none has.")
        self.bias = _joined(biases) if biases else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(_joined(weights), rows)

    def __call__(self, inputs: Tensor, plus: Tensor | None = None) -> Tensor:
        """The outputs side by side, (…, all outputs); with `plus`, of that shape, added."""
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, plus, self.weight, self.bias, "add")


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def multiplies_by_onednn(weight: Tensor) -> bool:
    """Whether oneDNN may multiply by this weight here and now: on a CPU, in float32, without autocast."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")  # which would hand over inputs in another precision
    )


def prepacks(model: nn.Module) -> bool:
    """Whether the model's linear layers may be laid out anew: those that oneDNN multiplies by, up to 4 GiB."""
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in _suitable(model))
    return switched_on("prepacked") and 0 < size <= _MOST_BYTES


@contextmanager
def prepacked_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run the float32 linear layers of `model` by oneDNN while this is entered; its weights must stay as they are.

    Nothing is changed on other devices, in other precisions, under autocast, or for more than 4 GiB of weights. Results
    differ from `nn.Linear` by rounding.

    Args:
        rows: the most rows that a step has; calls with more are left to torch.
    """
    layers = _suitable(model) if prepacks(model) else []
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
        self._packed, self._layer, self._rows = PackedLinear([layer], rows), layer, rows

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.numel() > self._rows * self._layer.in_features:
            return linear(inputs, self._layer.weight, self._layer.bias)
        return self._packed(inputs)


def _suitable(model: nn.Module) -> list[nn.Linear]:
    layers = [each for each in model.modules() if type(each) is nn.Linear and "forward" not in vars(each)]
    return [each for each in layers if multiplies_by_onednn(each.weight)]
