"""Objectives on K + 1 outcomes: K tokens by themselves and all others together, as kept teacher logits know them.

With S the K kept tokens, the coarse student is q_k for k in S and q_r = Σ q_j over the tokens j outside of S; the
coarse teacher likewise. A divergence of the family of KL is never larger on them than on the whole vocabulary (data
processing inequality): what is lost is the divergence within the rest, weighted by the rest's mass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from promptkd.errors import RequestError
from promptkd.objectives.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    skew_forward_kl,
    total_variation,
)
from promptkd.objectives.kernels import Kernel, Metrics, Objective, token_values

MOST_BETA = 0.5
"""Of `jensen_shannon` on lumped outcomes: above it, most of the loss is a mean under the student."""
_BOUNDED: tuple[Callable[..., Tensor], ...] = (forward_kl, skew_forward_kl, total_variation, adaptive_kl)


def coarse_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) under logits (N, V) of the K tokens `ids` (N, K) and, last, of all others together.

    The last one is the log of the others' sum, not of 1 less the rest, so it is exact where it is small; -inf at K = V.
    """
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1) - total


def coarse_kernel(objective: Objective) -> Kernel:
    """The kernel of an objective on K + 1 outcomes; its targets are ids (C, K) and the teacher's log-probs (C, K + 1).

    `objective` is given both sides' log-probabilities as logits (C, K + 1). With g its gradient with respect to the
    student's and G = Σ g, d/dz_j = g_j - q_j G for a kept token j and g_r q_j / q_r - q_j G for another. Metrics: the
    student's "entropy" over the whole vocabulary, and "top_overlap", where its top token is the first of `ids`.
    """
    return partial(_coarse_kernel, objective)


def _coarse_kernel(objective: Objective, logits: Tensor, ids: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    overlap = (logits.argmax(-1) == ids[:, 0]).float()
    total, kept = logits.logsumexp(-1, keepdim=True), logits.gather(-1, ids)
    logits.scatter_(-1, ids, -torch.inf)  # from here on the others alone
    others = logits.logsumexp(-1, keepdim=True)
    with torch.enable_grad():
        coarse = (torch.cat([kept, others], -1) - total).detach().requires_grad_()
        values = token_values(objective, coarse, target)
        (gradient,) = torch.autograd.grad(values.sum(), coarse)
    log_q = logits - total
    q = log_q.exp()
    coarse = coarse.detach()
    entropy = _entropy(q, log_q).sum(-1) + _entropy(coarse[:, :-1].exp(), coarse[:, :-1]).sum(-1)
    summed = gradient.sum(-1, keepdim=True)
    # within the others; at K = V there are none, and every logit that is left is -inf
    share = logits.sub_(torch.where(others == -torch.inf, 0.0, others)).exp_()
    share.mul_(gradient[:, -1:]).sub_(q.mul_(summed))
    share.scatter_(-1, ids, gradient[:, :-1] - coarse[:, :-1].exp() * summed)
    return values.detach(), {"entropy": entropy, "top_overlap": overlap}


def check_coarse(objective: Any, *, is_whole: bool) -> None:
    """Refuse an objective that K + 1 outcomes would let lie; one on the whole vocabulary (K = V) may be any.

    Taken: those whose part within the rest is bounded by the teacher's or by a bounded multiple of either model's mass
    there. `adaptive_kl` is taken too, with its reverse part on lumped outcomes. Raises `RequestError`.
    """
    if is_whole:
        return
    given, settings = objective, dict[str, Any]()
    while isinstance(given, partial):
        settings |= given.keywords
        given = given.func
    if given in _BOUNDED or (given is jensen_shannon and settings.get("beta", 1.0) <= MOST_BETA):
        return
    known = ", ".join(each.__name__ for each in _BOUNDED)
    name = f"{given.__name__} with beta {settings.get('beta', 1.0)}" if given is jensen_shannon else None
    raise RequestError(
        f"{name or getattr(given, '__name__', type(given).__name__)} cannot be told from kept logits: among "
        "the tokens that are not kept the student could put its mass anywhere and the loss would not see it, or the "
        f"target needs every token. On kept logits: {known}, and jensen_shannon with beta up to {MOST_BETA}. Give one "
        "of these as --objective, keep the whole vocabulary (--keep-logits V), or train with the teacher itself."
    )


def _entropy(q: Tensor, log_q: Tensor) -> Tensor:
    return -torch.where(log_q == -torch.inf, 0.0, q * log_q)
