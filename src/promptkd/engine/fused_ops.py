"""RMS norm, rotary positions and SwiGLU of the Llama family, each with a hand-written backward.

They keep less for backward than autograd would and pass over memory less often. On CUDA each is compiled into one
kernel; `tests/engine/test_fused_ops.py` holds the compiled forms to the plain ones.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.utils._triton import has_triton

P = ParamSpec("P")
R = TypeVar("R")


def _compiled_on_cuda(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled once for all shapes if its first argument is on CUDA and Triton can compile."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return (compiled() if first.is_cuda and has_triton() else function)(*args, **kwargs)

    return call


def _wide(inputs: Tensor) -> Tensor:
    return inputs.to(torch.promote_types(torch.float32, inputs.dtype))


@_compiled_on_cuda
def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """w x r with r = (mean(x²) + ε)^-½ over the last dimension; and r, (…, 1), in float32 or wider.

    As in transformers, x r is rounded to the precision of x before it is multiplied by w.
    """
    wide = _wide(inputs)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
    return (wide * scale).to(inputs.dtype).mul_(weight), scale


@_compiled_on_cuda
def _rms_norm_to_inputs(gradient: Tensor, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx = r g' - x r³ mean(g' x) with g' = w g."""
    wide = _wide(inputs)
    weighted = _wide(gradient) * weight
    along = (weighted * wide).mean(-1, keepdim=True).mul_(scale.pow(3))
    return weighted.mul_(scale).addcmul_(wide, along, value=-1).to(inputs.dtype)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` of inputs (…, H) with a weight (H,)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        outputs, scale = rms_norm(inputs, weight, epsilon)
        ctx.save_for_backward(inputs, weight, scale)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, scale = ctx.saved_tensors
        to_weight = None
        if ctx.needs_input_grad[1]:  # dw = Σ g x r
            to_weight = (_wide(gradient) * inputs).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        return _rms_norm_to_inputs(gradient, inputs, weight, scale), to_weight, None


def rotation(rotary: nn.Module, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, D) for `rotate` at `positions` (B, T); the sines of the first half are negative."""
    cosines, sines = (each[:, :, None] for each in rotary(states, positions))
    half = sines.shape[-1] // 2
    return cosines, torch.cat([-sines[..., :half], sines[..., half:]], -1)


@_compiled_on_cuda
def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions of heads (…, heads, D): x cos + rotate_half(x) sin, in the precision of the heads."""
    rotated = (heads * cosines).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sines)
    return rotated.to(heads.dtype)


class ApplyRotary(torch.autograd.Function):
    """`rotate` of heads (S, heads, D), with the cosines and sines of `rotation`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return rotate(heads, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return rotate(gradient, cosines, -sines), None, None  # by the opposite angle


@_compiled_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return silu(gate).mul_(up)


@_compiled_on_cuda
def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


class SwiGLU(torch.autograd.Function):
    """`swiglu`, keeping only its inputs for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _swiglu_backward(gradient, *ctx.saved_tensors)
