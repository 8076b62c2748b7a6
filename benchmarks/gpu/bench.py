"""What a part of the run is given: where to run, how large, until when, and somebody to tell what it found."""

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
    """Time was up before everything was done. No `Exception`, lest a library on the way takes it for a failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body, in the main thread, when its time is up; a call into the system is waited for."""

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
    """One part's run."""

    device: torch.device
    tiny: bool
    ends: float
    """When the part must be done, by `time.monotonic`."""
    send: Callable[[Message], None]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def require(self, seconds: float, what: str) -> None:
        """Refuse to begin what would not be done in time.

        Raises:
            OutOfTime: if less than `seconds` are left.
        """
        if self.left < seconds:
            raise OutOfTime(f"{self.left:.0f} s were left, and {what} takes about {seconds:.0f}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.send({"kind": "line", "text": text})

    def report(self, name: str, value: Any, unit: str = "") -> None:
        """Print a result, and write it into the record."""
        self.send({"kind": "result", "name": name, "value": value})
        self.say(f"{name}: {_text(value)}{' ' * bool(unit)}{unit}")

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Something that is right or wrong."""
        self.send({"kind": "check", "name": name, "passed": bool(passed), "detail": detail})
        self.say(f"{'right' if passed else 'WRONG'}: {name} ({detail})")

    def measured(self, target: str, value: float) -> None:
        """The value that one of `TARGETS` is about."""
        if target not in TARGETS:
            raise ValueError(f"A target must be one of {', '.join(TARGETS)}. Got {target!r}.")
        self.send({"kind": "target", "name": target, "value": float(value)})

    def skip(self, what: str, reason: str = "needs CUDA") -> None:
        """Something that cannot be measured here."""
        self.send({"kind": "skipped", "name": what, "reason": reason})
        self.say(f"{what}: skipped: {reason}")

    @contextmanager
    def attempt(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """Run something of another's, or something that may not fit; a failure is told, and the part continues.

        Args:
            seconds: a limit of its own, within the part's.
        """
        own = seconds is not None and seconds < self.left
        try:
            with time_limit(seconds) if own and seconds is not None else nullcontext():
                yield
        except (Exception, OutOfTime) as error:  # what foreign code raises can be anything
            if isinstance(error, OutOfTime) and not own:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.send({"kind": "skipped", "name": what, "reason": reason})
            self.say(f"{what}: failed: {reason}")
        if self.on_cuda:
            torch.cuda.empty_cache()

    def autocast(self) -> torch.autocast:
        """bfloat16 as in training on CUDA; nothing on a CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_cuda)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
