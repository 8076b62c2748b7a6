"""Training that a signal ends with a checkpoint."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from promptkd.errors import Stopped
from promptkd.training.callbacks import ends_epoch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HEARD = "Stopping after this optimizer step, with a checkpoint. A second signal ends at once.\n"
_ECHO = 1.0  # seconds: a launcher passes on what the terminal or the scheduler has sent to its processes already


class StopOnSignal(TrainerCallback):
    """After SIGINT or SIGTERM training ends with the step under way and a checkpoint; a second one ends it at once.

    Within an optimizer step the prompt has moved already, and gradients are summed in part. A validation that is due
    comes before the checkpoint. The signal may reach any of several processes; all end at the same step.

    It is the trainer's last callback, and the context that `train()` runs in. Raises `Stopped`.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._process = os.getpid()
        self._heard = 0
        self._heard_at = 0.0
        self._agreed = 0
        self._in_epoch = True
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for each in _SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:  # nohup, or a shell's background job
                self._handlers[each] = signal.signal(each, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked loader of data
            if number != signal.SIGINT:  # which a terminal sends to all; it serves until this process has done with it
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif not self._heard:
            self._heard, self._heard_at = number, time.monotonic()
            if self._accelerator.is_main_process:
                os.write(2, _HEARD.encode())  # `print` must not be entered twice, and a handler runs anywhere
        elif time.monotonic() - self._heard_at > _ECHO:
            raise Stopped(number, "before a checkpoint was written")

    def _agree(self, control: Any) -> None:
        """Ask for a checkpoint if any process was told to stop. All processes ask at the same point."""
        if not self._agreed:
            heard = torch.tensor([self._heard], device=self._accelerator.device)
            self._agreed = int(self._accelerator.gather(heard).max())
        if self._agreed:
            control.should_save = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_epoch = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not ends_epoch(state):  # else the epoch's own validation comes first
            self._agree(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_epoch = False
        self._agree(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (self._in_epoch and ends_epoch(state)):
            self._agree(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree(control)
        if self._agreed:
            raise Stopped(self._agreed, f"after step {state.global_step} of {state.max_steps}, with a checkpoint")
