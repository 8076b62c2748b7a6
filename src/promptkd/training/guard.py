"""No optimiser moves on a loss or a gradient that is NaN or infinite.

Losses are noted as they come, on the device, and looked at once an optimiser step: behind the last backward, together
with the norm of the student's gradient, which clipping computes anyway. Processes add up how many figures are not
finite, so that all decide alike. What the step has moved by then, the teacher's adapter, is put back. A step that is
skipped keeps its place in the schedules of the learning rates and of λ.
"""

import logging
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from promptkd.errors import PromptKDError, RequestError
from promptkd.training.checkpoint import told_last_checkpoint
from promptkd.training.collapse import Watching

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what this class is mixed into
else:
    _Trainer = object

__all__ = ["MOST_SKIPPED", "FiniteSteps"]

_LOGGER = logging.getLogger("promptkd")
_KEY = "promptkd_skipped"
_ROWS_NAMED = 16

MOST_SKIPPED = 10
"""Steps in a row that may be skipped. A bad row spoils one step an epoch; ten in a row come from a model or a rate."""


@dataclass(frozen=True)
class _Noted:
    what: str
    value: Tensor
    micro_batch: int | None


class FiniteSteps(_Trainer):
    """The part of a trainer that watches its numbers. Put before a TRL trainer among the bases of a class.

    Raises:
        PromptKDError: in training, at a step that is not finite under `on_nan` "stop", and at the `MOST_SKIPPED`-th in
            a row under "skip".
    """

    args: Any
    accelerator: Any
    state: Any
    model: Any
    optimizer: Any
    _metrics: Any
    _tr_loss: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        self._start_watching()
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled and self.args.on_nan == "skip":
            raise RequestError(
                "DeepSpeed moves the weights together with the last backward, so no step can be skipped behind it. "
                "Leave --on_nan at stop."
            )
        self.add_callback(Watching())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._start_watching()  # also where an earlier call ended in the middle of a window
        return super().train(*args, **kwargs)

    def _start_watching(self) -> None:
        self._noted: list[_Noted] = []
        self._window_inputs: list[Any] = []
        self._loss_before: Tensor | None = None
        self._since_log = {"taken": 0, "skipped": 0}

    def note(self, what: str, value: Tensor, micro_batch: int | None = None) -> None:
        """Look at `value`, a scalar, when the window is done.

        Args:
            what: its name in a message.
            micro_batch: its place in the window; None for a figure of the whole window.
        """
        self._noted.append(_Noted(what, value.detach(), micro_batch))

    @abstractmethod
    def rows_of_micro_batch(self, index: int, inputs: Any) -> list[int]:
        """Rows of the data in a micro-batch of the window, on this process; `inputs` are those of `training_step`."""

    def weights_at_hand(self) -> dict[str, nn.Module]:
        """By name, the models whose weights may be at fault."""
        return {"model": self.model}

    def take_back_step(self) -> None:
        """Undo what this step has moved before the student's own step."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._window_inputs:
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.note("loss", loss, len(self._window_inputs))
        self._window_inputs.append(inputs)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a loss scale (fp16), infinite gradients are its way to find the scale, and it skips such steps itself.
        if norm is not None and self.accelerator.scaler is None:
            self.note("gradient", torch.as_tensor(float(norm)))
        if self._is_broken():
            self._refuse_step()
        else:
            self._since_log["taken"] += 1
            if self._skips()["in_a_row"]:
                self._keep_skips(in_a_row=0)
        self._noted, self._window_inputs = [], []
        return norm

    def _is_broken(self) -> bool:
        """Whether any figure of the step is not finite, on any process."""
        device = self.accelerator.device
        values = torch.stack([each.value.to(device, torch.float32) for each in self._noted])
        count = (~values.isfinite()).sum()
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        return bool(count)

    def _refuse_step(self) -> None:
        self.take_back_step()
        if self.accelerator.scaler is None:
            self.optimizer.zero_grad()  # a parameter without a gradient is left alone, its moments too
        step, told = self.state.global_step + 1, self._told()
        if self.args.on_nan == "stop":
            raise PromptKDError(f"Step {step} was not taken: {told} {self._way_on()}")
        skips = self._skips()
        self._keep_skips(total=skips["total"] + 1, in_a_row=skips["in_a_row"] + 1)
        if skips["in_a_row"] + 1 >= MOST_SKIPPED:
            raise PromptKDError(
                f"{MOST_SKIPPED} steps in a row could not be taken, the last of them step {step}: {told} "
                f"{self._way_on()}"
            )
        if self.is_world_process_zero():
            _LOGGER.warning("Step %d was skipped: %s", step, told)
        self._forget_figures()

    def _forget_figures(self) -> None:
        """Take what is not finite out of the figures that the next logged line is a mean of."""
        assert self._loss_before is not None
        self._tr_loss.copy_(self._loss_before)
        self._since_log["skipped"] += 1
        figures = self._metrics["train"]
        for name in list(figures):
            figures[name] = [value for value in figures[name] if value is None or math.isfinite(value)]
            if not figures[name]:
                del figures[name]

    def _told(self) -> str:
        """What is not finite, in which rows, and whose weights are to blame. All processes must ask together."""
        broken = [each for each in self._noted if not math.isfinite(float(each.value))]
        named = {each.micro_batch for each in broken}
        rows = [self.rows_of_micro_batch(index, inputs) for index, inputs in enumerate(self._window_inputs)]
        own: dict[str, set[Any]] = {
            "what": {each.what for each in broken},
            "rows": {row for index, batch in enumerate(rows) if index in named for row in batch},
            "window": {row for batch in rows for row in batch},
            "weights": {
                name
                for name, model in self.weights_at_hand().items()
                if not all(bool(weight.detach().isfinite().all()) for weight in model.parameters())
            },
        }
        everyone = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        found = {key: sorted({item for each in everyone for item in each[key]}) for key in own}
        text = f"{_listed(found['what'])} {'is' if len(found['what']) == 1 else 'are'} NaN or infinite on "
        text += f"{_rows(found['rows'] or found['window'])}."
        if found["weights"]:
            text += f" The weights of the {_listed(found['weights'])} hold NaN or infinite numbers themselves."
        return text

    def _way_on(self) -> str:
        kept = told_last_checkpoint(self.args)
        skip = "" if self.args.on_nan == "skip" else ", or leave such steps out by --on_nan skip"
        return f"{kept} Look at these rows, the models and the learning rates{skip} (docs/warnings.md)."

    def _skips(self) -> dict[str, int]:
        """Steps that were skipped, in all and just now; transformers keeps this mapping in every checkpoint."""
        return self.state.stateful_callbacks.get(_KEY, {"total": 0, "in_a_row": 0})

    def _keep_skips(self, **changed: int) -> None:
        self.state.stateful_callbacks[_KEY] = {**self._skips(), **changed}

    def skipped_steps(self) -> int:
        """Steps of this run, from its first start, that were skipped."""
        return self._skips()["total"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the trainer's. A mean loss is that of the steps that were taken; `skipped_steps` counts the others."""
        since = self._since_log
        if since["skipped"] and "loss" in logs:
            steps = since["taken"] + since["skipped"]
            logs["loss"] *= steps / since["taken"] if since["taken"] else math.nan
            for name in ("loss", "grad_norm"):
                if name in logs and not math.isfinite(logs[name]):
                    del logs[name]
        if "learning_rate" in logs:  # a step's line, not a validation's
            self._since_log = {"taken": 0, "skipped": 0}
            if self.args.on_nan == "skip":
                logs["skipped_steps"] = self.skipped_steps()
        super().log(logs, start_time)


def _rows(rows: list[int]) -> str:
    named = ", ".join(map(str, rows[:_ROWS_NAMED]))
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"row{'' if len(rows) == 1 else 's'} {named}{more} of the data, counted from 0"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
