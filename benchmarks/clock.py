"""Seconds and, on CUDA, peak memory. The device is synchronized first, because queued kernels have not run yet."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["median_seconds", "peak_bytes", "restart_peak", "seconds_of", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def restart_peak(device: torch.device) -> None:
    """Reset `peak_bytes`, which counts from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes of tensors on the device since `restart_peak`; None if the device does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats` calls, after one warm-up call that is not counted."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))
