"""Matrix products with a head on CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from promptkd.engine.heads import Head, HeadBackend, Projection

_BLOCK = 2**19  # logits that a divergence takes at a time: 2 MiB in float32, so that its few temporaries stay in cache


class CpuHeadBackend(HeadBackend):
    """Matrix products want many tokens at a time and divergences few, so a chunk is compared in blocks of rows."""

    def projection(self, head: Head, dtype: torch.dtype, *, reuse: bool = False) -> Projection:
        return _CpuProjection(head, dtype, reuse)

    def block_rows(self, vocabulary: int) -> int | None:
        return max(1, _BLOCK // vocabulary)


class _CpuProjection(Projection):
    """Logits in one buffer, since fresh memory costs about as much as the arithmetic on it.

    torch has no bfloat16 products on CPU with float32 sums. So the factors are float32, and where bfloat16 was asked
    for, oneDNN may round them, as it does on CPUs that multiply bfloat16.
    """

    def __init__(self, head: Head, dtype: torch.dtype, reuse: bool):
        super().__init__(head, dtype)
        self._reuse = reuse
        self._buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        wide, out = hidden.to(self.head.logits_dtype), None
        if self._reuse:
            if self._buffer is None or len(self._buffer) < len(hidden):
                self._buffer = self.weight.new_empty(len(hidden), len(self.weight))
            out = self._buffer[: len(hidden)]
        with _factors_may_round_to(self.dtype):
            if self.bias is None:
                products = torch.mm(wide, self.weight.T, out=out)
            else:
                products = torch.addmm(self.bias, wide, self.weight.T, out=out)
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
