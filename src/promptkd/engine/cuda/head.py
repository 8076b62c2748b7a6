"""Products with a head on CUDA: factors in half precision, sums and results in float32."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from promptkd.engine.heads import Head, HeadProducts, Projection
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

__all__ = ["CudaHeadProducts"]

_ALIGNED = 64  # columns: the rows of a matrix must begin at multiples of 128 bytes for the fast products


class CudaHeadProducts(HeadProducts):
    """A head's weights are cast once per optimizer step, into the same memory each time: CUDA graphs read it."""

    chunk = 2048

    def __init__(self) -> None:
        self._casts = WeakIdKeyDictionary()  # from a weight to its `_Cast`

    def kernels(self, dtype: torch.dtype) -> Kernels:
        """Fused ones for float32 where Triton is installed."""
        if dtype != torch.float32 or find_spec("triton") is None:
            return PLAIN_KERNELS
        from promptkd.engine.cuda.kernels import KERNELS

        return KERNELS

    def projection(self, head: Head, computing: torch.dtype, *, reuse: bool = False) -> Projection:
        if computing not in (torch.bfloat16, torch.float16):
            return Projection(head, computing)
        return _HalfProjection(head, computing, self._cast(head, computing))

    def _cast(self, head: Head, dtype: torch.dtype) -> Tensor:
        """The head's weight in `dtype`, (V rounded up to 64, H). What its last rows hold means nothing."""
        weight = head.weight.detach()
        columns = -(-head.vocabulary // _ALIGNED) * _ALIGNED
        if weight.dtype == dtype and len(weight) >= columns:
            return weight[:columns]
        known = self._casts.get(head.weight)
        if known is None or known.shape != (columns, weight.shape[1]) or known.dtype != dtype:
            known = self._casts[head.weight] = _Cast(weight.new_zeros(columns, weight.shape[1], dtype=dtype))
        known.refresh(head.weight)
        return known.tensor


class _Cast:
    """A weight in another precision, and the version of the weight that it is a cast of."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._version: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def refresh(self, weight: Tensor) -> None:
        if self._version != weight._version:  # torch counts what is written over a tensor, an optimizer's steps too
            rows = min(len(weight), len(self.tensor))
            self.tensor[:rows].copy_(weight.detach()[:rows])
            self._version = weight._version


class _HalfProjection(Projection):
    """Products of half precision whose results are float32, on rows that begin at aligned addresses.

    Args:
        cast: (V rounded up, H) the weight in half precision.
    """

    def __init__(self, head: Head, computing: torch.dtype, cast: Tensor):
        self.head, self.computing, self.weight = head, computing, cast
        self.bias = None if head.bias is None else head.bias.detach()[: head.vocabulary].float()

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
