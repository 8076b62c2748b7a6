"""No optimizer moves on a loss or a gradient that is NaN or infinite.

Losses are noted on the device and looked at once per optimizer step, after the last backward, with the norm of the
student's gradient. All processes decide alike. Under `on_nan` "skip" the teacher's adapter, which has moved by then, is
rolled back; the step keeps its place in the schedules of the learning rates and of λ.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.python_file import names_python
from promptkd.training.checkpoint import told_last_checkpoint
from promptkd.training.residence import bring

_LOGGER = logging.getLogger("promptkd")
_ROWS_NAMED = 16

MOST_SKIPPED = 10  # steps in a row: a bad row spoils one per epoch, ten in a row come from a model or a rate


class Guard:
    """Looks at the numbers of each optimizer step, and stops or skips the step.

    Args:
        args: training arguments; `on_nan` is read, and what tells of the last checkpoint.
        models: by name, the models whose weights may be at fault.
        rollback: undoes what a step has moved before the student's own update.

    `end_step` raises `PromptKDError` under `on_nan` "stop", and at the `MOST_SKIPPED`-th step in a row under "skip".
    """

    def __init__(
        self,
        args: Any,
        accelerator: Accelerator,
        models: Callable[[], Mapping[str, nn.Module]],
        rollback: Callable[[], None] = lambda: None,
    ):
        if accelerator.distributed_type == "DEEPSPEED" and args.on_nan == "skip":
            raise RequestError(
                "DeepSpeed moves the weights together with the last backward, so no step can be skipped behind it. "
                "Leave --on_nan at stop."
            )
        self._args, self._accelerator, self._models, self.rollback = args, accelerator, models, rollback
        self.skipped = self.skipped_in_a_row = 0
        self.since_log = {"taken": 0, "skipped": 0}  # steps since the last logged line
        self.restart()

    def restart(self) -> None:
        """Forget the step under way."""
        self._noted: list[tuple[str, Tensor, int | None]] = []  # name, value, micro-batch
        self._rows: list[Callable[[], Sequence[int]]] = []
        self._loss_before = torch.zeros(())
        self._kept_before: dict[str, int] = {}  # values of each metric

    def begin_micro_batch(
        self, rows: Callable[[], Sequence[int]], running_loss: Tensor, metrics: Mapping[str, Sequence[Any]]
    ) -> int:
        """Note a micro-batch: its `rows`, for messages; loss and metrics so far. Return its place in the step."""
        if not self._rows:
            self._loss_before = running_loss.clone()
            self._kept_before = {name: len(values) for name, values in metrics.items()}
        self._rows.append(rows)
        return len(self._rows) - 1

    def note(self, what: str, value: Tensor, micro_batch: int | None = None) -> None:
        """Look at `value`, a scalar of a micro-batch or of the whole window (None), when the step is done."""
        self._noted.append((what, value.detach(), micro_batch))

    def end_step(
        self, norm: Any, step: int, optimizer: Any, *, running_loss: Tensor, metrics: dict[str, list[Any]]
    ) -> bool:
        """Decide, before the student's optimizer moves, whether it may, and say so. All processes must ask together.

        Args:
            norm: of the student's gradient; None where nothing computed it.
            running_loss, metrics: what the next logged line is a mean of; a skipped step is taken out of it.
        """
        # With a loss scale (fp16), infinite gradients are its way to find the scale, and it skips such steps itself.
        if norm is not None and self._accelerator.scaler is None:
            self.note("gradient", torch.as_tensor(float(norm)))
        values = torch.stack([value.to(self._accelerator.device, torch.float32) for _, value, _ in self._noted])
        broken = (~values.isfinite()).sum()
        if self._accelerator.num_processes > 1:
            broken = self._accelerator.reduce(broken, reduction="sum")
        if not broken:
            self.since_log["taken"] += 1
            self.skipped_in_a_row = 0
        else:
            self._refuse(step, optimizer)
            running_loss.copy_(self._loss_before)
            for name in list(metrics):
                del metrics[name][self._kept_before.get(name, 0) :]
                if not metrics[name]:
                    del metrics[name]
        self.restart()
        return not broken

    def adjust(self, logs: dict[str, float]) -> None:
        """Make a logged line's loss the mean over the steps that were taken, and count the others."""
        taken, skipped = self.since_log["taken"], self.since_log["skipped"]
        if skipped and "loss" in logs:
            logs["loss"] *= (taken + skipped) / taken if taken else math.nan
            for name in ("loss", "grad_norm"):
                if name in logs and not math.isfinite(logs[name]):
                    del logs[name]
        if "learning_rate" in logs:  # a step's line, not a validation's
            self.since_log = {"taken": 0, "skipped": 0}
            if self._args.on_nan == "skip":
                logs["skipped_steps"] = self.skipped

    def state_dict(self) -> dict[str, Any]:
        """The counts of skipped steps."""
        return {"total": self.skipped, "in_a_row": self.skipped_in_a_row, "since_log": dict(self.since_log)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`."""
        self.skipped, self.skipped_in_a_row = state["total"], state["in_a_row"]
        self.since_log = dict(state["since_log"])

    def _refuse(self, step: int, optimizer: Any) -> None:
        self.rollback()
        if self._accelerator.scaler is None:
            optimizer.zero_grad()  # a parameter without a gradient is left alone, its moments too
        told, last = self._told(), told_last_checkpoint(self._args)
        hint = "" if self._args.on_nan == "skip" else ", or skip such steps by --on_nan skip"
        method = str(vars(self._args).get("method", ""))  # fine-tuning has none
        own = f"what {method} computes, " if names_python(method) else ""
        advice = f"{last} Look at {own}these rows, the models and the learning rates{hint} (docs/warnings.md)."
        if self._args.on_nan == "stop":
            raise PromptKDError(f"Step {step} was not taken: {told} {advice}")
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.since_log["skipped"] += 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise PromptKDError(
                f"{MOST_SKIPPED} steps in a row could not be taken, the last of them step {step}: {told} {advice}"
            )
        if self._accelerator.is_main_process:
            _LOGGER.warning("Step %d was skipped: %s", step, told)

    def _told(self) -> str:
        """What is not finite, in which rows, and whose weights are to blame. All processes must ask together."""
        broken = [(what, place) for what, value, place in self._noted if not math.isfinite(float(value))]
        named = {place for _, place in broken}
        rows = [list(each()) for each in self._rows]
        own: dict[str, set[Any]] = {
            "what": {what for what, _ in broken},
            "rows": {row for index, batch in enumerate(rows) if index in named for row in batch},
            "window": {row for batch in rows for row in batch},
            "weights": {name for name, model in self._models().items() if not _is_finite(model)},
        }
        everyone = gather_object([own]) if self._accelerator.num_processes > 1 else [own]
        found = {key: sorted({item for each in everyone for item in each[key]}) for key in own}
        blamed = found["rows"] or found["window"]
        listed = ", ".join(map(str, blamed[:_ROWS_NAMED]))
        more = f" and {len(blamed) - _ROWS_NAMED} more" if len(blamed) > _ROWS_NAMED else ""
        text = f"{_listed(found['what'])} {'is' if len(found['what']) == 1 else 'are'} NaN or infinite on "
        text += f"row{'' if len(blamed) == 1 else 's'} {listed}{more} of the data, counted from 0."
        if found["weights"]:
            text += f" The weights of the {_listed(found['weights'])} hold NaN or infinite numbers themselves."
        return text


def _is_finite(model: nn.Module) -> bool:
    bring(model)  # one of several teachers may wait off the device, and its weights are empty meanwhile
    return all(bool(weight.detach().isfinite().all()) for weight in model.parameters())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
