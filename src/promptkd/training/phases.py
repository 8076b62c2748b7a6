"""Time and memory of an optimizer step by its phases, measured at their ends.

A clock that is read before a GPU's queued kernels are done measures the queue, so each phase ends with the device
synchronized: a handful of times per optimizer step, and never within a forward or backward pass.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from promptkd.memory import peak_memory, resident_memory, restart_peak


@dataclass
class Phase:
    """A phase that runs, or ran when an error came."""

    name: str
    lengths: tuple[int, ...] = ()  # tokens of each row that it works on; () where that is not known


class Phases:
    """Seconds and peaks of memory by phase: "rollout", "prompt", "student", "update" and "validation".

    Fine-tuning has "training" in place of the first three. A phase within another one stops that one's clock.

    The memory is a CUDA device's own, as torch's allocator hands it out, or that of this process.
    """

    def __init__(self, device: torch.device):
        self._memory = (_CudaMemory if device.type == "cuda" else _ProcessMemory)(device)
        self._running: list[Phase] = []
        self._since = 0.0
        self._lap: dict[str, float] = {}
        self._broken: Phase | None = None
        self.seconds: dict[str, float] = {}
        """Since the start, by phase; a phase inside of another one counts for itself alone."""
        self.peaks: dict[str, int] = {}  # the most bytes held while each phase ran, all that stood before it included

    @contextmanager
    def __call__(self, name: str, *, synchronize: bool = True) -> Iterator[None]:
        """Run the body as a phase; `synchronize` False leaves the wait to the next piece of the same phase."""
        self.begin(name)
        try:
            yield
        except BaseException:
            self._broken = self._broken or self._running[-1]
            self._running.pop()
            raise
        self.end(synchronize=synchronize)

    def begin(self, name: str) -> None:
        """Start a phase that `end` ends, where no block of code holds it."""
        self._account(synchronize=bool(self._running))
        self._running.append(Phase(name))

    def end(self, *, synchronize: bool = True) -> None:
        """End the phase that was begun last."""
        self._account(synchronize=synchronize)
        self._running.pop()

    def works_on(self, lengths: Sequence[int]) -> None:
        """Note the tokens of each row that the running phase works on, for the message of a phase that fails."""
        self._running[-1].lengths = tuple(lengths)

    def restart(self) -> None:
        """Forget a phase that an error ended. Peaks and seconds stay."""
        self._running.clear()
        self._broken = None
        self.lap()

    @property
    def failing(self) -> Phase | None:
        """The innermost phase that an error has ended, or may be ending now."""
        return self._broken or (self._running[-1] if self._running else None)

    @property
    def peak(self) -> int:
        """The most bytes held since the process began, in phases and between them."""
        return self._memory.peak()

    @property
    def sampled(self) -> bool:
        """Whether `peaks` are what was held at the ends of phases, since the system does not tell more."""
        return self._memory.sampled

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        spent = {name: seconds - self._lap.get(name, 0.0) for name, seconds in self.seconds.items()}
        self._lap = dict(self.seconds)
        return spent

    def _account(self, *, synchronize: bool) -> None:
        """Count time and memory since the last turn for the phase that has run until now."""
        if synchronize:
            self._memory.synchronize()
        now, reached = time.perf_counter(), self._memory.turn()
        if self._running:
            name = self._running[-1].name
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.peaks[name] = max(self.peaks.get(name, 0), reached)
        self._since = now


class _CudaMemory:
    """What torch's allocator has handed out on one device."""

    sampled = False

    def __init__(self, device: torch.device):
        self._device = device
        self._before = 0

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def turn(self) -> int:
        """The peak since the last turn. torch's own count starts over, so the overall peak is kept here."""
        reached = torch.cuda.max_memory_allocated(self._device)
        self._before = max(self._before, reached)
        torch.cuda.reset_peak_memory_stats(self._device)
        return reached

    def peak(self) -> int:
        return max(self._before, torch.cuda.max_memory_allocated(self._device))


class _ProcessMemory:
    """What this process holds of the machine's memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self.sampled = restart_peak() is None

    def synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def turn(self) -> int:
        """The peak since the last turn; where the system keeps one peak only, what is held now."""
        reached = restart_peak()
        return resident_memory() if reached is None else reached

    def peak(self) -> int:
        return peak_memory()
