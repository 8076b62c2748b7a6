"""Kernels, as in kernels.py, of losses that need more than two models' logits: the tokens that were sampled, or
coefficients of each token."""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from promptkd.objectives.kernels import Kernel, Kernels, Metrics, top_overlap

Skew = Literal["forward", "reverse"]

_ABSENT = -1e15  # of probability 0, and no difference of two is NaN


def on_policy_kernel(kernels: Kernels, *, absent_tokens: bool) -> Kernel:
    """The kernel of `on_policy_gradient`; its targets are the sampled tokens (C,) and the teacher's logits (C, V).

    The metric "sampled_kl" is log q(y) - log p(y); "entropy" and "top_overlap" are as in `objective_kernel`.
    """

    def kernel(logits: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        overlap = top_overlap(logits, target)
        if absent_tokens:
            target = _without_absent(logits, target)
        values, metrics = kernels.on_policy(logits, labels, target)
        return values, metrics | {"top_overlap": overlap}

    return kernel


def weighted_kernel(kernels: Kernels) -> Kernel:
    """The kernel of w log q(y); its targets are the tokens y and the weights w, both (C,). The metric is "entropy"."""

    def kernel(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        values, metrics = kernels.cross_entropy(logits, labels)
        logits.mul_(-weight[:, None])
        return -weight * values, metrics

    return kernel


def weighted_kl_kernel(kernels: Kernels, *, absent_tokens: bool) -> Kernel:
    """The kernel of w log q(y) + v `reverse_kl`; its targets are y, w, v, each (C,), and the teacher's logits (C, V).

    Metrics are those of `objective_kernel`.
    """
    of_token = weighted_kernel(kernels)

    def kernel(
        logits: Tensor, labels: Tensor, weight: Tensor, kl_weight: Tensor, target: Tensor
    ) -> tuple[Tensor, Metrics]:
        overlap = top_overlap(logits, target)
        if absent_tokens:
            target = _without_absent(logits, target)
        gradient = logits.clone()
        values, _ = of_token(gradient, labels, weight)
        kls, metrics = kernels.reverse_kl(logits, target)
        logits.mul_(kl_weight[:, None]).add_(gradient)
        return values + kl_weight * kls, metrics | {"top_overlap": overlap}

    return kernel


def skew_kernel(skew: Skew, *, absent_tokens: bool) -> Kernel:
    """The kernel of weight · `skew_forward_kl`, or of `skew_reverse_kl` with a constant mixture.

    Its targets are the teacher's logits (C, V), α and the weight of each token, both (C,). Metrics are those of
    `objective_kernel`.
    """
    return partial(_weighted_skew, skew, absent_tokens)


def _weighted_skew(
    skew: Skew, absent_tokens: bool, logits: Tensor, target: Tensor, alpha: Tensor, weight: Tensor
) -> tuple[Tensor, Metrics]:
    overlap = top_overlap(logits, target)
    if absent_tokens:
        target = _without_absent(logits, target)
    log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
    q = torch.exp(log_q, out=logits)
    entropy = -(q * log_q).sum(-1)
    values = (_skew_forward if skew == "forward" else _skew_reverse)(q, log_q, log_p, alpha)
    q.mul_(weight[:, None])
    return values * weight, {"entropy": entropy, "top_overlap": overlap}


def _skew_forward(q: Tensor, log_q: Tensor, log_p: Tensor, alpha: Tensor) -> Tensor:
    """KL(p || m), m = α p + (1 - α) q: d/dz = (1 - α) (q Σ r - r), r = p q / m, written over `q`."""
    log_ratio = _log_ratio(log_p - log_q, alpha)
    values = (log_p.exp_() * log_ratio).sum(-1)
    r = log_ratio.add_(log_q).exp_()
    q.mul_(r.sum(-1, keepdim=True)).sub_(r).mul_(1 - alpha[:, None])
    return values


def _skew_reverse(q: Tensor, log_q: Tensor, log_p: Tensor, alpha: Tensor) -> Tensor:
    """KL(q || m), m = (1 - α) p + α q constant: d/dz = q (log q - log m - KL), written over `q`."""
    log_ratio = _log_ratio(log_q.sub_(log_p), alpha)
    values = (q * log_ratio).sum(-1)
    q.mul_(log_ratio.sub_(values[:, None]))
    return values


def _log_ratio(difference: Tensor, share: Tensor) -> Tensor:
    """log a - log m, m = share a + (1 - share) b, in place of the finite log a - log b; exactly 0 where a equals b.

    m is the larger of a and b times 1 + c (e^{-|difference|} - 1), where c is the share of the other one. At a share of
    0, m is b, and at 1 it is a: there log1p would lose all digits of a large difference.
    """
    fall = torch.expm1(difference.abs().neg_())
    # c without `torch.where`, which takes three times as long as all else here
    fall.mul_((difference >= 0).to(fall.dtype).mul_(1 - 2 * share[:, None]).add_(share[:, None]))
    is_b, is_a = share == 0, share == 1
    fall.log1p_().masked_fill_((is_b | is_a)[:, None], 0.0)
    lowest = torch.where(is_a, 0.0, -math.inf).to(difference)
    highest = torch.where(is_b, math.inf, 0.0).to(difference)
    return difference.clamp_(lowest[:, None], highest[:, None]).sub_(fall)


def _without_absent(logits: Tensor, target: Tensor) -> Tensor:
    """Mark the tokens that one of the models does not have in `logits`, in place, and in what is returned."""
    missing = (logits == -math.inf) | (target == -math.inf)
    logits.masked_fill_(missing, _ABSENT)
    return target.masked_fill(missing, _ABSENT)
