"""Student and teacher as a pair: from hidden states to summed losses, chunked or plain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from promptkd.data.kept_logits import CoarseTarget
from promptkd.engine.chunked_loss import (
    ChunkedLoss,
    chunked_coarse,
    chunked_cross_entropy,
    chunked_log_probs,
    chunked_objective,
    chunked_on_policy_gradient,
    chunked_prompt_loss,
    chunked_skew_kl,
    chunked_weighted,
)
from promptkd.engine.heads import Head, Vocabulary, head_logits, linear_head
from promptkd.objectives import prompt_loss_terms, reverse_kl, skew_forward_kl, skew_reverse_kl
from promptkd.objectives.coarse import check_coarse, coarse_log_probs
from promptkd.objectives.divergences import Direction
from promptkd.objectives.kernels import token_values, top_overlap
from promptkd.objectives.response_kernels import Skew
from promptkd.objectives.sequence import on_policy_gradient

Objective = Callable[[Tensor, Tensor], Tensor]  # (student_logits, teacher_logits), both (N, V), to N values in nats
Role = Literal["student", "teacher", "plain"]


@dataclass(frozen=True)
class Pair:
    """Student and teacher, and how their distributions are compared."""

    student: nn.Module
    teacher: nn.Module
    vocabulary: Vocabulary | int  # the tokens that they share, or how many; further columns are padding
    chunk: int | None = None  # tokens per chunk of logits; None for the device's, 0 for all, by the plain objectives
    adapted: nn.Module | None = None  # whose head reads the adapted teacher's states, where that is not the teacher

    def student_loss(
        self, objective: Objective, student_hidden: Tensor, teacher_hidden: Tensor | CoarseTarget
    ) -> ChunkedLoss:
        """Sum of `objective` over the tokens, for the student; its metrics are "entropy" and "top_overlap".

        Of kept logits, in the place of the teacher's states, over their K + 1 outcomes.
        """
        if isinstance(teacher_hidden, CoarseTarget):
            return self._coarse_loss(objective, student_hidden, teacher_hidden)
        if heads := self._heads("student", "teacher"):
            student, teacher = (student_hidden, heads[0]), (teacher_hidden.detach(), heads[1])
            return chunked_objective(objective, student, teacher, chunk=self.chunk)
        logits, target = self._both_logits(student_hidden, teacher_hidden)
        return with_entropy(token_values(objective, logits, target).sum(), logits, target)

    def _coarse_loss(self, objective: Objective, hidden: Tensor, kept: CoarseTarget) -> ChunkedLoss:
        check_coarse(objective, is_whole=kept.is_whole)
        if heads := self._heads("student"):
            return chunked_coarse(objective, (hidden, heads[0]), kept.ids, kept.log_probs, chunk=self.chunk)
        logits = self.logits("student", hidden)
        values = token_values(objective, coarse_log_probs(logits, kept.ids), kept.log_probs)
        loss, overlap = with_entropy(values.sum(), logits), (logits.argmax(-1) == kept.ids[:, 0]).float().sum()
        return ChunkedLoss(loss.total, loss.metrics | {"top_overlap": overlap})

    def on_policy_gradient(self, student_hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> ChunkedLoss:
        """Sum over the sampled tokens `targets` of `objectives.sequence.on_policy_gradient`.

        Its metrics are those of `student_loss`, and "sampled_kl", the sum of log q - log p.
        """
        if heads := self._heads("student", "teacher"):
            student, teacher = (student_hidden, heads[0]), (teacher_hidden.detach(), heads[1])
            return chunked_on_policy_gradient(student, teacher, targets, chunk=self.chunk)
        logits, target = self._both_logits(student_hidden, teacher_hidden)
        log_q, log_p = log_probs(logits, targets), log_probs(target, targets)
        loss = with_entropy(on_policy_gradient(log_q, log_p).sum(), logits, target)
        return ChunkedLoss(loss.total, loss.metrics | {"sampled_kl": (log_q.detach() - log_p).sum()})

    def skew_kl(
        self, skew: Skew, student_hidden: Tensor, teacher_hidden: Tensor, *, alpha: Tensor, weight: Tensor
    ) -> ChunkedLoss:
        """Sum over the tokens of weight · `skew_forward_kl`, or of `skew_reverse_kl` with a constant mixture.

        `alpha` and `weight` are constants of each token, (N,). The metrics are those of `student_loss`.
        """
        if heads := self._heads("student", "teacher"):
            student, teacher = (student_hidden, heads[0]), (teacher_hidden.detach(), heads[1])
            return chunked_skew_kl(skew, student, teacher, alpha=alpha, weight=weight, chunk=self.chunk)
        logits, target = self._both_logits(student_hidden, teacher_hidden)
        if skew == "forward":
            values = skew_forward_kl(logits, target, alpha=alpha)
        else:
            values = skew_reverse_kl(logits, target, alpha=alpha, constant_mixture=True)
        return with_entropy((weight * values).sum(), logits, target)

    def weighted(
        self,
        student_hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None = None,
        kl_weight: Tensor | None = None,
    ) -> ChunkedLoss:
        """Sum over the tokens of weight · log q(y) + kl_weight · `reverse_kl`, y = `targets`.

        The weights are constants of each token, (N,). The metrics are those of `student_loss`; without a teacher there
        is no second term and no "top_overlap".
        """
        if teacher_hidden is None or kl_weight is None:
            if heads := self._heads("student"):
                return chunked_weighted((student_hidden, heads[0]), targets, weight, chunk=self.chunk)
            logits = self.logits("student", student_hidden)
            return with_entropy((weight * log_probs(logits, targets)).sum(), logits)
        if heads := self._heads("student", "teacher"):
            student, teacher = (student_hidden, heads[0]), (teacher_hidden.detach(), heads[1])
            return chunked_weighted(student, targets, weight, teacher, kl_weight, chunk=self.chunk)
        logits, target = self._both_logits(student_hidden, teacher_hidden)
        values = weight * log_probs(logits, targets) + kl_weight * reverse_kl(logits, target)
        return with_entropy(values.sum(), logits, target)

    def log_probs(self, student_hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens `targets` under student and teacher, (N,) each, without a graph."""
        if heads := self._heads("student", "teacher"):
            student, teacher = (student_hidden, heads[0]), (teacher_hidden, heads[1])
            return chunked_log_probs(student, teacher, targets, chunk=self.chunk)
        with torch.no_grad():
            logits, target = self._both_logits(student_hidden, teacher_hidden)
            return log_probs(logits, targets), log_probs(target, targets)

    def cross_entropy(self, which: Role, hidden: Tensor, targets: Tensor) -> ChunkedLoss:
        """Sum over the tokens of -log q(y), y = `targets`; the metric "entropy" is that model's."""
        return token_cross_entropy(self._model(which), hidden, targets, vocabulary=self.vocabulary, chunk=self.chunk)

    def prompt_loss(
        self, prompted: Tensor, student: Tensor, plain: Tensor | None, *, weight: float = 0.0, **directions: Direction
    ) -> ChunkedLoss:
        """Sum over the tokens of `objectives.prompt_loss`, with its terms "to_student" and "to_plain"."""
        if heads := self._heads("teacher", "student", "plain"):
            learner, anchor = (student, heads[1]), None if plain is None else (plain, heads[2])
            adapted, chunk = (prompted, heads[0]), self.chunk
            return chunked_prompt_loss(adapted, learner, anchor, weight=weight, chunk=chunk, **directions)
        prompted_logits = self.logits("teacher", prompted)
        with torch.no_grad():
            student_logits = self.logits("student", student)
            plain_logits = None if plain is None else self.logits("plain", plain)
        to_student, to_plain = prompt_loss_terms(prompted_logits, student_logits, plain_logits, **directions)
        total, metrics = to_student.sum(), {"to_student": to_student.detach().sum()}
        if to_plain is not None:
            total = total + weight * to_plain.sum()
            metrics["to_plain"] = to_plain.detach().sum()
        return ChunkedLoss(total, metrics)

    def logits(self, which: Role, hidden: Tensor) -> Tensor:
        """Logits (N, V) over the shared tokens, all at once; "teacher" is the adapted one, "plain" as it came."""
        return head_logits(self._model(which), hidden, vocabulary=self.vocabulary)

    def _both_logits(self, student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) of the student, and of the adapted teacher without a graph."""
        logits = self.logits("student", student_hidden)
        with torch.no_grad():
            return logits, self.logits("teacher", teacher_hidden)

    def _model(self, which: Role) -> nn.Module:
        return {"student": self.student, "teacher": self.adapted or self.teacher, "plain": self.teacher}[which]

    def _heads(self, *which: Role) -> list[Head] | None:
        """The heads as tensors; None if they must be run as modules, or all tokens are wanted at once."""
        if self.chunk == 0:
            return None
        models = [self._model(each) for each in which]
        known = {id(model): linear_head(model) for model in models}  # a sharded head is gathered once for all its roles
        heads = [head.limited_to(self.vocabulary) for model in models if (head := known[id(model)]) is not None]
        return heads if len(heads) == len(models) else None


def token_cross_entropy(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    vocabulary: Vocabulary | int | None = None,
    accuracy: bool = False,
    chunk: int | None = None,
) -> ChunkedLoss:
    """Sum over the tokens of -log q(y), y = `targets` (N,), of a model's head on its hidden states (N, H).

    Args:
        vocabulary: the tokens that q is over, or how many; None for every column of the head.
        accuracy: whether to count, as the metric "correct" beside "entropy", the y that are the most probable token.
        chunk: tokens per chunk of logits; None for the device's, 0 for all.
    """
    head = None if chunk == 0 else linear_head(model)
    if head is not None:
        return chunked_cross_entropy((hidden, head.limited_to(vocabulary)), targets, accuracy=accuracy, chunk=chunk)
    logits = head_logits(model, hidden, vocabulary=vocabulary)
    loss = with_entropy(cross_entropy(logits, targets, reduction="sum"), logits)
    correct = {"correct": (logits.argmax(-1) == targets).sum()} if accuracy else {}
    return ChunkedLoss(loss.total, loss.metrics | correct)


def with_entropy(total: Tensor, logits: Tensor, target: Tensor | None = None) -> ChunkedLoss:
    """A loss `total` summed over the tokens, with the summed entropy, in nats, of logits (N, V) as its metric.

    With the teacher's logits as `target`, "top_overlap" counts the tokens at which both have the same top token.
    """
    log_q = logits.detach().to(torch.promote_types(torch.float32, logits.dtype)).log_softmax(-1)
    metrics = {"entropy": -torch.where(log_q == -torch.inf, 0.0, log_q.exp() * log_q).sum(-1).sum()}
    if target is not None:
        metrics["top_overlap"] = top_overlap(logits, target).sum()
    return ChunkedLoss(total, metrics)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probabilities of the `targets` under logits (N, V), in float32 or wider."""
    return -cross_entropy(logits.to(torch.promote_types(torch.float32, logits.dtype)), targets, reduction="none")
