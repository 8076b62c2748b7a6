"""What a run writes while it trains: one JSON line a logged step, a progress bar, and what it cost."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded
from promptkd.training.phases import Phases

__all__ = ["CostMeter", "MetricsFile", "ProgressBar", "quiet"]

_SUMMARY = "train_runtime"  # marks transformers' closing line, which is no step


class MetricsFile(TrainerCallback):
    """Appends every logged step to `metrics.jsonl`; a resumed run goes on where its checkpoint stands."""

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_atomic(self._path, encoded(entry for entry in state.log_history if _SUMMARY not in entry))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if state.is_world_process_zero and _SUMMARY not in entry:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class ProgressBar(TrainerCallback):
    """One bar of optimiser steps with the loss beside it; where there is no terminal, a line every tenth of the way."""

    def __init__(self, title: str, console: Console | None = None):
        self._title = title
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step, loss="")
            self._bar.start()
        else:
            self._console.print(f"{self._title}: {state.max_steps} steps", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)
        elif state.is_world_process_zero:
            tenth = max(1, state.max_steps // 10)
            if state.global_step % tenth == 0:
                self._console.print(
                    f"{self._title}: step {state.global_step} of {state.max_steps}{self._loss}", highlight=False
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f", loss {float(logs['loss']):.3f}"
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, loss=self._loss.removeprefix(", "))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class CostMeter(TrainerCallback):
    """Seconds and peak memory of training, in the trainer's state, so that a resumed run counts on from its checkpoint.

    The seconds are those of the steps that led to the last one, checkpoints included. Validation is not among them, and
    neither are steps that an interruption lost and a resumed run did again. The memory is the process's peak by the end
    of the last step or validation, over all parts of the run; by phase too.
    """

    _KEY = "promptkd_cost"

    def __init__(self, phases: Phases):
        self._phases = phases
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self.peak_memory_by_phase: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = state.stateful_callbacks.get(self._KEY, {"seconds": 0.0, "peak_memory_bytes": 0})
        self.seconds, self.peak_memory_bytes = before["seconds"], before["peak_memory_bytes"]
        self.peak_memory_by_phase = dict(before.get("peak_memory_by_phase", {}))  # older checkpoints have none
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._keep(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()
        self._keep(state)

    def _keep(self, state: Any) -> None:
        """Put the cost so far where transformers writes it into every checkpoint, and reads it back."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, self._phases.peak)
        for name, size in self._phases.peaks.items():
            self.peak_memory_by_phase[name] = max(self.peak_memory_by_phase.get(name, 0), size)
        state.stateful_callbacks[self._KEY] = {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_memory_by_phase": dict(self.peak_memory_by_phase),
        }


def quiet(trainer: Any) -> None:
    """Take away transformers' own bar and printed dictionaries."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
