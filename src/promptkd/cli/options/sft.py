"""Tune a model on the responses of a data set.

The loss counts response tokens alone. With --eval-data the model is validated while it trains, and the best checkpoint
is kept.

    promptkd sft --model M --data train.jsonl --eval-data valid.jsonl --out runs/teacher --max_steps 200
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GOES_ON = ("--resume",)
TRAINING_CONFIG = "promptkd.training:FinetuneConfig"
SETTINGS_SOURCES = ("training/base_config.py", "training/sft.py")
COMMON_TRAINING_FLAGS = (
    *("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_prompt_length", "max_completion_length", "template", "overlong", "bf16", "seed", "on_nan", "report_to"),
)


@dataclass
class Options:
    model: str
    """The model to tune: a hub name, folder, run folder or GGUF file."""
    data: str
    """Training rows: a JSONL, .jsonl.gz, Parquet or CSV file, a folder, or a hub data set."""
    out: Path
    """Folder of the run; the tuned model goes into OUT/model."""
    eval_data: str | None = None
    """Validation rows, in the same forms."""
    limit: int | None = None
    """Use the first so many training rows."""
    eval_limit: int | None = None
    """Use the first so many validation rows."""
    select: Literal["rouge_l", "loss", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last."""
    keep: int | None = 2
    """Checkpoints that stay, the newest and the best always among them; none keeps all."""
    resume: bool = False
    """Go on from the last checkpoint in OUT."""
    overwrite: bool = False
    """Replace the run in OUT."""
