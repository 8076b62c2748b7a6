"""Objectives from hidden states and heads, a chunk of tokens at a time.

A loss over N tokens and a vocabulary of V needs tensors of shape (N, V) if written plainly, several of them. Here a
chunk of tokens is projected, its loss and the gradient with respect to its logits are computed, and the gradient goes
on to the hidden states and the head at once; no tensor of shape (N, V) is ever made, and backward only multiplies. The
values are those of the plain objectives, which stay the reference (tests/engine/test_chunked_loss.py).

Logits, divergences and sums are float32 or wider, also under autocast. The gradient takes the place of the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptkd.engine.backbone import computing_with
from promptkd.engine.heads import Head, HeadProducts, Projection
from promptkd.engine.resolve import engine_for
from promptkd.objectives.kernels import Kernel, Objective, objective_kernel, prompt_kernel
from promptkd.objectives.prompt import Direction

__all__ = ["ChunkedLoss", "chunked_cross_entropy", "chunked_objective", "chunked_prompt_loss"]


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
    chunk: int | None = None,
) -> ChunkedLoss:
    """Sum over tokens of `objective(student_logits, teacher_logits)`.

    Args:
        objective: any of `promptkd.objectives`, or one's own, on logits.
        student_hidden: (N, H_s). It and the student's head receive gradients.
        teacher_hidden: (N, H_t), constant.
        chunk: most tokens at a time; None for what suits the device.

    Returns:
        The sum, and the figure "entropy" of the student over the columns that both have, summed, in nats.

    Raises:
        ValueError: for differing numbers of tokens.
    """
    products = engine_for(student_hidden.device).head
    absent = student_head.has_absent_tokens or teacher_head.has_absent_tokens
    kernel = objective_kernel(objective, products.kernels(student_head.wide), absent_tokens=absent)
    return _run(products, kernel, (student_hidden, student_head), [(teacher_hidden, teacher_head)], chunk)


def chunked_cross_entropy(
    student_hidden: Tensor, student_head: Head, labels: Tensor, *, chunk: int | None = None
) -> ChunkedLoss:
    """Sum over tokens of -log q(y), with the student's entropy as a figure.

    Args:
        student_hidden: (N, H_s). It and the student's head receive gradients.
        labels: (N,) the tokens y.
        chunk: most tokens at a time; None for what suits the device.
    """
    products = engine_for(student_hidden.device).head
    kernel = products.kernels(student_head.wide).cross_entropy
    return _run(products, kernel, (student_hidden, student_head), [(labels, None)], chunk)


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
    chunk: int | None = None,
) -> ChunkedLoss:
    """Sum over tokens of `prompt_loss`; only `prompted_hidden` (and a teacher's head that is trained) gets a gradient.

    Args:
        prompted_hidden, plain_hidden: (N, H_t) of the teacher with its adapter and without.
        student_hidden: (N, H_s).
        chunk: most tokens at a time; None for what suits the device.

    Returns:
        The sum, and its two terms "to_student" and (with `plain_hidden`) "to_plain", summed, unweighted.

    Raises:
        ValueError: for a weight without `plain_hidden`, or differing numbers of tokens.
    """
    if plain_hidden is None and weight != 0:
        raise ValueError(f"`plain_hidden` may be left out only with a weight of 0. Got {weight}.")
    products = engine_for(prompted_hidden.device).head
    targets = [(student_hidden, student_head)]
    if plain_hidden is not None:
        targets.append((plain_hidden, plain_head))
    absent = any(head.has_absent_tokens for head in (prompted_head, student_head, plain_head))
    kernels = products.kernels(prompted_head.wide)
    kernel = prompt_kernel(weight, student_direction, plain_direction, kernels, absent_tokens=absent)
    return _run(products, kernel, (prompted_hidden, prompted_head), targets, chunk)


def _run(
    products: HeadProducts,
    kernel: Kernel,
    learner: tuple[Tensor, Head],
    targets: Sequence[tuple[Tensor, Head | None]],
    chunk: int | None,
) -> ChunkedLoss:
    """Args: targets: hidden states with their heads, or labels (N,) with None."""
    hidden, head = learner
    tokens = [len(each) for each, _ in (learner, *targets)]
    if len(set(tokens)) > 1:
        raise ValueError(f"Every model must give one state per token. Got {', '.join(map(str, tokens))} states.")
    figures: dict[str, Tensor] = {}
    computing = computing_with(head.weight)  # before autocast is off
    sources = [_source(products, *each) for each in targets]
    step = _Step(products, kernel, head, computing, sources, chunk or products.chunk, figures)
    return ChunkedLoss(_Chunked.apply(hidden, head.weight, head.bias, step), figures)


Source = Callable[[slice], Tensor]
"""A chunk of tokens to its logits (C, V), or labels (C,)."""


def _source(products: HeadProducts, values: Tensor, head: Head | None) -> Source:
    """Of hidden states (N, H) with their head, or of labels (N,) with None."""
    if head is None:
        return values.__getitem__
    projection = products.projection(head, computing_with(head.weight), reuse=True)
    return lambda part: projection.logits(values[part])


@dataclass(frozen=True)
class _Step:
    """What does not take part in autograd."""

    products: HeadProducts
    kernel: Kernel
    head: Head
    computing: torch.dtype
    targets: Sequence[Source]
    chunk: int
    figures: dict[str, Tensor]


class _Chunked(torch.autograd.Function):
    """The sum of a kernel over all chunks; its gradients are computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, step: _Step) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _Gradients(step.head, hidden, needs_hidden, needs_weight, needs_bias)
            learner = step.products.projection(step.head, step.computing, reuse=True)
            total = hidden.new_zeros((), dtype=step.head.wide)
            for first in range(0, len(hidden), step.chunk):
                part = slice(first, first + step.chunk)
                logits = learner.logits(hidden[part])
                others = [target(part) for target in step.targets]
                total += _chunk_loss(step, logits, others)  # `logits` becomes the gradient
                gradients.add(learner, logits, hidden, part)
                del logits, others  # before the next ones are there
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [_times(each, upstream) for each in ctx.saved_tensors]
        return (*gradients, None)


def _times(gradient: Tensor | None, upstream: Tensor) -> Tensor | None:
    """In float32 or wider: rounded to bfloat16, a factor such as 1 / tokens is off by up to 0.2 %."""
    return None if gradient is None else (gradient.to(upstream.dtype) * upstream).to(gradient.dtype)


class _Gradients:
    """With respect to hidden states, the head's weight and its bias, as far as they are needed, summed over chunks."""

    def __init__(self, head: Head, hidden: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool):
        self._head, self._needs_weight = head, needs_weight
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self._bias = torch.zeros_like(head.bias, dtype=head.wide) if needs_bias and head.bias is not None else None
        self._sum: Tensor | None = None  # of the weight's, over the columns that stand for tokens
        self._whole: Tensor | None = None
        if needs_weight and head.vocabulary < len(head.weight):
            self._whole = torch.zeros_like(head.weight, dtype=head.wide)
            self._sum = self._whole[: head.vocabulary]

    def add(self, projection: Projection, gradient: Tensor, hidden: Tensor, part: slice) -> None:
        """`gradient`: (C, V) with respect to W h + b, of a chunk."""
        prepared = projection.prepared(gradient)
        if self.hidden is not None:
            self.hidden[part] = projection.to_hidden(prepared)
        if self._needs_weight:
            self._sum = projection.add_to_weight(self._sum, prepared, hidden[part])
        if self._bias is not None:
            self._bias[: self._head.vocabulary] += gradient.sum(0)

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None or self._head.bias is None else self._bias.to(self._head.bias.dtype)

    @property
    def weight(self) -> Tensor | None:
        weight, total = self._head.weight, self._sum if self._whole is None else self._whole
        if total is None:  # without tokens there is a gradient too: processes that train together wait for it
            return torch.zeros_like(weight) if self._needs_weight else None
        return total.to(weight.dtype)


def _chunk_loss(step: _Step, logits: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """The sum of the kernel's values over a chunk; `logits` become its gradient with respect to W h + b."""
    total = logits.new_zeros(())
    rows = step.products.block_rows(logits.shape[1]) or len(logits)
    for block, *others in zip(*(each.split(rows) for each in (logits, *targets)), strict=True):
        slope = step.head.slope(block)
        values, seen = step.kernel(block, *(_as_wide(each, block.dtype) for each in others))
        if step.head.softcap is not None or step.head.scale != 1.0:
            block.mul_(slope)
        total += values.sum()
        for name, value in seen.items():
            step.figures[name] = step.figures.get(name, 0) + value.sum()
    return total


def _as_wide(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in the precision of the learner's; labels as they are."""
    return target.to(dtype) if target.is_floating_point() else target
