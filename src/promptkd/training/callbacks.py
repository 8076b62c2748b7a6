"""What a run writes while it trains: one JSON line a logged step, a progress bar, and what it cost."""

import importlib
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.utils import print_prompt_completions_sample

from promptkd.io.atomic import write_atomic
from promptkd.io.jsonl import encoded
from promptkd.models.merge import forget_origin
from promptkd.training.checkpoint import point_at_best
from promptkd.training.phases import Phases
from promptkd.training.state import PartialLog

_SUMMARY = "train_runtime"  # marks transformers' closing line, which is no step


class MetricsFile(TrainerCallback):
    """Appends every logged step to `metrics.jsonl`; a resumed run continues it from its checkpoint."""

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
    """One bar of optimizer steps with the loss beside it; where there is no terminal, a line every tenth of the way."""

    def __init__(self, title: str, console: Console | None = None):
        self._title = title
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._console.is_terminal:
            title, steps, loss = map(TextColumn, ("{task.description}", "steps", "{task.fields[loss]}"))
            columns = (title, BarColumn(), MofNCompleteColumn(), steps, TimeRemainingColumn(), loss)
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step, loss="")
            self._bar.start()
        else:
            counted = "1 step" if state.max_steps == 1 else f"{state.max_steps} steps"
            self._console.print(f"{self._title}: {counted}", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        elif state.is_world_process_zero and state.global_step % max(1, state.max_steps // 10) == 0:
            line = f"{self._title}: step {state.global_step} of {state.max_steps}{self._loss}"
            self._console.print(line, highlight=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f", loss {float(logs['loss']):.3f}"
            if self._bar is not None:
                self._bar.update(self._task, loss=self._loss.removeprefix(", "))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class CostMeter(TrainerCallback):
    """Seconds and peak memory of training, kept in the trainer's state: a resumed run counts on from its checkpoint.

    Checkpoints count; validation, and steps that an interruption lost, do not. The memory is the process's peak so far.
    """

    _KEY = "promptkd_cost"

    def __init__(self, phases: Phases, *, without: Collection[str] = ()):
        """`without`: phases that are not listed, since nothing is done in them."""
        self._phases, self._without = phases, without
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
            if name in self._without:
                continue
            self.peak_memory_by_phase[name] = max(self.peak_memory_by_phase.get(name, 0), size)
        state.stateful_callbacks[self._KEY] = {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_memory_by_phase": dict(self.peak_memory_by_phase),
        }


class UpdatePhase(TrainerCallback):
    """The phase "update": the step of the student's optimizer, after the clipping of its gradient."""

    def __init__(self, phases: Phases):
        self._phases = phases

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phases.begin("update")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phases.end()


class TrainedWhole(TrainerCallback):
    """Notes that a model whose own weights are trained is no longer what its name leads to."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, PeftModel):
            forget_origin(model)


class CheckpointTiming(TrainerCallback):
    """Lets a checkpoint at the end of an epoch wait for the epoch's validation, and completes a resumed logged line.

    transformers saves "by step" before it validates "by epoch": a run resumed between the two would not validate.
    """

    def __init__(self, trainer: Trainer, log: PartialLog):
        self._trainer, self._log = trainer, log
        self._due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = False
        point_at_best(self._trainer)
        self._log.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and ends_epoch(state):
            control.should_save, self._due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self._due = control.should_save or self._due, False


class CompletionLog(TrainerCallback):
    """With `log_completions`: the last step's responses, printed, as a Parquet file, and to trackers, as TRL does."""

    def __init__(self, completions: Collection[tuple[str, str]]):
        self._completions = completions

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._completions or not logs or "loss" not in logs:
            return
        step, (prompts, texts) = state.global_step, zip(*self._completions, strict=True)
        print_prompt_completions_sample(prompts, texts, {}, None, step, args.num_completions_to_print)
        table = Dataset.from_dict({"step": [step] * len(prompts), "prompt": prompts, "completion": texts})
        folder = Path(args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"completions_{step:05d}.parquet")
        rows = table.to_pandas()
        for tracker in {"wandb", "trackio"} & set(args.report_to):
            module = importlib.import_module(tracker)
            shown = rows.drop_duplicates("prompt") if args.log_unique_prompts else rows
            module.log({"completions": module.Table(dataframe=shown)})


def ends_epoch(state: Any) -> bool:
    """Whether the optimizer step just taken was the last of its epoch, or of the run."""
    return state.global_step >= state.max_steps or float(state.epoch).is_integer()


def logs_step(args: Any, state: Any, steps: int = 1) -> bool:
    """Whether transformers' Trainer will log at the end of one of `steps` steps, the running one first."""
    first = state.global_step + 1
    if first == 1 and args.logging_first_step:
        return True
    by_step = args.logging_strategy == IntervalStrategy.STEPS
    return by_step and any(step % state.logging_steps == 0 for step in range(first, first + steps))


def quiet(trainer: Any) -> None:
    """Take away transformers' own bar and printed dictionaries."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
