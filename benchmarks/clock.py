"""Seconds and, on CUDA, peaks of memory. The device is waited for first: queued kernels have not run yet."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Laps", "median_seconds", "peak_bytes", "restart_peak", "seconds_of", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def restart_peak(device: torch.device) -> None:
    """`peak_bytes` from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that tensors held on the device since `restart_peak`; None where the device does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats` calls, after one that is not counted."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))


class Laps:
    """Seconds and peaks of a step's phases. A phase inside of another one counts for itself alone.

    with laps("student"):
        ...
        with laps("rollout"):  # the student's clock stands still meanwhile
            ...
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._running: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, list[float]] = {}
        """By phase, one for each step."""
        self.peaks: dict[str, int] = {}
        """By phase, the most bytes of all steps; empty where the device does not count."""

    def begin_step(self) -> None:
        """What follows belongs to a further step."""
        for laps in self.seconds.values():
            laps.append(0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._turn()
        self._running.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Count what ran since the last turn for the phase that it ran in."""
        synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            phase = self._running[-1]
            self.seconds.setdefault(phase, [0.0])[-1] += now - self._since
            reached = peak_bytes(self._device)
            if reached is not None:
                self.peaks[phase] = max(reached, self.peaks.get(phase, 0))
        restart_peak(self._device)
        self._since = now

    def medians(self, skip: int = 0) -> dict[str, float]:
        """Seconds by phase, the median of all steps but the first `skip`."""
        return {phase: statistics.median(_behind(laps, skip)) for phase, laps in self.seconds.items()}


def _behind(laps: Sequence[float], skip: int) -> Sequence[float]:
    return laps[skip:] or laps
