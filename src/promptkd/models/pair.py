"""Student and teacher: from their hidden states to summed losses, chunked where the heads allow, else plain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from promptkd.engine import (
    ChunkedLoss,
    Head,
    chunked_cross_entropy,
    chunked_objective,
    chunked_prompt_loss,
    head_logits,
    linear_head,
)
from promptkd.objectives import prompt_loss_terms
from promptkd.objectives.divergences import Directions

Objective = Callable[[Tensor, Tensor], Tensor]
"""(student_logits, teacher_logits), both (N, V), to N values in nats."""
Role = Literal["student", "teacher", "plain"]


@dataclass(frozen=True)
class Pair:
    """Student and teacher, and how their distributions are compared."""

    student: nn.Module
    teacher: nn.Module
    vocabulary: int
    """Tokens that both heads have a column for; further columns are padding."""
    chunk: int | None = None
    """Tokens whose logits are held at a time; None for what suits the device, 0 for all, by the plain objectives."""
    adapted: nn.Module | None = None
    """The model whose head reads the adapted teacher's states; None if that is the teacher itself."""

    def student_loss(self, objective: Objective, student_hidden: Tensor, teacher_hidden: Tensor) -> ChunkedLoss:
        """Sum of `objective` over the tokens, for the student; the metric "entropy" is the student's."""
        heads = self._heads("student", "teacher")
        if heads is not None:
            student, teacher = (student_hidden, heads[0]), (teacher_hidden.detach(), heads[1])
            return chunked_objective(objective, student, teacher, chunk=self.chunk)
        logits = self.logits("student", student_hidden)
        with torch.no_grad():
            target_logits = self.logits("teacher", teacher_hidden)
        return with_entropy(objective(logits, target_logits).sum(), logits)

    def cross_entropy(self, which: Role, hidden: Tensor, targets: Tensor) -> ChunkedLoss:
        """Sum over the tokens of -log q(y), y = `targets`; the metric "entropy" is that model's."""
        heads = self._heads(which)
        if heads is not None:
            return chunked_cross_entropy((hidden, heads[0]), targets, chunk=self.chunk)
        logits = self.logits(which, hidden)
        return with_entropy(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits)

    def prompt_loss(
        self,
        prompted_hidden: Tensor,
        student_hidden: Tensor,
        plain_hidden: Tensor | None,
        *,
        weight: float = 0.0,
        **directions: Unpack[Directions],
    ) -> ChunkedLoss:
        """Sum over the tokens of the teacher adapter's loss, with its terms "to_student" and "to_plain"."""
        heads = self._heads("teacher", "student", "plain")
        if heads is not None:
            prompted, student = (prompted_hidden, heads[0]), (student_hidden, heads[1])
            plain = None if plain_hidden is None else (plain_hidden, heads[2])
            return chunked_prompt_loss(prompted, student, plain, weight=weight, chunk=self.chunk, **directions)
        with torch.no_grad():
            student_logits = self.logits("student", student_hidden)
            plain_logits = None if plain_hidden is None else self.logits("plain", plain_hidden)
        prompted_logits = self.logits("teacher", prompted_hidden)
        to_student, to_plain = prompt_loss_terms(prompted_logits, student_logits, plain_logits, **directions)
        total, metrics = to_student.sum(), {"to_student": to_student.detach().sum()}
        if to_plain is not None:
            total = total + weight * to_plain.sum()
            metrics["to_plain"] = to_plain.detach().sum()
        return ChunkedLoss(total, metrics)

    def logits(self, which: Role, hidden: Tensor) -> Tensor:
        """Logits (N, V) over the shared tokens, all at once; "teacher" is the adapted one, "plain" as it came."""
        return head_logits(self._model(which), hidden, vocabulary=self.vocabulary)

    def _model(self, which: Role) -> nn.Module:
        if which == "student":
            return self.student
        return self.adapted if which == "teacher" and self.adapted is not None else self.teacher

    def _heads(self, *which: Role) -> list[Head] | None:
        """The heads as tensors; None if they must be run as modules, or all tokens are wanted at once."""
        if self.chunk == 0:
            return None
        models = [self._model(each) for each in which]
        known = {id(model): linear_head(model) for model in models}  # a sharded head is gathered once for all its roles
        heads = [known[id(model)] for model in models]
        return None if None in heads else [head.limited_to(self.vocabulary) for head in heads if head is not None]


def with_entropy(total: Tensor, logits: Tensor) -> ChunkedLoss:
    """A loss `total` summed over the tokens, with the entropy of logits (N, V) as its metric."""
    return ChunkedLoss(total, {"entropy": entropy(logits).sum()})


def entropy(logits: Tensor) -> Tensor:
    """-Σ q log q of logits (..., V), in nats, without a gradient."""
    log_q = logits.detach().to(torch.promote_types(torch.float32, logits.dtype)).log_softmax(-1)
    return -torch.where(log_q == -torch.inf, 0.0, log_q.exp() * log_q).sum(-1)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probabilities of the `targets` under logits (N, V), in float32 or wider."""
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    return -torch.nn.functional.cross_entropy(wide, targets, reduction="none")
