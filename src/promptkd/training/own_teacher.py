"""Teachers that a student has in itself, for self-distillation: its frozen start, and its moving average."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from promptkd.data.encode import EncodedData
from promptkd.errors import check_all
from promptkd.methods import Method
from promptkd.models.merge import keep_origin
from promptkd.training.distributed import is_sharded
from promptkd.training.guard import Guard

_LOGGER = logging.getLogger(__name__)

SELF, EMA = "self", "ema"  # a folder of such a name is given as ./self
_NO_CONTEXT = (
    "The teacher, {told}, reads what the student reads: their distributions begin as the same, and their divergence as "
    "0, so nothing is learned from it but rounding. Give it a context that only it sees (--teacher_prompt), or another "
    "teacher."
)


def is_own(teacher: Any) -> bool:
    """Whether the teacher is made of the student."""
    return isinstance(teacher, str) and teacher in (SELF, EMA)


def told_teacher(teacher: str, args: Any) -> str:
    """What an own teacher is, for records and messages."""
    averages = teacher == EMA
    return f"moving average of the student, decay {args.teacher_ema_decay}" if averages else "the student's start"


def check_own_teacher(teacher: Any, args: Any, method: Method, *, loaded: bool = False) -> None:
    """Refuse settings that the teacher would not read, or that a moving average cannot have.

    Args:
        loaded: whether the student came as a model, of which the teacher is a copy.
    """
    averages, decay, adapter = teacher == EMA and is_own(teacher), args.teacher_ema_decay, method.adapter_class
    told, default = "a moving average of the student", type(args).__dataclass_fields__["teacher_ema_decay"].default
    of_files = ("teacher_dtype", "teacher_quantization", "teacher_model_init_kwargs", "teacher_model_revision")
    unread = () if not is_own(teacher) else of_files[1:] if averages else of_files if loaded else of_files[3:]
    set_apart = [name for name in unread if vars(args)[name] is not None]
    checks = [
        (decay != default and not averages, f"teacher_ema_decay is that of {told}, which only the teacher ema is"),
        (bool(set_apart), f"{', '.join(set_apart)} cannot be set: the teacher is made of the student"),
        (
            averages and args.teacher_dtype not in (None, "float32"),
            f"{told} is kept in float32, since lower precision loses small updates: leave teacher_dtype out",
        ),
        (
            bool(averages and adapter and adapter.trains_layers),
            f"the weights of {told} cannot be trained as well: train a soft prompt",
        ),
        (averages and not method.reads_teacher, f"this method reads no teacher, and {told} would cost memory alone"),
    ]
    check_all("Wrong settings", checks)


def start_of(student: PreTrainedModel) -> nn.Module:
    """A copy of a loaded student, frozen and in evaluation mode."""
    start = copy.deepcopy(student).requires_grad_(False).eval()
    keep_origin(start, student)
    return start


def no_context_notes(teacher: Any, args: Any, method: Method, data: EncodedData | None) -> list[str]:
    """What to say, and to log, where nothing tells the teacher from the student: no row of `data` has a context."""
    alone = data is None or all(row.teacher_prompt_ids is None for row in data.examples)
    same = is_own(teacher) and method.reads_teacher and method.adapter is None and alone
    notes = [_NO_CONTEXT.format(told=told_teacher(teacher, args))] if same else []
    for note in notes:
        _LOGGER.warning(note)
    return notes


class MovingAverage(TrainerCallback):
    """θ̄ <- d θ̄ + (1 - d) θ after each optimizer step that is taken, from θ̄ = θ of before the first step.

    θ are the trained weights (of a LoRA student, A and B by themselves), θ̄ is in float32. What is not trained, the
    average shares with the student. `model` is the teacher: the student with θ̄ in place of θ.
    """

    def __init__(self, student: nn.Module, decay: float, accelerator: Accelerator, guard: Guard):
        check_all(
            "Cannot train on these processes",
            [
                (
                    is_sharded(accelerator) or accelerator.distributed_type == "DEEPSPEED",
                    "a moving average of the student needs its weights whole in each process; use DDP, or the teacher "
                    "self",
                )
            ],
        )
        self._decay, self._guard, self._accelerator = decay, guard, accelerator
        twins = {id(weight): _twin(weight) for weight in student.parameters()}
        self.model = copy.deepcopy(student, dict(twins)).eval()
        self._trained = {
            name: (twins[id(weight)], weight) for name, weight in student.named_parameters() if weight.requires_grad
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not taken: a step that the guard refused, and in float16 one that overflowed at the scale of the loss.
        if self._guard.skipped_in_a_row or self._accelerator.optimizer_step_was_skipped:
            return
        with torch.no_grad():
            for average, weight in self._trained.values():
                average.lerp_(weight.detach().to(average), 1 - self._decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages of the trained weights, by the student's names."""
        return {name: average.detach() for name, (average, _) in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`."""
        with torch.no_grad():
            for name, (average, _) in self._trained.items():
                average.copy_(state[name])


def _twin(weight: nn.Parameter) -> nn.Parameter:
    """A trained weight's copy in float32 or wider; of one that is not trained, the same numbers in the same memory."""
    if not weight.requires_grad:
        return nn.Parameter(weight.data, requires_grad=False)
    wide = torch.promote_types(torch.float32, weight.dtype)
    return nn.Parameter(weight.detach().to(wide, copy=True), requires_grad=False)
