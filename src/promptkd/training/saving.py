"""What transformers' Trainer saves, loads and keeps: our trainers take these in place of its methods.

States are JSON and safetensors. Pickles remain where FSDP2 and DeepSpeed write the shards of a checkpoint themselves:
see docs/resuming.md.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from promptkd.data.chat_form import tokenizer_as_trained
from promptkd.models.folder import save_tokenizer
from promptkd.training.arguments import evaluation_sets
from promptkd.training.state_files import has_state, read_state, write_state
from promptkd.training.validation import labeled_set, set_of

_OPTIMIZER = "optimizer"


def determine_best(trainer: Any, metrics: dict[str, float], trial: Any) -> bool:
    """For `Trainer._determine_best_metric`: of equals, the one with the lower validation loss is the best.

    transformers keeps the first of equals. The loss of the best one is in the log, which every checkpoint holds.
    """
    if Trainer._determine_best_metric(trainer, metrics, trial):
        return True
    state, chosen_by = trainer.state, trainer.args.metric_for_best_model
    if chosen_by is None or metrics[f"eval_{chosen_by.removeprefix('eval_')}"] != state.best_metric:
        return False
    sets = evaluation_sets(trainer.validation_rows)
    loss = f"eval_{labeled_set('loss', set_of(chosen_by.removeprefix('eval_'), sets))}"
    of_best = [each for each in state.log_history if each["step"] == state.best_global_step and loss in each]
    if not of_best or not metrics.get(loss, float("inf")) < of_best[-1][loss]:
        return False
    state.best_global_step = state.global_step
    return True


def save_model_files(trainer: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
    """For `Trainer._save`: model and tokenizer, without training_args.bin, a pickle of all arguments."""
    if trainer.args.should_save:
        folder = output_dir or trainer.args.output_dir
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state_dict)
        if trainer.processing_class is not None:
            save_tokenizer(tokenizer_as_trained(trainer.processing_class, trainer.template), folder)


def save_optimizer(trainer: Any, output_dir: str) -> None:
    """For `Trainer._save_optimizer_and_scheduler`: both, and the scale of float16's gradients."""
    if _has_shards(trainer):
        Trainer._save_optimizer_and_scheduler(trainer, output_dir)
    elif trainer.args.should_save:
        state = {"optimizer": trainer.optimizer.state_dict(), "scheduler": trainer.lr_scheduler.state_dict()}
        scaler = trainer.accelerator.scaler
        write_state(Path(output_dir, _OPTIMIZER), state | ({} if scaler is None else {"scaler": scaler.state_dict()}))


def save_scaler(trainer: Any, output_dir: str) -> None:
    """For `Trainer._save_scaler`: nothing, where `save_optimizer` has saved it."""
    if _has_shards(trainer):
        Trainer._save_scaler(trainer, output_dir)


def load_states(trainer: Any, checkpoint: str | None) -> None:
    """For `Trainer._load_optimizer_and_scheduler`: what `save_optimizer` has saved, and the trainer's `extra_state`."""
    if checkpoint is None:
        return
    if not has_state(Path(checkpoint, _OPTIMIZER)):  # shards, or an older version's files
        Trainer._load_optimizer_and_scheduler(trainer, checkpoint)
    else:
        state = read_state(Path(checkpoint, _OPTIMIZER))
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.lr_scheduler.load_state_dict(state["scheduler"])
        if trainer.accelerator.scaler is not None and "scaler" in state:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.extra_state.load(checkpoint, process=trainer.accelerator.process_index)


def save_random_states(trainer: Any, output_dir: str) -> None:
    """For `Trainer._save_rng_state`: this process's generators."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)  # the first process may not have made it yet
    write_state(Path(output_dir, _random_name(trainer)), random_states())


def load_random_states(trainer: Any, checkpoint: str | None) -> None:
    """For `Trainer._load_rng_state`; a process that saved none keeps its new states."""
    if checkpoint is not None and has_state(Path(checkpoint, _random_name(trainer))):
        set_random_states(read_state(Path(checkpoint, _random_name(trainer))))
    else:
        Trainer._load_rng_state(trainer, checkpoint)


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


def _random_name(trainer: Any) -> str:
    several = trainer.args.world_size > 1
    return f"rng_state_{trainer.args.process_index}" if several else "rng_state"


def _has_shards(trainer: Any) -> bool:
    """Whether accelerate or DeepSpeed writes optimizer and weights of a checkpoint, a part per process."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
