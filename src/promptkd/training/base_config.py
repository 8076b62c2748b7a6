"""What the configurations of distillation and of fine-tuning share."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env

from promptkd.engine import engine_for
from promptkd.errors import check_all
from promptkd.precision import has_bfloat16_units
from promptkd.settings import limit_checks, option

_Arguments: Any = object  # for the type checker, which does not see the class that comes next


@dataclass
class BaseConfig(_Arguments):
    """Fields before those of a TRL configuration, which comes next among the bases.

    Raises:
        RequestError: on construction, with everything that is wrong.
    """

    max_steps: int = -1
    """Optimizer steps; -1 leaves it to num_train_epochs."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate."""
    per_device_train_batch_size: int = option(8, at_least=1)
    """Rows per micro-batch."""
    per_device_eval_batch_size: int = option(8, at_least=1)
    """Rows per batch of validation."""
    gradient_accumulation_steps: int = option(1, at_least=1)
    """Micro-batches per optimizer step."""
    max_prompt_length: int = option(256, at_least=1)
    """Most tokens of a prompt, template included; see --overlong."""
    max_completion_length: int = option(256, at_least=1)
    """Most tokens of a response, its end token included."""
    template: str = "auto"
    """auto, alpaca, chat, or a Jinja text with {{ instruction }} and {{ input }}."""
    overlong: Literal["drop", "error"] = "drop"
    """Rows over a length limit: drop (and count), or error."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to validate. The command line takes epoch, where --eval-data is given."""
    eval_steps: float | None = None
    """Optimizer steps between validations."""
    eval_temperature: float = option(1.0, at_least=0)
    """Temperature of validation's responses; 0 decodes greedily."""
    eval_seed: int = option(10, at_least=0)
    """Seed of validation's sampled responses."""
    generation_batch_size: int | None = option(None, at_least=1)
    """Rows that are decoded at a time: by default 32 on CPU, 128 on a GPU."""
    bf16: bool | None = None
    """Compute in bfloat16; by default where the device has units for it. Trained weights stay float32."""
    seed: int = option(42, at_least=0, at_most=2**32 - 1)  # NumPy's limit
    """Seed of everything random."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a NaN or infinite loss or gradient, before the student's update: stop, or skip the step and count it."""
    report_to: str | list[str] | None = "none"
    """Tracker, such as wandb or tensorboard."""
    logging_steps: float = 1
    """Optimizer steps between two logged lines."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""
    ddp_find_unused_parameters: bool | None = False
    """DDP: look for parameters that a step does not reach, as those of experts; costs time."""
    logging_nan_inf_filter: bool = False
    """Unused: nothing that is NaN or infinite is hidden from the log; see --on_nan."""

    def __post_init__(self) -> None:
        fill_in_precision(self)
        super().__post_init__()
        if self.generation_batch_size is None:
            self.generation_batch_size = engine_for(self.device).decode_rows
        use_one_gpu(self)
        check_all("Wrong settings", [*limit_checks(self), *self.checks()])

    def checks(self) -> list[tuple[bool, str]]:
        """For `check_all`: what may be wrong beyond the limits of single fields."""
        return [
            (
                self.torch_compile,
                "torch_compile is not supported, since a compiled model cannot be run in parts as training and "
                "validation do; leave it, its backend and its mode out",
            ),
            (
                self.auto_find_batch_size,
                "auto_find_batch_size would change how many rows an optimizer step takes; lower "
                "per_device_train_batch_size, and raise gradient_accumulation_steps as much",
            ),
            (
                self.full_determinism and self.device.type == "cuda",
                "full_determinism would stop the first sampled response, since CUDA sums cumulatively in no fixed "
                "order; leave it out (--seed repeats a run up to rounding), or give --use_cpu",
            ),
            (
                self.logging_nan_inf_filter,
                "logging_nan_inf_filter would hide a loss that is NaN or infinite; see on_nan",
            ),
        ]


def fill_in_precision(args: Any) -> None:
    """Choose `bf16` of training arguments, before transformers looks at them.

    transformers takes bf16 on a CPU only with `use_cpu`, even on machines that have nothing else.
    """
    asks_for_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    other = None if asks_for_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if other is None else other
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_bfloat16_units(device)
    if args.bf16 and device.type == "cpu":
        args.use_cpu = True


def use_one_gpu(args: Any) -> None:
    """Without a launcher, leave all GPUs but one alone: transformers would copy the student to each at every step."""
    args._n_gpu = min(args.n_gpu, 1)
