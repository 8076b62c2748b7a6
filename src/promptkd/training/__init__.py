"""Training by TRL's trainers. The only package that knows their hooks."""

from promptkd.training.config import DistillConfig, PromptKDConfig
from promptkd.training.sft import FinetuneConfig, FinetuneTrainer
from promptkd.training.trainer import DistillTrainer, PromptKDTrainer

__all__ = ["DistillConfig", "DistillTrainer", "FinetuneConfig", "FinetuneTrainer", "PromptKDConfig"]
__all__ += ["PromptKDTrainer"]
