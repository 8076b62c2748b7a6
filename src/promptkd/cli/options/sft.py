"""Tune a model on the responses of a data set.

The loss counts response tokens alone. With --eval-data the model is validated while it trains, and the best checkpoint
is kept.

    promptkd sft --model M --data train.jsonl --eval-data valid.jsonl --out runs/teacher --max_steps 200
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import Training

RESUMED_BY = ("--resume",)
TRAINING_CONFIG = "promptkd.training:FinetuneConfig"
COMMON_TRAINING_FLAGS = {
    "max_steps": ("INT", "Optimiser steps; by default num_train_epochs decides."),
    "num_train_epochs": ("NUMBER", "Passes over the data (default 3)."),
    "learning_rate": ("NUMBER", "Peak learning rate (default 2e-05)."),
    "per_device_train_batch_size": ("INT", "Rows a micro-batch (default 8)."),
    "gradient_accumulation_steps": ("INT", "Micro-batches an optimiser step (default 1)."),
    "max_prompt_length": ("INT", "Most tokens of a prompt (default 256)."),
    "max_completion_length": ("INT", "Most tokens of a response (default 256)."),
    "template": ("TEXT", "auto, alpaca, chat, or a Jinja text (default auto)."),
    "overlong": ("drop|error", "What happens to rows over a limit (default drop, and count)."),
    "bf16": ("true|false", "Compute in bfloat16 (default true where the device has units for it)."),
    "seed": ("INT", "Seed of everything random (default 42)."),
    "on_nan": ("stop|skip", "What happens at a NaN or infinite loss or gradient (default stop)."),
    "report_to": ("NAME", "Tracker, such as wandb or tensorboard (default none)."),
}


@dataclass(kw_only=True)
class Options(Training):
    model: str
    """The model to tune: a hub name, folder, run folder or GGUF file."""
    out: Path
    """Folder of the run; the tuned model goes into OUT/model."""
    select: Literal["rouge_l", "loss", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last."""
