"""Real optimiser steps that leave nothing behind, to tell what a run will cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from promptkd.training.logs import quiet

__all__ = ["Trial", "leave_nothing", "take_trial_steps"]


@dataclass(frozen=True)
class Trial:
    """What the steps of a trial cost."""

    steps: int
    """Optimiser steps that the whole run would take."""
    seconds: float
    """Of the last of the trial's steps."""
    warm: bool
    """Whether a step came before it, which takes longer than all others."""
    peak_memory_bytes: int


def leave_nothing(args: Any, folder: str | Path) -> None:
    """Change training arguments, before a trainer is made of them, so that it writes at most into `folder`."""
    args.output_dir = str(folder)
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = args.push_to_hub = args.log_completions = False
    args.report_to, args.eval_on_start = [], False


def take_trial_steps(trainer: Any, peak_memory: Callable[[], int]) -> Trial:
    """Two optimiser steps, one if the run has no more; the trainer and its models are of no use afterwards.

    Args:
        trainer: a `DistillTrainer` whose arguments went through `leave_nothing`.
        peak_memory: the most bytes that this process has held so far.
    """
    quiet(trainer)
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return Trial(trainer.state.max_steps, clock.seconds[-1], len(clock.seconds) > 1, peak_memory())


class _Clock(TrainerCallback):
    """Seconds of every step, and the end of training after the second."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
        if len(self.seconds) == 2:
            control.should_training_stop = True
