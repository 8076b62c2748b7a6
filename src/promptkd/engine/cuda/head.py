"""Matrix products with a head on CUDA: factors in half precision, sums and results in float32."""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from promptkd.engine.fused_decoder import outside_inference_mode
from promptkd.engine.heads import Head, HeadBackend, Projection
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

_ALIGNMENT = 64  # columns: fast products need the rows of a matrix to begin at multiples of 128 bytes


class CudaHeadBackend(HeadBackend):
    """A head's weights are cast into the same memory each time, since CUDA graphs read it."""

    chunk = 2048

    def __init__(self) -> None:
        self._casts = WeakIdKeyDictionary()  # from a weight or bias to its cast

    def kernels(self, dtype: torch.dtype) -> Kernels:
        """Triton's for float32, where Triton compiles them."""
        return _triton_kernels() if dtype == torch.float32 else PLAIN_KERNELS

    def projection(self, head: Head, dtype: torch.dtype) -> Projection:
        if dtype != torch.bfloat16:  # in float16 the smallest gradients would vanish
            return Projection(head, dtype)
        size, bias = head.vocabulary_size, head.bias
        weight = self._aligned(head.weight, size, dtype)
        return _HalfProjection(head, weight, None if bias is None else self._aligned(bias, size, torch.float32)[:size])

    @outside_inference_mode
    def _aligned(self, weight: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """A weight or bias in `dtype`, (V rounded up to 64, …). Its last rows may hold anything.

        It is cast at every call, in a millisecond: fused optimizers overwrite weights without counting versions.
        """
        columns = rounded_up(vocabulary, _ALIGNMENT)
        if weight.dtype == dtype and len(weight) >= columns:
            return weight.detach()[:columns]
        cast = self._casts.get(weight)
        if cast is None or cast.dtype != dtype:
            # all rows, however many are asked for: one cast at one address serves every vocabulary
            shape = (rounded_up(len(weight), _ALIGNMENT), *weight.shape[1:])
            cast = self._casts[weight] = torch.zeros(shape, dtype=dtype, device=weight.device)
        cast[: len(weight)].copy_(weight)
        return cast[:columns]


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@cache
def _triton_kernels() -> Kernels:
    """Triton's kernels, if a small one runs: it needs a C compiler, which slim images lack."""
    if find_spec("triton") is None:
        return PLAIN_KERNELS
    from promptkd.engine.cuda.triton_kernels import KERNELS

    logits = torch.zeros(1, 8, device="cuda")
    try:
        KERNELS.reverse_kl(logits, logits.clone())
    except (RuntimeError, OSError, ImportError) as error:
        message = "Divergences run by torch's own operations: Triton compiles nothing here (%s)."
        logging.getLogger(__name__).warning(message, error)
        return PLAIN_KERNELS
    return KERNELS


class _HalfProjection(Projection):
    """Products in float32 of factors in half precision, with a weight (V rounded up, H) whose rows are aligned."""

    def __init__(self, head: Head, weight: Tensor, bias: Tensor | None):
        self.head, self.dtype, self.weight, self.bias = head, weight.dtype, weight, bias

    def logits(self, hidden: Tensor) -> Tensor:
        products = _product(hidden.to(self.dtype), self.weight.T)[:, : self.head.vocabulary_size]
        return self.head.transform_(products if self.bias is None else products.add_(self.bias))

    def prepare(self, gradient: Tensor) -> Tensor:
        """(C, V rounded up) in half precision, 0 in the padding columns."""
        padded = gradient.new_zeros(len(gradient), len(self.weight), dtype=self.dtype)
        padded[:, : gradient.shape[1]] = gradient
        return padded

    def hidden_gradient(self, prepared: Tensor) -> Tensor:
        return _product(prepared, self.weight)

    def add_weight_gradient(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        products = _product(prepared.T, hidden.to(self.dtype))[: self.head.vocabulary_size]
        return products if total is None else total.add_(products)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(A, B) x (B, C) of half precision, with sums and results in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)
