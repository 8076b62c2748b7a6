"""Divergences between a student q and a teacher p, token by token, and the loss that tunes the soft prompt by them.

A divergence takes two logit tensors of shape (..., V), the student's first, and returns one value per position, shape
(...), in nats, computed in float32 or wider. Shifting, masking and averaging happen elsewhere.

A logit of -inf marks a column that does not exist for that model, as in a head padded to a round size. Such a column is
removed from both distributions, as if it were sliced off.
"""

import math
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]
Schedule = Literal["linear", "constant", "none"]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p - log q): the teacher is the target, the student covers its modes.

    The distillation loss of Hinton et al. 2015 less the teacher's entropy, so that equal inputs give 0.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    return kl_from_log_probs(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(q || p) = Σ q (log q - log p): the student seeks a mode of the teacher (PromptKD eq. 4, MiniLLM)."""
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    return kl_from_log_probs(log_q, log_p)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *, beta: float) -> Tensor:
    """β KL(p || m) + (1 - β) KL(q || m), m = β p + (1 - β) q; forward KL at β = 0, reverse KL at β = 1.

    The generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2024, eq. 1) with TRL's meaning of β. The formula
    itself is 0 at both ends; as in TRL, the ends give the KL to which it is proportional nearby.
    """
    check_unit_interval("beta", beta)
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl_from_log_probs(log_p, log_m) + (1 - beta) * kl_from_log_probs(log_q, log_m)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float | Tensor) -> Tensor:
    """KL(p || α p + (1 - α) q): forward KL at α = 0, 0 at α = 1 (DistiLLM, Ko et al. 2024, eq. 4).

    `alpha` is one number, or one for each position, (...).
    """
    check_unit_interval("alpha", alpha)
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return 0.0 * log_q.exp().sum(-1)  # a zero with the student's graph, for backward
    return kl_from_log_probs(log_p, log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float | Tensor, constant_mixture: bool = False
) -> Tensor:
    """KL(q || (1 - α) p + α q): reverse KL at α = 0, 0 at α = 1 (DistiLLM, Ko et al. 2024, section 3.1).

    Args:
        alpha: one number, or one for each position, (...).
        constant_mixture: no gradient through the mixture's q, as in DistiLLM-2's code. The value is the same.
    """
    check_unit_interval("alpha", alpha)
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    mixed = log_q.detach() if constant_mixture else log_q
    return kl_from_log_probs(log_q, log_mixture(mixed, log_p, alpha))


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½ Σ |p - q|, between 0 and 1."""
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, mu: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = g_head / (g_head + g_tail) (AKL, Wu et al. 2024, eq. 12).

    The head is the smallest set of the teacher's most probable tokens whose mass reaches μ, the token that crosses μ
    included; the tail is the rest. Among equal probabilities the lower token id counts as more probable. g sums
    |p - q| over its part. The weights are constants for the gradient. w is ½ where p equals q, and 1 at μ = 1.
    """
    check_unit_interval("mu", mu)
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        head = sorted_p.cumsum(-1) - sorted_p < mu  # mass before the token is still short of μ
        head |= mu == 1  # where rounding lets the mass reach 1 before the last token
        gap = (sorted_p - q.gather(-1, order)).abs()
        g_head, g_all = (gap * head).sum(-1), gap.sum(-1)
        weight = torch.where(g_all > 0, g_head / g_all.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)
    return weight * kl_from_log_probs(log_p, log_q) + (1 - weight) * kl_from_log_probs(log_q, log_p)


def prompt_loss(
    prompted_logits: Tensor,
    student_logits: Tensor,
    plain_logits: Tensor | None,
    *,
    weight: float,
    student_direction: Direction = "reverse",
    plain_direction: Direction = "reverse",
) -> Tensor:
    """KL(p_P || q) + λ KL(p_P || p): p_P prompted teacher, q student, p plain teacher, λ = `weight` (eqs. 2 and 3).

    Only p_P receives a gradient. The direction "forward" swaps the arguments of its term: KL(q || p_P), KL(p || p_P).
    The names follow the authors' scripts, where the prompted teacher is the model that is trained.

    Args:
        weight: λ_k of the step, see `regularizer_weight`. With 0, `plain_logits` may be None.

    Raises:
        ValueError: for a weight without `plain_logits`, differing shapes, or an unknown direction.
    """
    if plain_logits is None and weight != 0:
        raise ValueError(f"`plain_logits` may be left out only with a weight of 0. Got {weight}.")
    directions: dict[str, Direction] = {"student_direction": student_direction, "plain_direction": plain_direction}
    to_student, to_plain = prompt_loss_terms(prompted_logits, student_logits, plain_logits, **directions)
    return to_student if to_plain is None or weight == 0 else to_student + weight * to_plain


def prompt_loss_terms(
    prompted_logits: Tensor,
    student_logits: Tensor,
    plain_logits: Tensor | None,
    *,
    student_direction: Direction = "reverse",
    plain_direction: Direction = "reverse",
) -> tuple[Tensor, Tensor | None]:
    """The two unweighted terms of `prompt_loss`; the second is None without `plain_logits`."""
    to_student = _directed_kl(prompted_logits, student_logits, student_direction)
    return to_student, None if plain_logits is None else _directed_kl(prompted_logits, plain_logits, plain_direction)


def _directed_kl(logits: Tensor, target_logits: Tensor, direction: Direction) -> Tensor:
    log_p, log_target = shared_log_probs(logits, target_logits.detach())
    if direction == "reverse":
        return kl_from_log_probs(log_p, log_target)
    if direction == "forward":
        return kl_from_log_probs(log_target, log_p)
    raise ValueError(f'A KL direction must be "reverse" or "forward". Got {direction!r}.')


def regularizer_weight(
    step: int, total_steps: int, *, coefficient: float = 1.0, schedule: Schedule = "linear"
) -> float:
    """λ_k: c (1 - k / K) for "linear", c for "constant", 0 for "none"; k counts optimizer steps from 0 to K - 1.

    "linear" begins at c and ends at c / K (PromptKD section 3.2).

    Raises:
        ValueError: if k lies outside 0 … K - 1 or the schedule is unknown.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"The step must lie in 0 … {total_steps - 1} (total_steps - 1). Got {step}.")
    shares = {"linear": 1 - step / total_steps, "constant": 1.0, "none": 0.0}
    if schedule not in shares:
        raise ValueError(f'The schedule must be "linear", "constant" or "none". Got {schedule!r}.')
    return coefficient * shares[schedule]


def shared_log_probs(*logits: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities, float32 or wider, over the columns that exist for every one of the models.

    Raises:
        ValueError: if the shapes differ.
    """
    shapes = [str(tuple(each.shape)) for each in logits]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"Student and teacher logits must have one shape (..., V). Got {', '.join(shapes)}. "
            "Slice padded heads to the shared vocabulary."
        )
    dtype = reduce(torch.promote_types, (each.dtype for each in logits), torch.float32)
    if torch.stack([each.detach().amin(-1) == -math.inf for each in logits]).any():
        missing = torch.stack([each.detach() == -math.inf for each in logits]).any(0)
        logits = tuple(each.masked_fill(missing, -math.inf) for each in logits)
    return tuple(each.to(dtype).log_softmax(-1) for each in logits)


def kl_from_log_probs(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = Σ a (log a - log b) from log-probabilities of shape (..., V); columns absent from both count 0."""
    difference = torch.where(log_a == -math.inf, 0.0, log_a - log_b)
    return (log_a.exp() * difference).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, share: float | Tensor) -> Tensor:
    """log(share a + (1 - share) b), exactly log a where a equals b; a tensor has one share for each position, (...)."""
    if isinstance(share, Tensor):
        of_a, of_b = share[..., None].to(log_a.dtype), 1 - share[..., None].to(log_a.dtype)
    elif share in (0, 1):
        return log_a if share else log_b
    else:
        of_a, of_b = log_a.new_tensor(share), log_a.new_tensor(1 - share)
    a_is_larger = log_a >= log_b
    larger, smaller = torch.where(a_is_larger, log_a, log_b), torch.where(a_is_larger, log_b, log_a)
    of_larger, of_smaller = torch.where(a_is_larger, of_a, of_b), torch.where(a_is_larger, of_b, of_a)
    gap = torch.where(larger == -math.inf, 0.0, smaller - larger)
    only_smaller = of_larger == 0  # its logarithm is known, and its exponential may be 0
    factor = torch.where(only_smaller, 1.0, of_larger + of_smaller * gap.exp())
    return larger + torch.where(only_smaller, gap, factor.log())


def check_unit_interval(name: str, value: float | Tensor) -> None:
    if not (bool(((value >= 0) & (value <= 1)).all()) if isinstance(value, Tensor) else 0 <= value <= 1):
        raise ValueError(f"`{name}` must lie in [0, 1]. Got {value}.")
