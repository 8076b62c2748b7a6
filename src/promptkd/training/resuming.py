"""What lets a run go on from a checkpoint at any step as if it had never stopped."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from promptkd.training.checkpoint import point_at_best

if TYPE_CHECKING:
    from promptkd.training.validation import RunTrainer

__all__ = ["ExactResuming", "ends_epoch"]


def ends_epoch(state: Any) -> bool:
    """Whether the optimiser step just taken was the last of its epoch, or of the run."""
    return state.global_step >= state.max_steps or float(state.epoch).is_integer()


class ExactResuming(TrainerCallback):
    """Keeps the sums of a logged line that is not complete yet, and lets checkpoints wait for an epoch's validation.

    transformers validates "by epoch" after it has saved "by step": a run that went on from a checkpoint between the
    two would never validate that epoch.
    """

    _KEY = "promptkd_log"

    def __init__(self, trainer: "RunTrainer"):
        self._trainer = trainer
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and ends_epoch(state):
            control.should_save, self._due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self._due = control.should_save or self._due, False

    def keep_log(self) -> None:
        """Put the sums since the last logged line into the trainer's state, which every checkpoint holds."""
        trainer = self._trainer
        trainer.state.stateful_callbacks[self._KEY] = {
            "loss": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist(),  # one a process
            "logged": trainer._globalstep_last_logged,
            "figures": dict(trainer._metrics["train"]),
            "tokens": trainer._total_train_tokens,
            "since_log": dict(trainer._since_log),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        point_at_best(trainer)
        kept = state.stateful_callbacks.get(self._KEY)
        if kept is None:
            return
        losses, processes = kept["loss"], trainer.accelerator.num_processes
        own = losses[trainer.accelerator.process_index] if len(losses) == processes else sum(losses) / len(losses)
        trainer._tr_loss = torch.tensor(own, device=trainer.accelerator.device)
        trainer._globalstep_last_logged = kept["logged"]
        trainer._metrics["train"].update({name: list(values) for name, values in kept["figures"].items()})
        trainer._total_train_tokens = kept["tokens"]
        trainer._since_log = dict(kept["since_log"])
