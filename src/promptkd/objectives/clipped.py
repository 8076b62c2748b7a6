"""Forward KL whose contributions of single tokens are cut off from above."""

import math

from torch import Tensor

from promptkd.objectives.divergences import shared_log_probs


def clipped_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, clip: float) -> Tensor:
    """Σ_v min(p_v (log p_v - log q_v), τ), τ = `clip`: the forward KL at τ = inf (OPSD, Zhao et al. 2026, section 3.2).

    A token of the vocabulary whose term exceeds τ adds τ and has no gradient of its own, so that few of them cannot
    outweigh the others. Terms with q > p are negative and are not cut, so the sum may be negative. Equal inputs give 0.
    Shapes, units and absent columns as in divergences.py.

    Raises:
        ValueError: for a τ that is not above 0.
    """
    if not clip > 0:
        raise ValueError(f"`clip` must be above 0. Got {clip}.")
    log_q, log_p = shared_log_probs(student_logits, teacher_logits)
    absent = log_p == -math.inf
    log_q, log_p = log_q.masked_fill(absent, 0.0), log_p.masked_fill(absent, 0.0)  # equal: their terms are 0
    return (log_p.exp() * (log_p - log_q)).clamp(max=clip).sum(-1)
