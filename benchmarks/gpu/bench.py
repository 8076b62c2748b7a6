"""The context of a part of the run: its device, its shapes, its deadline, and where to send its results."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.targets import TARGETS

__all__ = ["Bench", "OutOfTime", "time_limit"]

Message = dict[str, Any]


class OutOfTime(BaseException):
    """The time was up before everything was done. Not an `Exception`, so that no library handles it as a failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body, in the main thread, when its time is up; a system call finishes first."""

    def up(number: int, frame: Any) -> None:
        raise OutOfTime(f"{seconds:.0f} s were not enough")

    before = signal.signal(signal.SIGALRM, up)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # a limit around this one
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3))


@dataclass(frozen=True)
class Bench:
    """The run of one part."""

    device: torch.device
    tiny: bool
    ends: float
    """Deadline of the part, by `time.monotonic`."""
    send: Callable[[Message], None]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.monotonic()

    def require(self, seconds: float, what: str) -> None:
        """Refuse to start work that would not be done in time.

        Raises:
            OutOfTime: if less than `seconds` are left.
        """
        if self.left < seconds:
            raise OutOfTime(f"{self.left:.0f} s were left, and {what} takes about {seconds:.0f}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.send({"kind": "line", "text": text})

    def report(self, name: str, value: Any, unit: str = "") -> None:
        """Print a result, and write it to the record."""
        self.send({"kind": "result", "name": name, "value": value})
        self.say(f"{name}: {_text(value)}{' ' * bool(unit)}{unit}")

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Print and record a check that passed or failed."""
        self.send({"kind": "check", "name": name, "passed": bool(passed), "detail": detail})
        self.say(f"{'right' if passed else 'WRONG'}: {name} ({detail})")

    def measured(self, target: str, value: float) -> None:
        """Record the value for one of `TARGETS`."""
        if target not in TARGETS:
            raise ValueError(f"A target must be one of {', '.join(TARGETS)}. Got {target!r}.")
        self.send({"kind": "target", "name": target, "value": float(value)})

    def skip(self, what: str, reason: str = "needs CUDA") -> None:
        """Print and record that something cannot be measured here."""
        self.send({"kind": "skipped", "name": what, "reason": reason})
        self.say(f"{what}: skipped: {reason}")

    @contextmanager
    def attempt(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """Run foreign code, or work that may not fit in memory; a failure is reported, and the part continues.

        Args:
            seconds: a separate limit, within that of the part.
        """
        own = seconds is not None and seconds < self.left
        try:
            with time_limit(seconds) if own and seconds is not None else nullcontext():
                yield
        except (Exception, OutOfTime) as error:  # foreign code can raise anything
            if isinstance(error, OutOfTime) and not own:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.send({"kind": "skipped", "name": what, "reason": reason})
            self.say(f"{what}: failed: {reason}")
        if self.on_cuda:
            torch.cuda.empty_cache()

    def autocast(self) -> torch.autocast:
        """bfloat16 as in training on CUDA; no effect on a CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_cuda)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
