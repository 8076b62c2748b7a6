"""What `distill` and `sft` are asked to train beside a model's weights: new LoRA weights, or those of a LoRA folder."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel

from promptkd.errors import RequestError
from promptkd.models import count_parameters
from promptkd.models.source import model_source

_DEFAULT_ALPHA = 32.0


@dataclass(frozen=True)
class LoraRequest:
    rank: int | None
    alpha: float
    continues: bool
    merge: bool
    flag: str  # what the flags begin with: "--student-lora" or "--lora"

    def check(self) -> None:
        """Refuse what contradicts itself, before any model is looked at."""
        if self.merge and self.rank is None and not self.continues:
            raise RequestError(f"--merge merges LoRA weights: give {self.flag}-rank with it, or {self.flag}-continue.")

    def check_model(self, name: str, revision: str | None = None) -> None:
        """Refuse to train on an adapter that `name` does not have, or has with another rank or scale."""
        if not self.continues:
            return
        source = model_source(name, revision)
        if not source.adapters:
            problem = f"{self.flag}-continue goes on training a LoRA folder's adapter, and {name} is a plain model"
            raise RequestError(f"{problem}. Leave it out; {self.flag}-rank trains a new one.")
        own = source.adapters[-1].config
        alpha = None if self.alpha == _DEFAULT_ALPHA else self.alpha
        for what, key, wanted in (("rank", "r", self.rank), ("alpha", "lora_alpha", alpha)):
            if wanted is not None and own.get(key) != wanted:
                differ = f"{self.flag}-{what} is {wanted:g}, and the adapter in {name} has {own.get(key)}"
                raise RequestError(f"{differ}. Leave it out, or leave {self.flag}-continue out to train a new adapter.")

    def config(self) -> Any:
        """New LoRA weights on every linear layer but the head; None where none are asked for."""
        if self.rank is None or self.continues:
            return None
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules="all-linear", task_type="CAUSAL_LM")

    def told(self, name: str, model: Any) -> str:
        """What is trained of `model`, which was loaded from `name`; "" where that is not LoRA weights."""
        if not isinstance(model, PeftModel):
            return ""
        rank = model.peft_config[model.active_adapter].r
        numbers = f"{count_parameters(model, trainable=True):,} of {count_parameters(model):,} parameters"
        which = f"Training goes on with the adapter of {name}" if self.continues else f"New LoRA weights beside {name}"
        return f"{which}: rank {rank}, {numbers} are trained."
