"""Products with a head on CUDA: factors in half precision, sums and results in float32."""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from promptkd.engine.heads import Head, HeadProducts, Projection
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

__all__ = ["CudaHeadProducts"]

_LOGGER = logging.getLogger(__name__)
_ALIGNED = 64  # columns: the rows of a matrix must begin at multiples of 128 bytes for the fast products


class CudaHeadProducts(HeadProducts):
    """A head's weights are cast into the same memory each time: CUDA graphs read it."""

    chunk = 2048

    def __init__(self) -> None:
        self._casts = WeakIdKeyDictionary()  # from a weight or bias to its cast

    def kernels(self, dtype: torch.dtype) -> Kernels:
        """Fused ones for float32 where Triton compiles them."""
        return _fused_kernels() if dtype == torch.float32 else PLAIN_KERNELS

    def projection(self, head: Head, computing: torch.dtype, *, reuse: bool = False) -> Projection:
        if computing != torch.bfloat16:  # in float16 the smallest gradients would vanish
            return Projection(head, computing)
        weight = self._aligned(head.weight, head.vocabulary, computing)
        bias = None if head.bias is None else self._aligned(head.bias, head.vocabulary, torch.float32)
        return _HalfProjection(head, computing, weight, bias)

    @torch.inference_mode(False)  # what is made here outlives the call
    @torch.no_grad()
    def _aligned(self, weight: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """A weight or bias in `dtype`, (V rounded up to 64, …). What its last rows hold means nothing.

        It is cast at every call, in a millisecond at most. No version of a tensor tells whether that is needed: fused
        optimizers and sharding write over weights without counting.
        """
        columns = _rounded_up(vocabulary)
        if weight.dtype == dtype and len(weight) >= columns:
            return weight.detach()[:columns]
        cast = self._casts.get(weight)
        if cast is None or cast.dtype != dtype:
            # All rows, however many are asked for: one cast serves every vocabulary, and its address stays.
            shape = (_rounded_up(len(weight)), *weight.shape[1:])
            cast = self._casts[weight] = torch.zeros(shape, dtype=dtype, device=weight.device)
        cast[: len(weight)].copy_(weight)
        return cast[:columns]


def _rounded_up(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


@cache
def _fused_kernels() -> Kernels:
    """Triton's, if a small one runs: it needs a C compiler, which slim images lack."""
    if find_spec("triton") is None:
        return PLAIN_KERNELS
    from promptkd.engine.cuda.kernels import KERNELS

    logits = torch.zeros(1, 8, device="cuda")
    try:
        KERNELS.reverse_kl(logits, logits.clone())
    except (RuntimeError, OSError, ImportError) as error:
        _LOGGER.warning("Divergences run by torch's own operations: Triton compiles nothing here (%s).", error)
        return PLAIN_KERNELS
    return KERNELS


class _HalfProjection(Projection):
    """Products of half precision whose results are float32, on rows that begin at aligned addresses.

    Args:
        weight: (V rounded up, H) in half precision.
        bias: (V rounded up,) in float32.
    """

    def __init__(self, head: Head, computing: torch.dtype, weight: Tensor, bias: Tensor | None):
        self.head, self.computing, self.weight = head, computing, weight
        self.bias = None if bias is None else bias[: head.vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        products = _product(hidden.to(self.computing), self.weight.T)[:, : self.head.vocabulary]
        return self.head.transformed(products if self.bias is None else products.add_(self.bias))

    def prepared(self, gradient: Tensor) -> Tensor:
        """(C, V rounded up) in half precision, 0 in the columns that stand for no token."""
        padded = gradient.new_zeros(len(gradient), len(self.weight), dtype=self.computing)
        padded[:, : gradient.shape[1]] = gradient
        return padded

    def to_hidden(self, prepared: Tensor) -> Tensor:
        return _product(prepared, self.weight)

    def add_to_weight(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        products = _product(prepared.T, hidden.to(self.computing))[: self.head.vocabulary]
        return products if total is None else total.add_(products)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(A, B) x (B, C) of half precision, summed in float32 and left so."""
    return torch.mm(left, right, out_dtype=torch.float32)
