"""KL divergences to a target that is made of both models' logits, so that it lies nearer to the student.

Logits are (..., V) and values (...), as in divergences.py; a column that is absent (-inf) for one model is so in the
target. The student within the target is constant: gradients reach it through the divergence alone.
"""

import math

import torch
from torch import Tensor

from promptkd.objectives.divergences import Direction, check_unit_interval, forward_kl, reverse_kl


def taid(student_logits: Tensor, teacher_logits: Tensor, *, t: float) -> Tensor:
    """KL(p_t || q), p_t = softmax((1 - t) sg z_q + t z_p): forward KL at t = 1, 0 without a gradient at t = 0.

    The interpolation of TAID (Shing et al. 2025, section 3), with logits z and sg, the stop of gradients. Equal inputs
    give 0.
    """
    check_unit_interval("t", t)
    return forward_kl(student_logits, interpolated_logits(student_logits.detach(), teacher_logits, t))


def veto(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, direction: Direction = "forward") -> Tensor:
    """KL(p_β || q), or KL(q || p_β) in the direction "reverse", p_β ∝ p (sg q)^β: the plain KL at β = 0.

    The product of experts of Veto (Jang et al. 2026, algorithm 1): a token needs both models' support. It is 0 where
    q ∝ p^(1 / (1 - β)), so equal inputs do not give 0, and at β = 1 the reverse direction is -Σ q log p up to a
    constant for the gradient. As in the gradient of the paper's theorem 3, the target is constant.

    Raises:
        ValueError: for β outside of [0, 1] or an unknown direction.
    """
    check_unit_interval("beta", beta)
    divergences = {"forward": forward_kl, "reverse": reverse_kl}
    if direction not in divergences:
        raise ValueError(f'A KL direction must be "reverse" or "forward". Got {direction!r}.')
    return divergences[direction](student_logits, product_logits(student_logits.detach(), teacher_logits, beta))


def interpolated_logits(student_logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """(1 - t) z_q + t z_p, exactly z_p at t = 1 and where both are equal."""
    student, teacher, absent = _wide(student_logits, teacher_logits)
    return _without(torch.lerp(student, teacher, t), absent)


def product_logits(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """z_p + β z_q, the logits of the normalized p q^β."""
    student, teacher, absent = _wide(student_logits, teacher_logits)
    return _without(torch.add(teacher, student, alpha=beta), absent)


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both in float32 or wider, and which columns are absent from one of them; None if no column is."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher logits must have one shape (..., V). Got {tuple(student.shape)}, "
            f"{tuple(teacher.shape)}. Slice padded heads to the shared vocabulary."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    absent = (student == -math.inf) | (teacher == -math.inf)
    return student.to(dtype), teacher.to(dtype), absent if absent.any() else None


def _without(logits: Tensor, absent: Tensor | None) -> Tensor:
    return logits if absent is None else torch.where(absent, -math.inf, logits)
