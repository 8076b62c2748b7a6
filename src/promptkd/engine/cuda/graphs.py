"""CUDA graphs of one function at several sizes, sharing their memory."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graphs"]


class Graphs:
    """Records a function once per key, and replays it. Where there is no CUDA device, the function is called."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's handle of the memory that the graphs share
        self._side: torch.cuda.Stream | None = None

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

        Raises:
            RuntimeError: if `function` waits for the device, or cannot be captured.
        """
        if device.type != "cuda":
            return function()
        with torch.cuda.device(device):
            if key not in self._recorded:
                self._recorded[key] = self._record(function)
            graph, output = self._recorded[key]
            graph.replay()
        return output

    def _record(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # torch.cuda.graph would empty the allocator's cache and collect garbage before every capture, some forty times
        self._side = self._side or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            function()  # libraries allocate their workspaces, Triton compiles
            _without_waiting(function)
            graph, output = self._captured(function)
        current.wait_stream(self._side)
        self._pool = graph.pool()
        return graph, output

    def _captured(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = function()
            except BaseException:
                with suppress(RuntimeError):  # the first error tells more
                    graph.capture_end()
                raise
            graph.capture_end()
        except torch.AcceleratorError as error:  # of this function, not of the device
            raise RuntimeError(f"a CUDA graph could not be captured: {error}") from error
        return graph, output


def _without_waiting(function: Callable[[], Tensor]) -> None:
    """Call `function`, and raise a RuntimeError where it waits for the device.

    A capture would end at such a place too, but leave torch's allocator and random numbers in the midst of it.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
