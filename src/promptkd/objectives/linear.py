"""Objectives from hidden states and heads, a few hundred tokens at a time.

A loss over N tokens and V words needs tensors of shape (N, V) if written plainly, several of them. Here a chunk of
tokens is projected, its loss and the gradient with respect to its logits are computed, and the gradient goes on to the
hidden states and the head at once; no tensor of shape (N, V) is ever made, and backward only multiplies. The
values are those of the plain objectives, which stay the reference (tests/test_linear.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promptkd.objectives.divergences import forward_kl, kl_from_log_probs, reverse_kl, shared_log_probs
from promptkd.objectives.prompt import Direction, prompt_loss_terms

__all__ = ["ChunkedLoss", "Head", "chunked_cross_entropy", "chunked_objective", "chunked_prompt_loss"]

Objective = Callable[[Tensor, Tensor], Tensor]
Kernel = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Logits that learn (C, V) and targets, each logits (C, V) or labels (C,), to values (C,), gradient (C, V), figures."""

Targets = Sequence[tuple[Tensor, "Head | None"]]
"""States (N, H) with the head that reads them, or values (N,) that are given as they are, with None."""


@dataclass(frozen=True)
class Head:
    """A linear head: softcap · tanh(scale · (W h + b) / softcap), of the first `vocabulary` words."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, H) to (C, V)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def undo_transform(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to W h + b from that with respect to the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient

    def sliced(self, vocabulary: int) -> "Head":
        """The same head with its first `vocabulary` columns."""
        if vocabulary == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return Head(self.weight[:vocabulary], bias, self.scale, self.softcap)


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss summed over tokens, and what else was seen on the way."""

    total: Tensor
    """Scalar, with a gradient."""
    figures: dict[str, Tensor]
    """Scalar sums over tokens, without one."""


def chunked_objective(
    objective: Objective,
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    chunk: int = 256,
) -> ChunkedLoss:
    """Sum over tokens of `objective(student_logits, teacher_logits)`.

    Args:
        objective: any of `promptkd.objectives`, or one's own, on logits.
        student_hidden: (N, H_s). It and the student's head receive gradients.
        teacher_hidden: (N, H_t), constant.
        chunk: tokens at a time.

    Returns:
        The sum, and the figure "entropy" of the student over the columns that both have, summed, in nats.

    Raises:
        ValueError: for differing numbers of tokens.
    """
    kernel = _KERNELS.get(objective) or _by_autograd(objective)
    return _run(kernel, student_hidden, student_head, [(teacher_hidden, teacher_head)], chunk)


def chunked_cross_entropy(
    student_hidden: Tensor, student_head: Head, labels: Tensor, *, chunk: int = 256
) -> ChunkedLoss:
    """Sum over tokens of -log q(y), with the student's entropy as a figure.

    Args:
        student_hidden: (N, H_s). It and the student's head receive gradients.
        labels: (N,) the tokens y.
    """
    return _run(_cross_entropy_kernel, student_hidden, student_head, [(labels, None)], chunk)


def chunked_prompt_loss(
    prompted_hidden: Tensor,
    prompted_head: Head,
    student_hidden: Tensor,
    student_head: Head,
    plain_hidden: Tensor | None,
    plain_head: Head,
    *,
    weight: float,
    student_direction: Direction = "reverse",
    plain_direction: Direction = "reverse",
    chunk: int = 256,
) -> ChunkedLoss:
    """Sum over tokens of `prompt_loss`; only `prompted_hidden` (and a teacher's head that is trained) gets a gradient.

    Args:
        prompted_hidden, plain_hidden: (N, H_t) of the teacher with its adapter and without.
        student_hidden: (N, H_s).

    Returns:
        The sum, and its two terms "to_student" and (with `plain_hidden`) "to_plain", summed, unweighted.

    Raises:
        ValueError: for a weight without `plain_hidden`, or differing numbers of tokens.
    """
    if plain_hidden is None and weight != 0:
        raise ValueError(f"`plain_hidden` may be left out only with a weight of 0. Got {weight}.")
    targets: list[tuple[Tensor, Head | None]] = [(student_hidden, student_head)]
    if plain_hidden is not None:
        targets.append((plain_hidden, plain_head))
    if student_direction == plain_direction == "reverse":
        kernel = _prompt_kernel(weight)
    else:
        kernel = _prompt_by_autograd(weight, student_direction, plain_direction)
    return _run(kernel, prompted_hidden, prompted_head, targets, chunk)


def _run(kernel: Kernel, hidden: Tensor, head: Head, targets: Targets, chunk: int) -> ChunkedLoss:
    tokens = [hidden.shape[0], *(state.shape[0] for state, _ in targets)]
    if len(set(tokens)) > 1:
        raise ValueError(f"Every model must give one state a token. Got {', '.join(map(str, tokens))} states.")
    figures: dict[str, Tensor] = {}
    total = _Chunked.apply(hidden, head.weight, head.bias, head, targets, kernel, chunk, figures)
    return ChunkedLoss(total, figures)


class _Chunked(torch.autograd.Function):
    """The sum of a kernel over all chunks; its gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Targets,
        kernel: Kernel,
        chunk: int,
        figures: dict[str, Tensor],
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        bias_gradient = torch.zeros_like(bias) if needs_bias and bias is not None else None
        wide = torch.promote_types(torch.float32, hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for first in range(0, hidden.shape[0], chunk):
            part = slice(first, first + chunk)
            logits = head.logits(hidden[part])
            read = (state[part] if each is None else each.logits(state[part]) for state, each in targets)
            values, gradient, seen = kernel(logits, *read)
            total += values.sum()
            for name, value in seen.items():
                figures[name] = figures.get(name, 0) + value.sum()
            gradient = head.undo_transform(gradient.to(logits.dtype), logits)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ weight.to(gradient.dtype)
            if weight_gradient is not None:
                weight_gradient += gradient.T @ hidden[part].to(gradient.dtype)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if each is None else each * upstream.to(each.dtype) for each in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


def _reverse_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """KL(q || p): d/dz = q (log q - log p - KL)."""
    log_q, log_p = shared_log_probs(logits, target)
    q = log_q.exp()
    difference = log_q - log_p
    difference.masked_fill_(log_q == -torch.inf, 0.0)
    values = (q * difference).sum(-1)
    gradient = difference.sub_(values[:, None]).mul_(q)
    return values, gradient, {"entropy": _entropy(q, log_q)}


def _forward_kl_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """KL(p || q): d/dz = q - p."""
    log_q, log_p = shared_log_probs(logits, target)
    q = log_q.exp()
    values = kl_from_log_probs(log_p, log_q)
    entropy = _entropy(q, log_q)
    return values, q.sub_(log_p.exp()), {"entropy": entropy}


def _cross_entropy_kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """-log q(y): d/dz = q - [y]."""
    (log_q,) = shared_log_probs(logits)
    values = -log_q.gather(-1, labels[:, None])[:, 0]
    q = log_q.exp()
    entropy = _entropy(q, log_q)
    gradient = q.scatter_add_(-1, labels[:, None], -torch.ones_like(values)[:, None])
    return values, gradient, {"entropy": entropy}


def _prompt_kernel(weight: float) -> Kernel:
    with_absent_columns = _prompt_by_autograd(weight, "reverse", "reverse")

    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """KL(p || q) + λ KL(p || p0): d/dz = p (g - Σ p g), g = (1 + λ) log p - log q - λ log p0."""
        if any(bool((each.amin(-1) == -torch.inf).any()) for each in (logits, student, *plain)):
            return with_absent_columns(logits, student, *plain)  # where each term has columns of its own
        log_p, log_q = shared_log_probs(logits, student)
        p = log_p.exp()
        g = log_p - log_q
        to_student = (p * g).sum(-1)
        figures = {"to_student": to_student}
        values = to_student
        if plain:
            away = log_p - shared_log_probs(plain[0])[0]
            to_plain = (p * away).sum(-1)
            figures["to_plain"] = to_plain
            values = to_student + weight * to_plain
            g = g.add_(away, alpha=weight)
        gradient = g.sub_(values[:, None]).mul_(p)
        return values, gradient, figures

    return kernel


def _by_autograd(objective: Objective) -> Kernel:
    def kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.enable_grad():
            learner = logits.detach().requires_grad_()
            values = objective(learner, target)
            (gradient,) = torch.autograd.grad(values.sum(), learner)
        log_q, _ = shared_log_probs(logits, target)
        return values.detach(), gradient, {"entropy": _entropy(log_q.exp(), log_q)}

    return kernel


def _prompt_by_autograd(weight: float, student_direction: Direction, plain_direction: Direction) -> Kernel:
    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.enable_grad():
            learner = logits.detach().requires_grad_()
            to_student, to_plain = prompt_loss_terms(
                learner,
                student,
                plain[0] if plain else None,
                student_direction=student_direction,
                plain_direction=plain_direction,
            )
            values = to_student if to_plain is None else to_student + weight * to_plain
            (gradient,) = torch.autograd.grad(values.sum(), learner)
        figures = {"to_student": to_student.detach()}
        if to_plain is not None:
            figures["to_plain"] = to_plain.detach()
        return values.detach(), gradient, figures

    return kernel


def _entropy(q: Tensor, log_q: Tensor) -> Tensor:
    return -torch.where(log_q == -torch.inf, 0.0, q * log_q).sum(-1)


_KERNELS: dict[Any, Kernel] = {reverse_kl: _reverse_kl_kernel, forward_kl: _forward_kl_kernel}
