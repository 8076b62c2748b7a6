"""The literal reference of objectives in Python floats, one token at a time, and what tests of objectives feed it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Row = list[float]
OfRow = Callable[[Row, Row], float]
Objective = Callable[[Tensor, Tensor], Tensor]


def loop_softmax(logits: Row) -> Row:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def loop_kl(a: Row, b: Row) -> float:
    total = 0.0
    for v in range(len(a)):
        if a[v] > 0:
            total += a[v] * math.log(a[v] / b[v])
    return total


def rows_of(student: Tensor, teacher: Tensor) -> list[tuple[Row, Row]]:
    """Both models' logits at every position, less the columns that are -inf for either."""
    columns = student.shape[-1]
    pairs = []
    for s, t in zip(student.double().reshape(-1, columns), teacher.double().reshape(-1, columns), strict=True):
        kept = [v for v in range(columns) if s[v] > -math.inf and t[v] > -math.inf]
        pairs.append(([float(s[v]) for v in kept], [float(t[v]) for v in kept]))
    return pairs


def loop(of_row: OfRow, student: Tensor, teacher: Tensor) -> Tensor:
    """`of_row(q, p)` of the probabilities at every position."""
    values = [of_row(loop_softmax(s), loop_softmax(t)) for s, t in rows_of(student, teacher)]
    return torch.tensor(values, dtype=torch.float64).reshape(student.shape[:-1])


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    return torch.autograd.grad(f(*leaves).sum(), leaves, materialize_grads=True)


def extreme_logits(dtype: torch.dtype = torch.float64, size: float = 80.0) -> tuple[Tensor, Tensor]:
    """Student and teacher: each sure of another token, sure of one, split between two, one of them uniform."""
    a = size
    student = torch.tensor([[a, -a, 0, 1], [-a, a, 0, 1], [a, a, -a, -a], [0, 0, 0, 0]], dtype=dtype)
    teacher = torch.tensor([[-a, a, 0, 1], [-a, a, 0, 1], [-a, a, a, -a], [a, -a, -a, -a]], dtype=dtype)
    return student, teacher
