"""Settings of a distillation run: TRL's and transformers' own, those of the methods and of their adapters, and ours."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import SchedulerType
from trl import DistillationConfig

from promptkd.methods import Method
from promptkd.methods.named import read_method, settings_classes
from promptkd.models.adapters import ADAPTERS, PromptLossSettings
from promptkd.precision import WeightPrecision
from promptkd.settings import Reader, Settings, flat, option
from promptkd.training.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class TunerSettings(Settings):
    """How the teacher's adapter is trained, whatever the adapter is."""

    prompt_learning_rate: float = option(1e-3, at_least=0)
    """Learning rate of the soft prompt."""
    prompt_warmup_steps: int = 0
    """Optimizer steps over which the prompt's learning rate rises."""
    prompt_lr_scheduler_type: str = "constant_with_warmup"
    """Schedule of the prompt's learning rate."""
    prompt_weight_decay: float = 0.0
    """Weight decay of the soft prompt."""
    prompt_max_grad_norm: float = 1.0
    """Gradient norm at which the prompt's gradient is clipped; 0 never clips."""
    prompt_refresh: Literal["fresh", "stale"] = "fresh"
    """stale: the student learns from the prompted pass of before the prompt's update, which saves a pass of the teacher
    and is not PromptKD as published."""
    teacher_gradient_checkpointing: bool = False
    """Recompute the teacher's activations in the prompt's backward: less memory, more time."""


_FlatSettings: Any = flat("_FlatSettings", (*settings_classes(), PromptLossSettings, TunerSettings))


@dataclass
class DistillConfig(_FlatSettings, BaseConfig, DistillationConfig):
    """Arguments of `DistillTrainer`. Every field of `trl.DistillationConfig` is one too.

    Defaults that differ from TRL's: learning_rate 5e-5 (the authors' for GPT-2), max_completion_length 256,
    disable_dropout (one distribution in the rollout, the prompt step and the student step), logging_steps 1, no
    gradient checkpointing, and bf16 only where the device has units for it.
    """

    method: str = "promptkd"
    """Name of the method (--help lists them)."""
    language_data: str | None = None
    """Plain-text rows ({"text": ...}) for an extra language-modeling loss."""
    language_weight: float = 1.0
    """Weight of the language-modeling loss."""
    chunk_tokens: int | None = option(None, at_least=0)
    """Tokens whose logits are held at a time: by default 256 on CPU, 2,048 on a GPU; 0 holds all."""
    teacher_dtype: WeightPrecision | None = None
    """Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32; auto is
    that of its files."""
    teacher_quantization: Literal["8bit", "4bit"] | None = None
    """Quantize the teacher by bitsandbytes."""
    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate of the student."""
    temperature: float = option(1.0, above=0)
    """Temperature of the sampled responses."""
    disable_dropout: bool = True
    """Train the student without dropout."""
    save_only_model: bool = False
    """Leave optimizer, prompt and random states out of checkpoints (no resuming)."""

    @property
    def algorithm(self) -> str:
        """What records call it: the method's name, and how far the run is from that method."""
        return self.method if self.prompt_refresh == "fresh" else f"{self.method}, stale prompt"

    def checks(self) -> list[tuple[bool, str]]:
        """See `BaseConfig.checks`."""
        schedule, known = self.prompt_lr_scheduler_type, [each.value for each in SchedulerType]
        wanted = f"prompt_lr_scheduler_type must be one of {', '.join(known)}, got {schedule}"
        return [
            *super().checks(),
            (schedule not in known, wanted),
            (bool(self.chat_template_kwargs), "chat_template_kwargs has no effect here; write a Jinja --template"),
            (bool(self.pad_to_multiple_of), "pad_to_multiple_of has no effect here: rows are not padded for rollouts"),
            (self.fp16, "fp16 would need a loss scale for the soft prompt's gradient; use bf16 or float32"),
        ]


@dataclass
class PromptKDConfig(DistillConfig):
    """`DistillConfig`, whose default method is PromptKD."""


def chosen_method(args: Any, given: Method | None = None) -> Method:
    """The method of a run, with its adapter's settings.

    Args:
        args: a `DistillConfig`.
        given: a method in place of the one that `args.method` names.

    Raises:
        RequestError: if a setting differs from its default and nothing reads it.
    """
    take = Reader(args)
    method = read_method(args.method, take) if given is None else given.with_settings(take)
    name = args.method if given is None else "The given method"
    adapter = method.adapter_class
    if adapter is not None:
        take(TunerSettings)
        if adapter.has_regularizer:
            take(PromptLossSettings)
    take.refuse_unread(name, (factory for factory in ADAPTERS.values() if factory is not None))
    without = " without a teacher adapter" if adapter is None else ""
    take.refuse_unread(name + without, (TunerSettings, PromptLossSettings))
    return method
