"""Linear layers run by oneDNN in place of the BLAS behind `nn.Linear`, on CPUs in float32.

oneDNN's products come closer to what the processor can do: by a tenth where hundreds of tokens are scored, and about
twice as fast where a decode reads every weight for a handful of rows, if the weights are laid out for it beforehand.
Results differ from `nn.Linear` by rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from promptkd.switches import switched_on

__all__ = ["onednn_linears", "prepacked_linears"]

_MOST_BYTES = 4 * 2**30  # of weights: a second copy of more is not worth its memory


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """Run the float32 linear layers of `model` by oneDNN while this is entered, with gradients.

    Nothing is changed on other devices, in other precisions, or under autocast.
    """
    layers = _suited(model) if switched_on("onednn") else []
    with _forwards(layers, lambda layer: lambda inputs: _Linear.apply(inputs, layer.weight, layer.bias)):
        yield


@contextmanager
def prepacked_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run them by oneDNN, with weights laid out anew, which must stay as they are; without gradients.

    Laying out costs about as much as one pass over the weights, and as much memory again: above 4 GiB of weights
    nothing is changed.

    Args:
        rows: how many rows a call will have, about.
    """
    layers = _suited(model) if switched_on("prepacked") else []
    small = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) <= _MOST_BYTES
    with _forwards(layers if small else [], lambda layer: _Prepacked(layer, rows)):
        yield


def _suited(model: nn.Module) -> list[nn.Linear]:
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return []  # autocast would hand over inputs in another precision
    layers = [each for each in model.modules() if type(each) is nn.Linear and "forward" not in vars(each)]
    return [each for each in layers if each.weight.device.type == "cpu" and each.weight.dtype == torch.float32]


@contextmanager
def _forwards(layers: list[nn.Linear], forward_of: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Forwards of their own for `layers` while this is entered."""
    try:
        for layer in layers:
            vars(layer)["forward"] = forward_of(layer)  # found before the class's own
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs (…, K) times the transpose of `weight` (N, K), plus `bias` (N,)."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Prepacked:
    """The forward of a linear layer."""

    def __init__(self, layer: nn.Linear, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        return _product(inputs, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        to_inputs, to_weight, to_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.T, None) if to_inputs else None,
            rows.T @ inputs.flatten(0, -2) if to_weight else None,  # oneDNN is no faster at this one
            rows.sum(0) if to_bias else None,
        )
