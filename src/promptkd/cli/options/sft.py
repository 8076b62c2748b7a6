"""Tune a model on the responses of a data set.

The loss counts response tokens alone. With --eval-data the model is validated while it trains, and the best checkpoint
is kept.

    promptkd sft --model M --data train.jsonl --eval-data valid.jsonl --out runs/teacher --max_steps 200
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptkd.cli.options.common import Training
from promptkd.settings import option

RESUMED_BY = ("--resume",)
TRAINING_CONFIG = "promptkd.training:FinetuneConfig"
SETTINGS_SOURCES = ("training/config.py", "training/sft.py")
COMMON_TRAINING_FLAGS = (
    *("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_prompt_length", "max_completion_length", "template", "overlong", "bf16", "seed", "on_nan", "report_to"),
)


@dataclass(kw_only=True)
class Options(Training):
    model: str
    """The model to tune: a hub name, folder, run folder or GGUF file."""
    out: Path
    """Folder of the run; the tuned model goes into OUT/model."""
    lora_rank: int | None = option(None, at_least=1)
    """Train LoRA weights of this rank beside the model's in place of the whole model."""
    lora_alpha: float = 32.0
    """Scale of the LoRA weights."""
    lora_continue: bool = False
    """Go on training the adapter of a model that is a LoRA folder, in place of a new one on the merged model."""
    merge: bool = False
    """Merge the LoRA weights into OUT/model at the end; else it holds the adapter alone."""
    select: Literal["rouge_l", "loss", "last"] = "rouge_l"
    """Which checkpoint to keep, by validation; last keeps the last. Without --eval-data it is the last. Where ROUGE
    cannot score the rows, loss takes the place of rouge_l (see --rouge_tokenizer)."""
