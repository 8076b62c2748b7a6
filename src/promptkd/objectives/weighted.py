"""Divergences that weigh errors by their own measure, between forward and reverse KL or beside them.

Shapes, units and absent columns as in divergences.py: student q first, teacher p, logits (..., V) to values (...).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from promptkd.objectives.divergences import kl_from_log_probs, shared_log_probs

PairWeights = Literal["student", "teacher", "uniform"]

_NO_COEFFICIENT = 1e-8  # two coefficients this near to 0 count as 0: the value changes by as little
_NEVER = -1e9  # above the log probability of a column that is absent (-inf) or masked (-1e15 / temperature)
_SMALL_COEFFICIENT = 0.1  # below it the terms cancel so far that the sum is taken in float64


def alpha_beta(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float, beta: float) -> Tensor:
    """-1 / (αβ) Σ [p^α q^β - α / (α+β) p^(α+β) - β / (α+β) q^(α+β)] (ABKD, Wang et al. 2025).

    α = 1, β = 0 is the forward KL, α = 0, β = 1 the reverse KL. Where a denominator is 0 the formula's limit is taken:

    - β = 0: 1/α² Σ [p^α log(p^α / q^α) - p^α + q^α], and α = 0 the same with the models exchanged
    - α + β = 0: 1/α² Σ [log(q^α / p^α) + p^α / q^α - 1]
    - α = β = 0: ½ Σ (log p - log q)²

    With x = |log q - log p| and E(a) = (exp(-a x) - 1) / a, a token's term is max(p, q)^(α+β) / (α+β) times
    E(β) - E(α) + α E(α) E(β) where q is larger, and the same with α and β exchanged where p is. So nothing overflows
    while neither coefficient is below 0, and equal inputs give 0. With one below 0 the sum has no bound.
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"`alpha` and `beta` must be finite. Got {alpha} and {beta}.")
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    absent = log_q <= _NEVER
    log_q, log_p = log_q.masked_fill(absent, 0.0), log_p.masked_fill(absent, 0.0)  # equal: their terms are 0
    dtype, size = log_q.dtype, max(abs(alpha), abs(beta))
    if size < _SMALL_COEFFICIENT:
        log_q, log_p = log_q.double(), log_p.double()
    gap = log_q - log_p
    if size < _NO_COEFFICIENT:
        return (0.5 * gap.square()).sum(-1).to(dtype)
    total, distance, q_is_larger = alpha + beta, gap.abs(), gap >= 0
    of_alpha, of_beta = _decay(distance, alpha), _decay(distance, beta)
    if abs(total) >= size / 2:
        product, difference = of_alpha * of_beta, of_beta - of_alpha
        terms = torch.where(q_is_larger, alpha * product + difference, beta * product - difference) / total
    else:  # α and β are of about one size and of opposite signs
        of_total = _decay(distance, total)
        terms = torch.where(q_is_larger, (of_total - of_alpha) / beta, (of_total - of_beta) / alpha)
    return (torch.exp(total * torch.maximum(log_q, log_p)) * terms).sum(-1).to(dtype)


def _decay(distance: Tensor, rate: float) -> Tensor:
    """(exp(-a x) - 1) / a for x = `distance`, a = `rate`; -x at a = 0."""
    return -distance if rate == 0 else torch.expm1(-rate * distance) / rate


def entropy_aware_kl(student_logits: Tensor, teacher_logits: Tensor, *, threshold: float) -> Tensor:
    """KL(q || p) + [H(p) > τ] KL(p || q), τ = `threshold` in nats (EOPD, Jin et al. 2026).

    The forward KL comes in where the teacher itself is uncertain: at every token for τ < 0, at none for τ ≥ log V.
    """
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number. Got nan.")
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    with torch.no_grad():
        p_entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)
    forward = kl_from_log_probs(log_p, log_q)
    return kl_from_log_probs(log_q, log_p) + torch.where(p_entropy > threshold, forward, 0.0)


def todi(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ sg[w] p log(p / q) + sg[1 - w] q log(q / p), w = σ(log p - log q) (ToDi, Jung et al. 2025).

    Forward KL leads where the student falls short of the teacher, reverse KL where it exceeds it. Since w is
    p / (p + q), the value is that of KL(p || q) + KL(q || p); the gradient is not, as w is constant.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    gap = torch.where(log_q == -math.inf, 0.0, log_p - log_q)
    weight = gap.detach().sigmoid()
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * gap).sum(-1)


def concrete_score(student_logits: Tensor, teacher_logits: Tensor, *, weights: PairWeights = "student") -> Tensor:
    """½ Σ_y Σ_x sg[w(y) q(x)] (Δ(x) - Δ(y))², Δ = z_q - z_p: the loss of concrete scores (CSD, Kim et al. 2025, eq. 8).

    All pairs of tokens y, x in time linear in V, since the sum is ½ (Var_w Δ + Var_q Δ + (E_w Δ - E_q Δ)²). `weights`
    is w: q of the "student", the paper's main choice (S, S); p of the "teacher" (T, S); "uniform" (U, S), over the
    columns that both models have. Nothing bounds it. With the student's weights it is the variance of log(q / p) under
    q, and its gradient is twice that of the reverse KL.
    """
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    present = log_q > _NEVER
    gap = torch.where(present, log_q - log_p, 0.0)  # Δ up to a constant, which cancels
    q = log_q.detach().exp()
    if weights == "student":
        w = q
    elif weights == "teacher":
        w = log_p.detach().exp()
    elif weights == "uniform":
        w = present.to(q.dtype) / present.sum(-1, keepdim=True)
    else:
        raise ValueError(f'`weights` must be "student", "teacher" or "uniform". Got {weights!r}.')
    w_mean, q_mean = (w * gap).sum(-1, True), (q * gap).sum(-1, True)
    spread = w * (gap - w_mean).square() + q * (gap - q_mean).square()
    return 0.5 * (spread.sum(-1) + (w_mean - q_mean).squeeze(-1).square())
