"""CUDA graphs of one function at several sizes, sharing their memory."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graphs"]

_WARM_UPS = 2  # runs before a capture: libraries allocate their workspaces, Triton compiles


class Graphs:
    """Records a function once per key, and replays it. Where there is no CUDA device, the function is called."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's handle of the memory that the graphs share

    def clear(self) -> None:
        """Forget every graph: what they read has moved."""
        self._recorded.clear()
        self._pool = None

    def run(self, key: Hashable, device: torch.device, function: Callable[[], Tensor]) -> Tensor:
        """What `function` returns; it holds until the next call.

        Args:
            key: everything that changes which kernels run, sizes above all.
            function: waits for nothing, and may be called again without harm: it reads and writes tensors that stay
                where they are.
        """
        if device.type != "cuda":
            return function()
        if key not in self._recorded:
            self._recorded[key] = self._record(function)
        graph, output = self._recorded[key]
        graph.replay()
        return output

    def _record(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # torch.cuda.graph would empty the allocator's cache and collect garbage before every capture, some forty times
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                function()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = function()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        self._pool = graph.pool()
        return graph, output
