"""Losses from hidden states and heads, a chunk of tokens at a time, so that no tensor of shape (N, V) is ever made.

The gradient of a chunk's logits is passed on to the hidden states and the head at once, and backward only multiplies.
Logits, divergences and sums are float32 or wider, also under autocast.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptkd.engine.backbone import matmul_dtype
from promptkd.engine.heads import Head, HeadBackend, Projection
from promptkd.engine.resolve import engine_for
from promptkd.objectives.coarse import coarse_kernel
from promptkd.objectives.divergences import Direction, shared_log_probs
from promptkd.objectives.kernels import (
    Kernel,
    Kernels,
    Metrics,
    Objective,
    accuracy_kernel,
    objective_kernel,
    prompt_kernel,
)
from promptkd.objectives.response_kernels import (
    Skew,
    on_policy_kernel,
    skew_kernel,
    weighted_kernel,
    weighted_kl_kernel,
)

HiddenAndHead = tuple[Tensor, Head]
"""Hidden states (N, H) of N tokens, and the head that projects them to logits (N, V)."""


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss summed over tokens, and metrics computed along with it."""

    total: Tensor  # scalar, with a gradient
    metrics: dict[str, Tensor]  # scalar sums over tokens, without a gradient

    @property
    def figures(self) -> dict[str, Tensor]:
        """The old name of `metrics`."""
        warnings.warn("`ChunkedLoss.figures` is now `ChunkedLoss.metrics`.", FutureWarning, stacklevel=2)
        return self.metrics


def chunked_objective(
    objective: Objective, student: HiddenAndHead, teacher: HiddenAndHead, *, chunk: int | None = None
) -> ChunkedLoss:
    """Sum over tokens of `objective(student_logits, teacher_logits)`, with the student's metric "entropy", in nats, and
    "top_overlap", the number of tokens at which both models have the same most probable token.

    Args:
        objective: any function of `promptkd.objectives` on two logit tensors, or one of your own.
        student: receives gradients. The teacher is constant.
        chunk: most tokens at a time; None for what suits the device, here and below.
    """
    absent = _have_absent(student, teacher)
    return _chunked(objective_kernel(objective, _kernels(student), absent_tokens=absent), student, [teacher], chunk)


def chunked_coarse(
    objective: Objective, student: HiddenAndHead, ids: Tensor, log_probs: Tensor, *, chunk: int | None = None
) -> ChunkedLoss:
    """`chunked_objective` on K + 1 outcomes: the teacher is its `log_probs` (N, K + 1) of the tokens `ids` (N, K) and,
    last, of all others together (`objectives.coarse`)."""
    return _chunked(coarse_kernel(objective), student, [ids, log_probs], chunk)


def chunked_cross_entropy(
    student: HiddenAndHead, labels: Tensor, *, accuracy: bool = False, chunk: int | None = None
) -> ChunkedLoss:
    """Sum over tokens of -log q(y) for the tokens y in `labels`, (N,), with the metric "entropy".

    With `accuracy`, "correct" is the number of tokens y that are the most probable. All else as in `chunked_objective`.
    """
    kernel = _kernels(student).cross_entropy
    return _chunked(accuracy_kernel(kernel) if accuracy else kernel, student, [labels], chunk)


def chunked_on_policy_gradient(
    student: HiddenAndHead, teacher: HiddenAndHead, labels: Tensor, *, chunk: int | None = None
) -> ChunkedLoss:
    """Sum over tokens of `on_policy_gradient` for the sampled tokens in `labels`, (N,).

    Of the teacher, only log-sum-exps are computed. Beside the metrics of `chunked_objective`, "sampled_kl" is the sum
    of log q - log p of the sampled tokens. All else as in `chunked_objective`.
    """
    kernel = on_policy_kernel(_kernels(student), absent_tokens=_have_absent(student, teacher))
    return _chunked(kernel, student, [labels, teacher], chunk)


def chunked_skew_kl(
    skew: Skew,
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    *,
    alpha: Tensor,
    weight: Tensor,
    chunk: int | None = None,
) -> ChunkedLoss:
    """Sum over tokens of weight · `skew_forward_kl`, or of `skew_reverse_kl` with a constant mixture.

    Args:
        alpha, weight: constants of each token, (N,). All else as in `chunked_objective`; the metrics are not weighted.
    """
    kernel = skew_kernel(skew, absent_tokens=_have_absent(student, teacher))
    return _chunked(kernel, student, [teacher, alpha, weight], chunk)


def chunked_weighted(
    student: HiddenAndHead,
    labels: Tensor,
    weight: Tensor,
    teacher: HiddenAndHead | None = None,
    kl_weight: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> ChunkedLoss:
    """Sum over tokens of weight · log q(y) + kl_weight · `reverse_kl` for the tokens y in `labels`, (N,).

    Args:
        weight, kl_weight: constants of each token, (N,). All else as in `chunked_objective`; the metrics are not
            weighted. Without a teacher there is no second term and no "top_overlap".
    """
    if teacher is None or kl_weight is None:
        return _chunked(weighted_kernel(_kernels(student)), student, [labels, weight], chunk)
    kernel = weighted_kl_kernel(_kernels(student), absent_tokens=_have_absent(student, teacher))
    return _chunked(kernel, student, [labels, weight, kl_weight, teacher], chunk)


@torch.no_grad()
def chunked_log_probs(
    student: HiddenAndHead, teacher: HiddenAndHead, labels: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens in `labels`, (N,), under student and teacher, (N,) each, without a graph."""
    backend = engine_for(labels.device).head
    projections = [backend.projection(head, matmul_dtype(head.weight)) for _, head in (student, teacher)]
    found = [torch.zeros(2, 0, dtype=student[1].logits_dtype, device=labels.device)]
    with torch.autocast(labels.device.type, enabled=False):
        for start in range(0, len(labels), chunk or backend.chunk):
            part = slice(start, start + (chunk or backend.chunk))
            models = zip(projections, (student, teacher), strict=True)
            logits = [projection.logits(hidden[part]) for projection, (hidden, _) in models]
            for *block, places in _blocks(backend, *logits, labels[part, None]):
                found.append(torch.cat([each.gather(-1, places) for each in shared_log_probs(*block)], dim=-1).T)
    log_q, log_p = torch.cat(found, dim=-1)
    return log_q, log_p


def chunked_prompt_loss(
    prompted: HiddenAndHead,
    student: HiddenAndHead,
    plain: HiddenAndHead | None,
    *,
    weight: float,
    chunk: int | None = None,
    student_direction: Direction = "reverse",
    plain_direction: Direction = "reverse",
) -> ChunkedLoss:
    """Sum over tokens of `prompt_loss`, with its unweighted terms as metrics: "to_student" and "to_plain".

    Args:
        prompted: the teacher with its adapter; receives gradients. The others are constant.
        plain: the teacher without its adapter; None only with a weight of 0.
        weight, student_direction, plain_direction: see `prompt_loss`.
    """
    if plain is None and weight != 0:
        raise ValueError(f"`plain` may be left out only with a weight of 0. Got {weight}.")
    targets = [student] if plain is None else [student, plain]
    absent = _have_absent(prompted, *targets)
    directions: dict[str, Direction] = {"student_direction": student_direction, "plain_direction": plain_direction}
    kernel = prompt_kernel(weight, _kernels(prompted), absent_tokens=absent, **directions)
    return _chunked(kernel, prompted, targets, chunk)


def _have_absent(*models: HiddenAndHead) -> bool:
    return any(head.has_absent_tokens for _, head in models)


def _kernels(trained: HiddenAndHead) -> Kernels:
    return engine_for(trained[0].device).head.kernels(trained[1].logits_dtype)


def _chunked(
    kernel: Kernel, trained: HiddenAndHead, targets: Sequence[HiddenAndHead | Tensor], chunk: int | None
) -> ChunkedLoss:
    """`targets`: constant models, or labels or coefficients (N,)."""
    hidden, head = trained
    backend = engine_for(hidden.device).head
    counts = [len(hidden), *(len(each if isinstance(each, Tensor) else each[0]) for each in targets)]
    if len(set(counts)) > 1:
        raise ValueError(f"Every model must give one state per token. Got {', '.join(map(str, counts))} states.")
    metrics: Metrics = {}

    def project(head: Head) -> Projection:
        return backend.projection(head, matmul_dtype(head.weight))

    # here, since autocast is off within the sum
    projection = project(head)
    sources = [each if isinstance(each, Tensor) else (each[0], project(each[1])) for each in targets]

    def chunk_loss(part: slice, logits: Tensor) -> Tensor:
        """The sum of the kernel's values over a chunk. Its gradient with respect to W h + b overwrites `logits`."""
        total = logits.new_zeros(())
        others = (each[part] if isinstance(each, Tensor) else each[1].logits(each[0][part]) for each in sources)
        for block, *beside in _blocks(backend, logits, *others):
            derivative = head.derivative(block)
            beside = [each.to(block.dtype) if each.is_floating_point() else each for each in beside]
            values, of_block = kernel(block, *beside)
            if head.masked is not None:  # exactly, whatever the objective makes of equal logits
                block.index_fill_(-1, head.masked, 0.0)
            if head.softcap is not None or head.scale != 1.0:
                block.mul_(derivative)
            total += values.sum()
            for name, value in of_block.items():
                metrics[name] = metrics.get(name, 0) + value.sum()
        return total

    total = _ChunkedSum.apply(hidden, head.weight, head.bias, projection, chunk_loss, chunk or backend.chunk)
    return ChunkedLoss(total, metrics)


def _blocks(backend: HeadBackend, logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Logits (C, V) and what belongs to the same tokens, as many tokens at a time as suits the device."""
    rows = len(logits) if backend.block is None else max(1, backend.block // logits.shape[1])
    return zip(*(each.split(rows) for each in (logits, *others)), strict=True)


class _ChunkedSum(torch.autograd.Function):
    """The sum of a loss over all chunks, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *job: Any) -> Tensor:
        projection, chunk_loss, chunk = job
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        size, wide = projection.head.vocabulary_size, projection.head.logits_dtype
        total = hidden.new_zeros((), dtype=wide)
        to_hidden = torch.empty_like(hidden) if needs_hidden else None
        to_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        # zeros for padding columns, and without any tokens: other processes wait for a gradient
        has_zeros = size < len(weight) or len(hidden) == 0
        to_weight = torch.zeros_like(weight, dtype=wide) if needs_weight and has_zeros else None
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), chunk):
                part = slice(first, first + chunk)
                logits = projection.logits(hidden[part])
                total += chunk_loss(part, logits)
                gradient = projection.prepare(logits)
                if to_hidden is not None:
                    to_hidden[part] = projection.hidden_gradient(gradient)
                if needs_weight:
                    earlier = None if to_weight is None else to_weight[:size]
                    added = projection.add_weight_gradient(earlier, gradient, hidden[part])
                    to_weight = added if to_weight is None else to_weight  # else it was added in place
                if to_bias is not None:
                    to_bias[:size] += logits.sum(0)
                del logits, gradient  # before the next chunk's are made
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        to_bias = None if to_bias is None or bias is None else to_bias.to(bias.dtype)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # multiplied in float32 or wider: in bfloat16, a factor such as 1 / tokens is off by up to 0.2 %
        gradients = [
            None if each is None else (each.to(upstream.dtype) * upstream).to(each.dtype) for each in ctx.saved_tensors
        ]
        return *gradients, None, None, None
