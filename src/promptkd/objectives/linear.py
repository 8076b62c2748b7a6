"""Objectives from hidden states and heads, a few hundred tokens at a time.

A loss over N tokens and V words needs tensors of shape (N, V) if written plainly, several of them. Here a chunk of
tokens is projected, its loss and the gradient with respect to its logits are computed, and the gradient goes on to the
hidden states and the head at once; no tensor of shape (N, V) is ever made, and backward only multiplies. The
values are those of the plain objectives, which stay the reference (tests/test_linear.py).

Matrix products want many tokens at a time, what is done word by word wants few: a chunk is projected as a whole, into
buffers that are used again, and its rows then go through the divergence (kernels.py) in blocks that stay in the
processor's cache. The gradient takes the place of the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from promptkd.objectives.kernels import Kernel, Objective, cross_entropy_kernel, objective_kernel, prompt_kernel
from promptkd.objectives.prompt import Direction

__all__ = ["ChunkedLoss", "Head", "chunked_cross_entropy", "chunked_objective", "chunked_prompt_loss"]

_BLOCK = 2**19  # logits that a kernel sees at a time on CPU: 2 MiB in float32, for its few temporaries to stay in cache


@dataclass(frozen=True)
class Head:
    """A linear head: softcap · tanh(scale · (W h + b) / softcap), of the first `vocabulary` words."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    softcap: float | None = None
    onednn: bool = False
    """Whether oneDNN projects full chunks of tokens, a quarter faster on CPU. It keeps a program for every number of
    tokens that it meets, so no others go there. For float32 alone."""

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(C, H) to (C, V), written into `out` if that is given."""
        if out is None:
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        elif self.bias is None:
            logits = torch.mm(hidden, self.weight.T, out=out)
        else:
            logits = torch.addmm(self.bias, hidden, self.weight.T, out=out)
        if self.scale != 1.0:
            logits = torch.mul(logits, self.scale, out=out)
        if self.softcap is None:
            return logits
        return torch.mul(torch.tanh(torch.div(logits, self.softcap, out=out), out=out), self.softcap, out=out)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to W h + b, from the logits."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap) ** 2) * self.scale

    @property
    def has_absent_words(self) -> bool:
        """Whether a bias of -inf takes words away."""
        return self.bias is not None and bool((self.bias == -torch.inf).any())

    def sliced(self, vocabulary: int) -> "Head":
        """The same head with its first `vocabulary` columns."""
        if vocabulary == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)


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
    kept_logits: list[Tensor] | None = None,
) -> ChunkedLoss:
    """Sum over tokens of `objective(student_logits, teacher_logits)`.

    Args:
        objective: any of `promptkd.objectives`, or one's own, on logits.
        student_hidden: (N, H_s). It and the student's head receive gradients.
        teacher_hidden: (N, H_t), constant.
        chunk: most tokens at a time.
        kept_logits: the student's logits as `chunked_prompt_loss` kept them, used up here; None projects anew.

    Returns:
        The sum, and the figure "entropy" of the student over the columns that both have, summed, in nats.

    Raises:
        ValueError: for differing numbers of tokens.
    """
    absent = student_head.has_absent_words or teacher_head.has_absent_words
    kernel = objective_kernel(objective, absent_words=absent)
    student = _Source(student_hidden, student_head, read=kept_logits)
    return _run(kernel, student, [_Source(teacher_hidden, teacher_head)], chunk)


def chunked_cross_entropy(
    student_hidden: Tensor, student_head: Head, labels: Tensor, *, chunk: int = 256
) -> ChunkedLoss:
    """Sum over tokens of -log q(y), with the student's entropy as a figure.

    Args:
        student_hidden: (N, H_s). It and the student's head receive gradients.
        labels: (N,) the tokens y.
        chunk: most tokens at a time.
    """
    return _run(cross_entropy_kernel, _Source(student_hidden, student_head), [_Given(labels)], chunk)


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
    kept_logits: list[Tensor] | None = None,
) -> ChunkedLoss:
    """Sum over tokens of `prompt_loss`; only `prompted_hidden` (and a teacher's head that is trained) gets a gradient.

    Args:
        prompted_hidden, plain_hidden: (N, H_t) of the teacher with its adapter and without.
        student_hidden: (N, H_s).
        kept_logits: a list to which the student's logits are added, chunk by chunk, for `chunked_objective`.

    Returns:
        The sum, and its two terms "to_student" and (with `plain_hidden`) "to_plain", summed, unweighted.

    Raises:
        ValueError: for a weight without `plain_hidden`, or differing numbers of tokens.
    """
    if plain_hidden is None and weight != 0:
        raise ValueError(f"`plain_hidden` may be left out only with a weight of 0. Got {weight}.")
    targets = [_Source(student_hidden, student_head, kept=kept_logits)]
    if plain_hidden is not None:
        targets.append(_Source(plain_hidden, plain_head))
    absent = any(head.has_absent_words for head in (prompted_head, student_head, plain_head))
    kernel = prompt_kernel(weight, student_direction, plain_direction, absent_words=absent)
    return _run(kernel, _Source(prompted_hidden, prompted_head), targets, chunk)


class _Source:
    """Logits of one model, a chunk of tokens at a time.

    On CPU those that torch projects stand in one buffer, since fresh memory costs about as much there as the arithmetic
    on it; oneDNN takes its own, and is faster even so.

    Args:
        hidden: (N, H).
        kept: a list that gets every chunk to keep.
        read: a list of chunks that were kept, which takes the place of the head.
    """

    def __init__(
        self, hidden: Tensor, head: Head, *, kept: list[Tensor] | None = None, read: list[Tensor] | None = None
    ):
        self.hidden, self.head, self._kept, self._read = hidden, head, kept, read
        self._buffer: Tensor | None = None

    def sizes(self, chunk: int) -> list[int]:
        """Tokens of each chunk: those of the kept logits, else `chunk` as often as that goes, and the rest."""
        if self._read is not None:
            return [len(each) for each in self._read]
        return [len(part) for part in self.hidden.split(chunk)]

    def logits(self, part: slice, chunk: int) -> Tensor:
        """(C, V), the caller's to write over unless they are kept."""
        if self._read is not None:
            return self._read.pop(0)
        hidden = self.hidden[part]
        if self._kept is None:
            return self._projected(hidden, chunk)
        self._kept.append(self._projected(hidden, chunk))
        return self._kept[-1]

    def _projected(self, hidden: Tensor, chunk: int) -> Tensor:
        head = self.head
        if head.onednn and len(hidden) == chunk and head.scale == 1.0 and head.softcap is None:
            return torch.ops.mkldnn._linear_pointwise(hidden, head.weight, head.bias, "none", [], "")
        if (
            self._kept is not None
            or hidden.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or hidden.dtype != self.head.weight.dtype
        ):
            return self.head.logits(hidden)
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = hidden.new_empty(len(hidden), self.head.weight.shape[0])
        return self.head.logits(hidden, out=self._buffer[: len(hidden)])


class _Given:
    """Values a token, (N,), that a kernel takes as they are."""

    def __init__(self, values: Tensor):
        self.hidden = values

    def logits(self, part: slice, chunk: int) -> Tensor:
        return self.hidden[part]


def _run(kernel: Kernel, learner: _Source, targets: Sequence[_Source | _Given], chunk: int) -> ChunkedLoss:
    tokens = [each.hidden.shape[0] for each in (learner, *targets)]
    if len(set(tokens)) > 1:
        raise ValueError(f"Every model must give one state a token. Got {', '.join(map(str, tokens))} states.")
    figures: dict[str, Tensor] = {}
    head = learner.head
    total = _Chunked.apply(learner.hidden, head.weight, head.bias, learner, targets, kernel, chunk, figures)
    return ChunkedLoss(total, figures)


class _Chunked(torch.autograd.Function):
    """The sum of a kernel over all chunks; its gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        learner: _Source,
        targets: Sequence[_Source | _Given],
        kernel: Kernel,
        chunk: int,
        figures: dict[str, Tensor],
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient: Tensor | None = None
        bias_gradient = torch.zeros_like(bias) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.promote_types(torch.float32, hidden.dtype), device=hidden.device)
        first = 0
        for size in learner.sizes(chunk):
            part = slice(first, first + size)
            first += size
            logits, *others = (each.logits(part, chunk) for each in (learner, *targets))
            total += _chunk_loss(kernel, learner.head, logits, others, figures)  # `logits` becomes the gradient
            if hidden_gradient is not None:
                hidden_gradient[part] = logits @ weight.to(logits.dtype)
            if needs_weight:
                weight_gradient = _plus_product(weight_gradient, logits.T, hidden[part], weight.dtype)
            if bias_gradient is not None:
                bias_gradient += logits.sum(0)
            del logits, others  # before the next ones are there
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if each is None else each * upstream.to(each.dtype) for each in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, multiplied in the precision of `left`, held in `dtype`, and written over `total`."""
    if total is None:
        return (left @ right.to(left.dtype)).to(dtype)
    if total.dtype == left.dtype == right.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right.to(left.dtype))


def _chunk_loss(
    kernel: Kernel, head: Head, logits: Tensor, targets: Sequence[Tensor], figures: dict[str, Tensor]
) -> Tensor:
    """The sum of the kernel's values over a chunk; `logits` become its gradient with respect to W h + b."""
    total = logits.new_zeros((), dtype=torch.promote_types(torch.float32, logits.dtype))
    rows = max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for learned, *others in zip(*(each.split(rows) for each in (logits, *targets)), strict=True):
        block = learned.to(total.dtype)  # the block itself where it is wide already
        slope = head.slope(block)
        values, seen = kernel(block, *(each.to(total.dtype) if each.is_floating_point() else each for each in others))
        if head.softcap is not None or head.scale != 1.0:
            block.mul_(slope)
        if block.dtype != learned.dtype:
            learned.copy_(block)
        total += values.sum()
        for name, value in seen.items():
            figures[name] = figures.get(name, 0) + value.sum()
    return total
