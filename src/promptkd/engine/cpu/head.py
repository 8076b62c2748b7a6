"""Products with a head on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from promptkd.engine.heads import Head, HeadProducts, Projection

__all__ = ["CpuHeadProducts"]

_BLOCK = 2**19  # logits that a divergence sees at a time: 2 MiB in float32, for its few temporaries to stay in cache


class CpuHeadProducts(HeadProducts):
    """Matrix products want many tokens at a time, divergences few, so a chunk is compared in blocks of rows."""

    def projection(self, head: Head, computing: torch.dtype, *, reuse: bool = False) -> Projection:
        return _CpuProjection(head, computing, reuse)

    def block_rows(self, vocabulary: int) -> int | None:
        return max(1, _BLOCK // vocabulary)


class _CpuProjection(Projection):
    """Logits in one buffer, since fresh memory costs about as much as the arithmetic on it.

    torch has no products of bfloat16 on CPU whose sums come out in float32. So the factors are float32, and where
    products were asked for in bfloat16, oneDNN is allowed to round them; it does on CPUs that multiply bfloat16.
    """

    def __init__(self, head: Head, computing: torch.dtype, reuse: bool):
        super().__init__(head, computing)
        self._reuse = reuse
        self._buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        wide, out = hidden.to(self.head.wide), self._out(hidden)
        with _factors_as(self.computing):
            if self.bias is None:
                products = torch.mm(wide, self.weight.T, out=out)
            else:
                products = torch.addmm(self.bias, wide, self.weight.T, out=out)
        return self.head.transformed(products)

    def to_hidden(self, prepared: Tensor) -> Tensor:
        with _factors_as(self.computing):
            return super().to_hidden(prepared)

    def add_to_weight(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        with _factors_as(self.computing):
            return super().add_to_weight(total, prepared, hidden)

    def _out(self, hidden: Tensor) -> Tensor | None:
        if not self._reuse:
            return None
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = self.weight.new_empty(len(hidden), len(self.weight))
        return self._buffer[: len(hidden)]


@contextmanager
def _factors_as(dtype: torch.dtype) -> Iterator[None]:
    """For bfloat16, float32 products whose factors may be rounded to it; else as torch is set."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if dtype != torch.bfloat16:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
