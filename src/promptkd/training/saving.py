"""What transformers' Trainer saves, loads and keeps: our trainers have it from `SavingTrainer`.

States are JSON and safetensors. Pickles remain where FSDP2 and DeepSpeed write the shards of a checkpoint themselves:
see docs/resuming.md.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from promptkd.data import resolve_template
from promptkd.data.chat_form import tokenizer_as_trained
from promptkd.models.folder import save_tokenizer
from promptkd.training.arguments import evaluation_sets
from promptkd.training.checkpoint import prepare_best, save_model_folder, staged_checkpoint
from promptkd.training.distributed import is_sharded
from promptkd.training.state import ExtraState
from promptkd.training.state_files import has_state, read_state, write_state
from promptkd.training.student import merge_trained
from promptkd.training.validation import labeled_set, set_of

_OPTIMIZER = "optimizer"


class SavingTrainer(Trainer):
    """A Trainer that writes whole checkpoints, which hold its `extra_state`, and never takes a step beyond the last.

    It stands before another Trainer among the bases of a class.
    """

    extra_state: ExtraState
    validation_rows: Any
    checkpoint_root: Path | None = None
    """Where a checkpoint is being written, before it takes its place."""

    def save_student(self, folder: str | Path) -> None:
        """Write student and tokenizer as transformers and vLLM load them; LoRA as an adapter if `can_join`."""
        save_model_folder(self, folder)

    def merge_student(self) -> None:
        """Merge a LoRA student's weights into its own, so that it is saved as a plain model."""
        merge_trained(self)

    @property
    def is_sharded(self) -> bool:
        """Whether validation needs all processes, since none has all weights."""
        return is_sharded(self.accelerator)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's record and report say what was done."""

    # ---- in place of transformers' ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else transformers would take a step beyond the last one
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of equals, the one with the lower validation loss is the best.

        transformers keeps the first of equals. The loss of the best one is in the log, which every checkpoint holds.
        """
        if super()._determine_best_metric(metrics, trial):
            return True
        state, chosen_by = self.state, self.args.metric_for_best_model
        if chosen_by is None or metrics[f"eval_{chosen_by.removeprefix('eval_')}"] != state.best_metric:
            return False
        sets = evaluation_sets(self.validation_rows)
        loss = f"eval_{labeled_set('loss', set_of(chosen_by.removeprefix('eval_'), sets))}"
        of_best = [each for each in state.log_history if each["step"] == state.best_global_step and loss in each]
        if not of_best or not metrics.get(loss, float("inf")) < of_best[-1][loss]:
            return False
        state.best_global_step = state.global_step
        return True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with staged_checkpoint(self):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_root or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Model and tokenizer, without training_args.bin, a pickle of all arguments."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                save_tokenizer(self._tokenizer_to_save(), folder)

    def _tokenizer_to_save(self) -> PreTrainedTokenizerBase:
        """The tokenizer as `tokenizer_as_trained` has it; as it is where all training prompts are texts."""
        tokenizer: Any = self.processing_class
        args: Any = self.args
        if not any(row.request for row in self.extra_state.rows or ()):
            return tokenizer
        template = resolve_template(args.template, tokenizer, args.chat_template_kwargs)
        return tokenizer_as_trained(tokenizer, template, args.chat_template_kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Both, and the scale of float16's gradients."""
        if self._has_shards():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            scaler = self.accelerator.scaler
            write_state(
                Path(output_dir, _OPTIMIZER), state | ({} if scaler is None else {"scaler": scaler.state_dict()})
            )

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing, where `_save_optimizer_and_scheduler` has saved it."""
        if self._has_shards():
            super()._save_scaler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What `_save_optimizer_and_scheduler` has saved, and the `extra_state`."""
        if checkpoint is None:
            return
        if not has_state(Path(checkpoint, _OPTIMIZER)):  # shards, or an older version's files
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            state = read_state(Path(checkpoint, _OPTIMIZER))
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.extra_state.load(checkpoint, process=self.accelerator.process_index)

    def _load_best_model(self) -> None:
        prepare_best(self)
        super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        """This process's generators."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the first process may not have made it yet
        write_state(Path(output_dir, self._random_name()), random_states())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A process that saved none keeps its new states."""
        if checkpoint is not None and has_state(Path(checkpoint, self._random_name())):
            set_random_states(read_state(Path(checkpoint, self._random_name())))
        else:
            super()._load_rng_state(checkpoint)

    def _random_name(self) -> str:
        return f"rng_state_{self.args.process_index}" if self.args.world_size > 1 else "rng_state"

    def _has_shards(self) -> bool:
        """Whether accelerate or DeepSpeed writes optimizer and weights of a checkpoint, a part per process."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)


def random_states() -> dict[str, Any]:
    """The states of all generators that training draws from: Python's, NumPy's, torch's, and the accelerator's."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    device = torch.accelerator.current_accelerator(check_available=True)
    return states if device is None else states | {device.type: torch.get_device_module(device).get_rng_state()}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put every generator where `random_states` found it; an accelerator's only where there is one of that kind."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])
