"""The losses again, written as their formulas, in float64 on the CPU. This file uses no code of promptkd."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Inputs", "Reference", "references"]

_LOG = math.log


@dataclass(frozen=True)
class Inputs:
    """Hidden states, heads and labels of one case, in float64 on the CPU; q is the student, p the teacher."""

    student_hidden: Tensor
    """(N, H_s)"""
    student_head: Tensor
    """(columns, H_s); columns beyond the vocabulary are padding"""
    student_bias: Tensor | None
    prompted_hidden: Tensor
    """(N, H_t), of the prompted teacher"""
    plain_hidden: Tensor
    """(N, H_t), of the plain teacher"""
    teacher_head: Tensor
    labels: Tensor
    """(N,)"""
    vocabulary: int
    softcap: float | None


@dataclass(frozen=True)
class Reference:
    """The expected values of a loss."""

    values: Tensor
    """(N,), in nats"""
    gradients: dict[str, Tensor]
    """Gradients of their sum, by the name of the input."""


Values = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps log-probabilities of student, prompted and plain teacher (N, V) and labels to (N,)."""


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(a + _LOG(share), b + _LOG(1 - share))


def _jensen_shannon(q: Tensor, p: Tensor) -> Tensor:
    m = _mixture(p, q, 0.5)
    return 0.5 * _kl(p, m) + 0.5 * _kl(q, m)


LOSSES: dict[str, Values] = {
    "reverse_kl": lambda q, p, plain, y: _kl(q, p),
    "forward_kl": lambda q, p, plain, y: _kl(p, q),
    "cross_entropy": lambda q, p, plain, y: -q.gather(-1, y[:, None])[:, 0],
    "prompt, λ 0": lambda q, p, plain, y: _kl(p, q),
    "prompt, λ 0.7": lambda q, p, plain, y: _kl(p, q) + 0.7 * _kl(p, plain),
    "jensen_shannon 0.5": lambda q, p, plain, y: _jensen_shannon(q, p),
    "skew_forward_kl 0.1": lambda q, p, plain, y: _kl(p, _mixture(p, q, 0.1)),
    "skew_reverse_kl 0.1": lambda q, p, plain, y: _kl(q, _mixture(q, p, 0.1)),
}


def references(name: str, inputs: Inputs) -> Reference:
    """The loss with that name, and its gradients with respect to everything that it trains."""
    learns_by_prompt = name.startswith("prompt")
    student = inputs.student_hidden.clone().requires_grad_(not learns_by_prompt)
    head = inputs.student_head.clone().requires_grad_(not learns_by_prompt)
    bias = None if inputs.student_bias is None else inputs.student_bias.clone().requires_grad_(not learns_by_prompt)
    prompted = inputs.prompted_hidden.clone().requires_grad_(learns_by_prompt)

    def log_probs(hidden: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, offset)[:, : inputs.vocabulary]
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        return logits.log_softmax(-1)

    q = log_probs(student, head, bias)
    p = log_probs(prompted, inputs.teacher_head, None)
    plain = log_probs(inputs.plain_hidden, inputs.teacher_head, None)
    values = LOSSES[name](q, p, plain, inputs.labels)
    named = {"student_hidden": student, "student_head": head, "student_bias": bias, "prompted_hidden": prompted}
    learned = {key: each for key, each in named.items() if each is not None and each.requires_grad}
    gradients = torch.autograd.grad(values.sum(), list(learned.values()))
    return Reference(values.detach(), dict(zip(learned, gradients, strict=True)))
