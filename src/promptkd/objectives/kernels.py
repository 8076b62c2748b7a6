"""Kernels: per-token losses of a chunk of logits, with the gradient written over the logits.

The CUDA engine has its own (`engine/cuda/triton_kernels.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from promptkd.errors import RequestError
from promptkd.objectives.divergences import Direction, forward_kl, prompt_loss_terms, reverse_kl, shared_log_probs
from promptkd.objectives.moving import MovingTarget
from promptkd.objectives.tempered import AtTemperature

Objective = Callable[[Tensor, Tensor], Tensor]
"""Student and teacher logits (N, V) to values (N,)."""

Metrics = dict[str, Tensor]
Kernel = Callable[..., tuple[Tensor, Metrics]]
"""Takes logits (C, V) that require grad and targets, each logits (C, V) or labels (C,). Returns values (C,) and metrics
(C,), and writes the gradient of the values over the first logits."""

_AT_ONCE = 2**26  # logits of one pass of autograd: 256 MiB in float32


@dataclass(frozen=True)
class Kernels:
    """Kernels with hand-written gradients, for logits that are finite everywhere."""

    reverse_kl: Kernel
    forward_kl: Kernel
    cross_entropy: Kernel  # its target is labels
    prompt: Callable[[float], Kernel]  # from λ to the prompt loss with both KLs reverse
    on_policy: Kernel  # its targets are labels and the teacher's logits


def objective_kernel(objective: Objective, kernels: Kernels, *, absent_tokens: bool) -> Kernel:
    """The kernel of `objective`, with metrics "entropy" (the student's) and "top_overlap" (1 at the same top token).

    With `absent_tokens`, logits may be -inf.
    """
    if isinstance(objective, AtTemperature):
        inner = objective_kernel(objective.objective, kernels, absent_tokens=absent_tokens)
        return partial(_at_temperature, inner, objective.temperature)
    written = ((reverse_kl, kernels.reverse_kl), (forward_kl, kernels.forward_kl))
    kernel = next((kernel for known, kernel in written if objective is known), None)  # a custom one may have no hash
    if kernel is not None and not absent_tokens:
        return partial(_with_overlap, kernel)
    if isinstance(objective, MovingTarget) and not absent_tokens:
        of_target = kernels.forward_kl if objective.direction == "forward" else kernels.reverse_kl
        return partial(_with_overlap, partial(_to_target, of_target, objective))

    def plain(logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        log_q, _ = shared_log_probs(logits.detach(), target)
        return token_values(objective, logits, target), {"entropy": _entropy(log_q.exp(), log_q)}

    return partial(_with_overlap, partial(_by_autograd, plain))


def accuracy_kernel(cross_entropy: Kernel) -> Kernel:
    """A kernel of cross-entropy with the metric "correct": 1 where the label is the most probable token, else 0."""

    def kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        correct = (logits.argmax(-1) == labels).to(logits.dtype)  # before the gradient is written over them
        values, metrics = cross_entropy(logits, labels)
        return values, metrics | {"correct": correct}

    return kernel


def token_values(objective: Objective, logits: Tensor, target: Tensor) -> Tensor:
    """The values (N,) of `objective` for logits (N, V).

    Raises `RequestError` for anything else: a mean, or values for each of the V, would train as well, on another scale.
    """
    values: Any = objective(logits, target)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = f"the shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        expected = f"An objective gives one value per token, here {len(logits)} in a tensor. Got {got}"
        raise RequestError(f"{expected}. Sum over the vocabulary, and leave means over tokens to the trainer.")
    return values


def top_overlap(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) 1.0 where the most probable tokens of both logits (N, V) are the same, else 0.0."""
    return (logits.argmax(-1) == target.argmax(-1)).float()


def _with_overlap(kernel: Kernel, logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    overlap = top_overlap(logits, target)  # before the gradient is written over them
    values, metrics = kernel(logits, target)
    return values, metrics | {"top_overlap": overlap}


def _at_temperature(kernel: Kernel, temperature: float, logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """f(z / T): d/dz = f'(z / T) / T. The entropy is that of the student itself, at temperature 1."""
    log_q = logits.log_softmax(-1)
    entropy = _entropy(log_q.exp(), log_q)
    del log_q
    values, metrics = kernel(logits.div_(temperature), target / temperature)
    logits.div_(temperature)  # the gradient, which is written over them
    return values, metrics | {"entropy": entropy}


def _to_target(kernel: Kernel, objective: MovingTarget, logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    return kernel(logits, objective.target(logits.detach(), target))


def prompt_kernel(weight: float, kernels: Kernels, *, absent_tokens: bool, **directions: Direction) -> Kernel:
    """The kernel of `prompt_loss`; its metrics are the unweighted terms "to_student" and, where wanted, "to_plain"."""
    if set(directions.values()) <= {"reverse"} and not absent_tokens:
        return kernels.prompt(weight)

    def plain_loss(logits: Tensor, student: Tensor, plain: Tensor | None = None) -> tuple[Tensor, Metrics]:
        to_student, to_plain = prompt_loss_terms(logits, student, plain, **directions)
        if to_plain is None:
            return to_student, {"to_student": to_student}
        return to_student + weight * to_plain, {"to_student": to_student, "to_plain": to_plain}

    return partial(_by_autograd, plain_loss)


def _by_autograd(
    loss: Callable[..., tuple[Tensor, Metrics]], logits: Tensor, *targets: Tensor
) -> tuple[Tensor, Metrics]:
    """A kernel of a loss that leaves the gradient to autograd, which keeps up to a dozen tensors of that size."""
    rows = max(1, _AT_ONCE // logits.shape[-1])
    parts = zip(*(each.split(rows) for each in (logits, *targets)), strict=True)
    values, metrics = zip(*(_of_rows(loss, *part) for part in parts), strict=True)
    return torch.cat(values), {name: torch.cat([each[name] for each in metrics]) for name in metrics[0]}


def _of_rows(loss: Callable[..., tuple[Tensor, Metrics]], logits: Tensor, *targets: Tensor) -> tuple[Tensor, Metrics]:
    with torch.enable_grad():
        variable = logits.detach().requires_grad_()
        values, metrics = loss(variable, *targets)
        (gradient,) = torch.autograd.grad(values.sum(), variable)
    logits.copy_(gradient)
    return values.detach(), {name: value.detach() for name, value in metrics.items()}


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """-log q(y): d/dz = q - [y]."""
    log_q, places = logits.log_softmax(-1), labels[:, None]
    values = -log_q.gather(-1, places)[:, 0]
    q = torch.exp(log_q, out=logits)
    entropy = _entropy(q, log_q)
    q.scatter_add_(-1, places, -torch.ones_like(values)[:, None])
    return values, {"entropy": entropy}


def _on_policy(logits: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """-A log q(y), A = log p(y) - log q(y) constant: d/dz = A (q - [y])."""
    places = labels[:, None]
    log_p = target.log_softmax(-1).gather(-1, places)[:, 0]
    log_q = logits.log_softmax(-1)
    costs = -log_q.gather(-1, places)[:, 0]
    advantages = log_p + costs
    q = torch.exp(log_q, out=logits)
    entropy = -log_q.mul_(q).sum(-1)
    q.mul_(advantages[:, None]).scatter_add_(-1, places, -advantages[:, None])
    return advantages * costs, {"entropy": entropy, "sampled_kl": -advantages}


def _reverse_kl(logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """KL(q || p): d/dz = q (log q - log p - KL)."""
    log_q, difference = logits.log_softmax(-1), target.log_softmax(-1)
    q = torch.exp(log_q, out=logits)
    torch.sub(log_q, difference, out=difference)
    values = (q * difference).sum(-1)
    entropy = -log_q.mul_(q).sum(-1)
    q.mul_(difference.sub_(values[:, None]))
    return values, {"entropy": entropy}


def _forward_kl(logits: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """KL(p || q): d/dz = q - p."""
    log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
    q, p = torch.exp(log_q, out=logits), log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    entropy = -log_q.mul_(q).sum(-1)
    q.sub_(p)
    return values, {"entropy": entropy}


def _reverse_prompt_kl(weight: float, logits: Tensor, student: Tensor, *plain: Tensor) -> tuple[Tensor, Metrics]:
    """KL(p || q) + λ KL(p || p0): d/dz = p (g - Σ p g), g = (1 + λ) log p - log q - λ log p0."""
    log_p, g = logits.log_softmax(-1), student.log_softmax(-1)
    p = torch.exp(log_p, out=logits)
    torch.sub(log_p, g, out=g)
    values = to_student = (p * g).sum(-1)
    metrics = {"to_student": to_student}
    if plain:
        away = log_p.sub_(plain[0].log_softmax(-1))
        metrics["to_plain"] = (p * away).sum(-1)
        values = to_student + weight * metrics["to_plain"]
        g.add_(away, alpha=weight)
    p.mul_(g.sub_(values[:, None]))
    return values, metrics


def _entropy(q: Tensor, log_q: Tensor) -> Tensor:
    return -torch.where(log_q == -torch.inf, 0.0, q * log_q).sum(-1)


PLAIN_KERNELS = Kernels(
    _reverse_kl, _forward_kl, _cross_entropy, lambda weight: partial(_reverse_prompt_kl, weight), _on_policy
)
"""In a few operations of torch, on any device."""
