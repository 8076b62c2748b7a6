"""Divergences on a few rows of logits: values, and the gradient written over the logits that require grad.

The hand-written ones are for logits that are finite everywhere; the others go through the plain objective and autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promptkd.objectives.divergences import forward_kl, reverse_kl, shared_log_probs
from promptkd.objectives.prompt import Direction, prompt_loss_terms

__all__ = ["PLAIN_KERNELS", "Kernel", "Kernels", "Objective", "objective_kernel", "prompt_kernel"]

Objective = Callable[[Tensor, Tensor], Tensor]
Kernel = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""Logits that require grad (C, V) and targets, each logits (C, V) or labels (C,), to values (C,) and figures (C,). The
gradient of the values is written over the logits that require grad."""


@dataclass(frozen=True)
class Kernels:
    """Kernels with gradients worked out by hand, for logits that are finite everywhere."""

    reverse_kl: Kernel
    forward_kl: Kernel
    cross_entropy: Kernel
    """Its target is labels."""
    prompt: Callable[[float], Kernel]
    """From λ to the prompt loss, both of its KLs reverse."""


def objective_kernel(objective: Objective, kernels: Kernels, *, absent_tokens: bool) -> Kernel:
    """Student and teacher logits to `objective`, with the figure "entropy" of the student.

    Args:
        absent_tokens: whether logits may be -inf.
    """
    written: dict[Any, Kernel] = {reverse_kl: kernels.reverse_kl, forward_kl: kernels.forward_kl}
    return _by_autograd(objective) if absent_tokens or objective not in written else written[objective]


def prompt_kernel(
    weight: float, student_direction: Direction, plain_direction: Direction, kernels: Kernels, *, absent_tokens: bool
) -> Kernel:
    """Prompted, student and (optional) plain logits to `prompt_loss`, with the figures "to_student" and "to_plain"."""
    if student_direction == plain_direction == "reverse" and not absent_tokens:
        return kernels.prompt(weight)
    return _prompt_by_autograd(weight, student_direction, plain_direction)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-log q(y): d/dz = q - [y]."""
    log_q = logits.log_softmax(-1)
    values = -log_q.gather(-1, labels[:, None])[:, 0]
    q = torch.exp(log_q, out=logits)
    entropy = _entropy(q, log_q)
    q.scatter_add_(-1, labels[:, None], -torch.ones_like(values)[:, None])
    return values, {"entropy": entropy}


def _reverse_kl(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(q || p): d/dz = q (log q - log p - KL)."""
    log_q, difference = logits.log_softmax(-1), target.log_softmax(-1)
    q = torch.exp(log_q, out=logits)
    torch.sub(log_q, difference, out=difference)
    values = (q * difference).sum(-1)
    entropy = -log_q.mul_(q).sum(-1)
    q.mul_(difference.sub_(values[:, None]))
    return values, {"entropy": entropy}


def _forward_kl(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(p || q): d/dz = q - p."""
    log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
    q, p = torch.exp(log_q, out=logits), log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    entropy = -log_q.mul_(q).sum(-1)
    q.sub_(p)
    return values, {"entropy": entropy}


def _reverse_prompt_kl(weight: float) -> Kernel:
    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """KL(p || q) + λ KL(p || p0): d/dz = p (g - Σ p g), g = (1 + λ) log p - log q - λ log p0."""
        log_p, g = logits.log_softmax(-1), student.log_softmax(-1)
        p = torch.exp(log_p, out=logits)
        torch.sub(log_p, g, out=g)
        values = to_student = (p * g).sum(-1)
        figures = {"to_student": to_student}
        if plain:
            away = log_p.sub_(plain[0].log_softmax(-1))
            figures["to_plain"] = (p * away).sum(-1)
            values = to_student + weight * figures["to_plain"]
            g.add_(away, alpha=weight)
        p.mul_(g.sub_(values[:, None]))
        return values, figures

    return kernel


def _by_autograd(objective: Objective) -> Kernel:
    def kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.enable_grad():
            learner = logits.detach().requires_grad_()
            values = objective(learner, target)
            (gradient,) = torch.autograd.grad(values.sum(), learner)
        log_q, _ = shared_log_probs(logits, target)
        entropy = _entropy(log_q.exp(), log_q)
        logits.copy_(gradient)
        return values.detach(), {"entropy": entropy}

    return kernel


def _prompt_by_autograd(weight: float, student_direction: Direction, plain_direction: Direction) -> Kernel:
    def kernel(logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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
        logits.copy_(gradient)
        return values.detach(), figures

    return kernel


def _entropy(q: Tensor, log_q: Tensor) -> Tensor:
    return -torch.where(log_q == -torch.inf, 0.0, q * log_q).sum(-1)


PLAIN_KERNELS = Kernels(_reverse_kl, _forward_kl, _cross_entropy, _reverse_prompt_kl)
"""In a few operations of torch, on any device."""
