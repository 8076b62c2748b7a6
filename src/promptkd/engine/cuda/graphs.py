"""CUDA graphs of a function at several sizes, sharing their memory."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """Records a function once per key, and replays it. Off CUDA, the function is called."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's handle of the memory that the graphs share
        self._side: torch.cuda.Stream | None = None

    def clear(self) -> None:
        """Forget every graph, when the addresses that they read are no longer valid."""
        self._recorded.clear()
        self._pool = None

    def run(self, key: Hashable, device: torch.device, function: Callable[[], Tensor]) -> Tensor:
        """The result of `function`, valid until the next call; a RuntimeError where it waits for the device.

        `key` has everything that changes which kernels run. The function reads fixed addresses and may run repeatedly.
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
        # torch.cuda.graph would empty the allocator's cache and collect garbage before each of some forty captures
        self._side = self._side or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                graph, output = self._captured(function)
        finally:  # also after a failure: what the function has begun may still write into memory that is freed next
            current.wait_stream(self._side)
        self._pool = graph.pool()
        return graph, output

    def _captured(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        function()  # libraries allocate their workspaces, Triton compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:  # a function that waits for the device fails here, instead of in the middle of a capture
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
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
