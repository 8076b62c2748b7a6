"""Matrix products with a head on CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from promptkd.engine.heads import Head, HeadBackend, Projection


class CpuHeadBackend(HeadBackend):
    """Matrix products want many tokens at a time and divergences few, so a chunk is compared in blocks of rows."""

    block = 2**19  # 2 MiB in float32, so that the few temporaries of a divergence stay in cache

    def projection(self, head: Head, dtype: torch.dtype) -> Projection:
        return _CpuProjection(head, dtype)


class _CpuProjection(Projection):
    """Logits in one buffer, since fresh memory costs about as much as the arithmetic on it.

    torch has no bfloat16 products on CPU with float32 sums. So the factors are float32, and where bfloat16 was asked
    for, oneDNN may round them, as it does on CPUs that multiply bfloat16.
    """

    _buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = self.weight.new_empty(len(hidden), len(self.weight))
        products, wide = self._buffer[: len(hidden)], hidden.to(self.head.logits_dtype)
        with _factors_may_round_to(self.dtype):
            if self.bias is None:
                torch.mm(wide, self.weight.T, out=products)
            else:
                torch.addmm(self.bias, wide, self.weight.T, out=products)
        return self.head.transform_(products)

    def hidden_gradient(self, prepared: Tensor) -> Tensor:
        with _factors_may_round_to(self.dtype):
            return super().hidden_gradient(prepared)

    def add_weight_gradient(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        with _factors_may_round_to(self.dtype):
            return super().add_weight_gradient(total, prepared, hidden)


@contextmanager
def _factors_may_round_to(dtype: torch.dtype) -> Iterator[None]:
    """For bfloat16, float32 products whose factors may be rounded to it; otherwise torch's own setting."""
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
