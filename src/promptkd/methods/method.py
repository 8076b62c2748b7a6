"""What a method consists of, and what a loss function gets to see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from promptkd.data.batch import TokenBatch
from promptkd.data.encode import EncodedExample
from promptkd.engine import ChunkedLoss
from promptkd.methods.losses import Pair
from promptkd.responses import Responses

__all__ = ["Adapter", "Method", "Objective", "Step", "StudentLoss"]

Adapter = Literal["none", "prompt", "lora", "full", "online"]

Objective = Callable[[Tensor, Tensor], Tensor]
"""(student_logits, teacher_logits), both (N, V), to N values in nats."""


@dataclass(frozen=True)
class Step:
    """One micro-batch as a loss function sees it."""

    pair: Pair
    rows: Sequence[EncodedExample]
    """The rows of the data; their own responses are `row.response_ids`."""
    batch: TokenBatch
    """The rows' prompts with the responses that the method took."""
    student_hidden: Tensor
    """(N, H_s) states that predict `batch.targets`, with the student's graph."""
    teacher_hidden: Callable[[TokenBatch], Tensor]
    """States of the (adapted) teacher for any batch, (N, H_t), without a graph."""
    hidden_of_student: Callable[[TokenBatch], Tensor]
    """States of the student for any batch, with its graph."""


StudentLoss = Callable[[Step], ChunkedLoss]
"""A micro-batch to the student's loss, summed over tokens (or over rows, see `Method.per_row`)."""


@dataclass(frozen=True)
class Method:
    """What makes a method of distillation."""

    responses: Responses
    objective: Objective | None = None
    """What the student minimises, a value a response token. Or give `loss`."""
    teacher_adapter: Adapter = "none"
    """What of the teacher is trained along: nothing, a soft prompt, LoRA, all of it, a small online module."""
    loss: StudentLoss | None = None
    """The student's loss in place of an objective."""
    per_row: bool = False
    """Whether the loss is a mean over rows, not over tokens."""

    def __post_init__(self) -> None:
        if (self.objective is None) == (self.loss is None):
            raise ValueError("A method needs either an objective or a loss.")

    def student_loss(self, step: Step) -> ChunkedLoss:
        """The student's loss on one micro-batch, summed."""
        if self.loss is not None:
            return self.loss(step)
        assert self.objective is not None
        teacher_hidden = step.teacher_hidden(step.batch)
        return step.pair.student_loss(self.objective, step.student_hidden, teacher_hidden)
