"""Settings of a distillation run: TRL's and transformers' own, plus the ones below."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from accelerate.utils import parse_flag_from_env
from transformers import SchedulerType
from trl import DistillationConfig

from promptkd.engine import engine_for
from promptkd.methods import Method
from promptkd.methods.named import ADAPTER_SETTINGS, read_method, settings_classes
from promptkd.models.adapters import PromptLossSettings
from promptkd.precision import WeightPrecision, has_bfloat16_units
from promptkd.settings import Reader, Settings, flat, option, problems, refuse

OnNan = Literal["stop", "skip"]
ON_NAN = (
    "At a loss or gradient that is NaN or infinite, before anything moves: stop the run, or skip the step and count it."
)
DECODED_ROWS = "Rows that are decoded at a time: by default 32 on CPU, 128 on a GPU."
BF16 = "Compute in bfloat16; by default where the device has units for it. Trained weights stay float32."
UNFILTERED = "Unused: nothing that is NaN or infinite is hidden from the log; see --on_nan."


def fill_in_precision(args: Any) -> None:
    """Settle `bf16` of training arguments, before transformers looks at them.

    transformers takes bf16 on a CPU only with `use_cpu`, which is no choice where there is nothing else.
    """
    asks_for_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    other = None if asks_for_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if other is None else other
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_bfloat16_units(device)
    if args.bf16 and device.type == "cpu":
        args.use_cpu = True


def fill_in_rows(args: Any) -> None:
    """Settle how many rows of training arguments are decoded at a time."""
    if args.generation_batch_size is None:
        args.generation_batch_size = engine_for(args.device).decode_rows


def use_one_gpu(args: Any) -> None:
    """Without a launcher, leave all GPUs but one alone: transformers would copy the student to each at every step."""
    args._n_gpu = min(args.n_gpu, 1)


def common_checks(args: Any) -> list[tuple[bool, str]]:
    """What is wrong with any training arguments, and the words for it."""
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    return [
        *(
            (getattr(args, name) < 1, f"{name} must be at least 1, got {getattr(args, name)}")
            for name in (*counts, "generation_batch_size", "max_prompt_length")
        ),
        (args.on_nan not in get_args(OnNan), f"on_nan must be stop or skip, got {args.on_nan!r}"),
        (
            args.torch_compile,
            "torch_compile is not supported, since a compiled model cannot be run in parts as training and validation "
            "do; leave it, its backend and its mode out",
        ),
        (
            args.full_determinism and args.device.type == "cuda",
            "full_determinism would stop the first sampled response, since CUDA sums cumulatively in no fixed order; "
            "leave it out (--seed repeats a run up to rounding), or give --use_cpu",
        ),
        (args.logging_nan_inf_filter, "logging_nan_inf_filter would hide a loss that is NaN or infinite; see on_nan"),
        (args.learning_rate < 0, f"learning_rate must be 0 or more, got {args.learning_rate}"),
        (args.seed < 0, f"seed must be 0 or more, got {args.seed}"),
        (args.seed >= 2**32, f"seed must be at most {2**32 - 1}, got {args.seed}"),  # NumPy's limit
        (args.eval_seed < 0, f"eval_seed must be 0 or more, got {args.eval_seed}"),
        (args.eval_temperature < 0, f"eval_temperature must be 0 or more, got {args.eval_temperature}"),
        (
            args.max_completion_length is None or args.max_completion_length < 1,
            f"max_completion_length must be at least 1, got {args.max_completion_length}",
        ),
    ]


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
    """stale: the student learns from the prompted pass of before the prompt's update; not PromptKD as published."""
    teacher_gradient_checkpointing: bool = False
    """Compute the teacher's activations again in the prompt's backward: less memory, more time."""


if TYPE_CHECKING:
    _FlatSettings: Any
else:
    _FlatSettings = flat("_FlatSettings", (*settings_classes(), PromptLossSettings, TunerSettings))


@dataclass
class DistillConfig(_FlatSettings, DistillationConfig):
    """Arguments of `DistillTrainer`. Every field of `trl.DistillationConfig` is one too.

    Defaults that differ from TRL's: learning_rate 5e-5 (the authors' for GPT-2), max_completion_length 256,
    disable_dropout (one distribution in the rollout, the prompt step and the student step), logging_steps 1, no
    gradient checkpointing, and bf16 only where the device has units for it.
    """

    method: str = option("promptkd", "Name of the method; `promptkd distill --help` lists them.")
    language_data: str | None = option(None, 'Plain-text rows ({"text": ...}) for an extra language-modelling loss.')
    language_weight: float = option(1.0, "Weight of the language-modelling loss.")
    on_nan: OnNan = option("stop", ON_NAN)
    eval_temperature: float = option(1.0, "Temperature of validation's responses; 0 decodes greedily.")
    eval_seed: int = option(10, "Seed of validation's sampled responses.")
    generation_batch_size: int | None = option(None, DECODED_ROWS)

    chunk_tokens: int | None = option(
        None, "Tokens whose logits are held at a time: by default 256 on CPU, 2,048 on a GPU; 0 holds all.", at_least=0
    )

    max_prompt_length: int = option(256, "Most tokens of a prompt, template included; see --overlong.")
    template: str = option("auto", "auto, alpaca, chat, or a Jinja text with {{ instruction }} and {{ input }}.")
    overlong: Literal["drop", "error"] = option("drop", "Rows over a length limit: drop (and count), or error.")

    teacher_dtype: WeightPrecision | None = option(
        None,
        "Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32; "
        "auto is that of its files.",
    )
    teacher_quantization: Literal["8bit", "4bit"] | None = option(None, "Quantise the teacher by bitsandbytes.")
    learning_rate: float = option(5e-5, "Peak learning rate of the student.")
    max_completion_length: int | None = option(256, "Most tokens of a response.")
    disable_dropout: bool = option(True, "Train the student without dropout.")
    logging_steps: float = option(1, "Optimiser steps between two logged lines.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    bf16: bool | None = option(None, BF16)
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP: look for parameters that a step does not reach, as those of experts; costs time."
    )
    logging_nan_inf_filter: bool = option(False, UNFILTERED)
    save_only_model: bool = option(False, "Leave optimiser, prompt and random states out of checkpoints (no resuming).")

    def __post_init__(self) -> None:
        fill_in_precision(self)
        super().__post_init__()
        fill_in_rows(self)
        use_one_gpu(self)
        refuse([*problems(self), *(text for wrong, text in (*common_checks(self), *self._checks()) if wrong)])

    @property
    def algorithm(self) -> str:
        """What records call it: the method's name, and how far the run is from that method."""
        return self.method if self.prompt_refresh == "fresh" else f"{self.method}, stale prompt"

    def _checks(self) -> list[tuple[bool, str]]:
        schedules = tuple(each.value for each in SchedulerType)
        return [
            (
                self.prompt_lr_scheduler_type not in schedules,
                f"prompt_lr_scheduler_type must be one of {', '.join(schedules)}, got {self.prompt_lr_scheduler_type}",
            ),
            (self.temperature <= 0, f"temperature must be above 0, got {self.temperature}"),
            (bool(self.chat_template_kwargs), "chat_template_kwargs has no effect here; write a Jinja --template"),
            (bool(self.pad_to_multiple_of), "pad_to_multiple_of has no effect here: rows are not padded for rollouts"),
            (self.fp16, "fp16 would need a loss scale for the soft prompt's gradient; use bf16 or float32"),
        ]


@dataclass
class PromptKDConfig(DistillConfig):
    """`DistillConfig` with PromptKD as the method."""

    method: str = option("promptkd", "Name of the method.")


def chosen_method(args: Any, given: Method | None = None) -> Method:
    """The method of a run, with its adapter's settings.

    Args:
        args: a `DistillConfig`.
        given: a method in place of the one that `args.method` names.

    Raises:
        RequestError: if a setting differs from its default and nothing reads it.
    """
    take = Reader(args)
    if given is None:
        method, name, classes = read_method(args.method, take), args.method, tuple(settings_classes())
    else:
        method, name, classes = given.with_settings(take), "The given method", ADAPTER_SETTINGS
    adapter = method.adapter_class
    if adapter is not None:
        take(TunerSettings)
        if adapter.has_regularizer:
            take(PromptLossSettings)
    take.refuse_unread(name, classes)
    reader = f"{name} without a teacher adapter" if adapter is None else name
    take.refuse_unread(reader, (TunerSettings, PromptLossSettings))
    return method
