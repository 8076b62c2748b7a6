"""Objectives on the tokens of responses: the policy gradients of MiniLLM and of on-policy distillation, DPKD's
preference, the coefficients of DistiLLM-2.

Where a `mask` is asked for, tensors are (B, T): B responses padded on the right to T tokens, the mask True where a
response has one. Padding gives 0.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Importance = Literal["token", "product", "none"]


def minillm(
    log_q: Tensor,
    log_p: Tensor,
    single_step: Tensor,
    mask: Tensor,
    *,
    log_behavior: Tensor | None = None,
    importance: Importance = "token",
    length_normalization: bool = True,
    clip_ratio: float | None = 0.2,
) -> Tensor:
    """w_t KL_t(q || p) + ρ_t G_{t+1}, (B, T), a surrogate whose gradient is that of the sequence-level KL(q || p).

    G_{t+1} = Σ_{t' > t} (log q - log p)_{t'} is the cost that follows token t, a constant for the gradient (MiniLLM, Gu
    et al. 2024, eqs. 3 to 7).

    Args:
        log_q, log_p: log-probability of each sampled token under the student and under the teacher.
        single_step: KL_t(q || p), of the full distribution at each position.
        log_behavior: as `log_q` under what sampled the tokens, α p + (1 - α) q; None if that was the student.
        importance: weights of tokens that the student did not sample: "token", ρ_t = q / behavior at t alone, biased
            but of low variance (the paper's); "product", the exact weights, products over the response; "none".
        length_normalization: divide G_{t+1} by the number of tokens that follow. The gradient is then no longer that of
            the KL.
        clip_ratio: ε of the clipped ratio (PPO) for "token" and "none"; None never clips.
    """
    constant = log_q.detach()
    gradient_of_log = log_q - constant  # 0, with the gradient of log q
    log_ratio = torch.zeros_like(log_q) if log_behavior is None else constant - log_behavior.detach()
    log_ratio = torch.where(mask, log_ratio, 0.0)
    cost = torch.where(mask, constant - log_p.detach(), 0.0)
    if importance == "product":
        through = log_ratio.cumsum(-1)  # log of Π_{s ≤ t} q / behavior
        following = return_to_go(cost * through.exp(), mask, normalize=length_normalization)
        values = (through - log_ratio).exp() * single_step + following * gradient_of_log
        return torch.where(mask, values, 0.0)
    if importance not in ("token", "none"):
        raise ValueError(f'`importance` must be "token", "product" or "none". Got {importance!r}.')
    weight = log_ratio.exp() if importance == "token" else torch.ones_like(log_ratio)
    following = return_to_go(cost, mask, normalize=length_normalization)
    ratio = weight * gradient_of_log.exp()
    gain = ratio * following
    if clip_ratio is not None:
        gain = torch.maximum(gain, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * following)
    return torch.where(mask, weight * single_step + gain, 0.0)


def return_to_go(cost: Tensor, mask: Tensor, *, normalize: bool) -> Tensor:
    """Σ_{t' > t} cost_{t'}, (B, T), divided by the number of these tokens with `normalize`. 0 at the last token."""
    cost = torch.where(mask, cost, 0.0)
    following = cost.flip(-1).cumsum(-1).flip(-1) - cost
    if not normalize:
        return following
    count = mask.long().flip(-1).cumsum(-1).flip(-1) - mask.long()
    return following / count.clamp(min=1)


def value_and_weights(loss: Callable[..., Tensor], *of_tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar `loss(*of_tokens)` and its derivatives with respect to each of the tensors, in their shapes.

    With the derivatives as constant weights, Σ weight · log q has the gradient of a loss that puts the log q of many
    tokens together, and is a sum over tokens.
    """
    leaves = [each.detach().requires_grad_() for each in of_tokens]
    with torch.enable_grad():
        value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


class ResponseLogProbs(NamedTuple):
    """Log-probabilities of the tokens of B responses."""

    log_q: Tensor  # (B, T) under the student
    log_p: Tensor  # (B, T) under the teacher, constant
    mask: Tensor  # (B, T) bool


def dpkd(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    *,
    beta: float = 0.1,
    level: Literal["sequence", "token"] = "sequence",
    length_normalization: bool = True,
) -> Tensor:
    """-log σ(β [Σ log q/p of the chosen response - Σ log q/p of the rejected one]), one value per row, (B,).

    The reward of a response is log q - log p, with the teacher as the reference (DPKD, Li et al. 2024, section 3).

    Args:
        chosen, rejected: the teacher's responses, and the student's own.
        beta: scale of the reward; 0 gives log 2 whatever the models say.
        level: "sequence" compares the sums of the two responses; "token" compares position by position up to the end of
            the shorter one, and sums.
        length_normalization: means over a response's tokens instead of sums.
    """
    better, worse = (torch.where(mask, log_q - log_p.detach(), 0.0) for log_q, log_p, mask in (chosen, rejected))
    if level == "sequence":
        rewards = [better.sum(-1), worse.sum(-1)]
        if length_normalization:
            masks = chosen.mask, rejected.mask
            rewards = [each / mask.sum(-1).clamp(min=1) for each, mask in zip(rewards, masks, strict=True)]
        return -logsigmoid(beta * (rewards[0] - rewards[1]))
    if level != "token":
        raise ValueError(f'`level` must be "sequence" or "token". Got {level!r}.')
    width = min(better.shape[1], worse.shape[1])
    both = chosen.mask[:, :width] & rejected.mask[:, :width]
    losses = -logsigmoid(beta * (better[:, :width] - worse[:, :width]))
    total = torch.where(both, losses, 0.0).sum(-1)
    return total / both.sum(-1).clamp(min=1) if length_normalization else total


def on_policy_gradient(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-A log q(y), A = sg[log p(y) - log q(y)], for tokens y ~ q: the sampled form of the reverse KL's gradient.

    A surrogate of the shape of its arguments, (...): its expected gradient is that of KL(q || p), since a constant in A
    has none. Its value means nothing; log q - log p is the unbiased estimate of the KL (on-policy distillation,
    Thinking Machines 2025).

    Args:
        log_q, log_p: log-probability of each sampled token under the student, and under the teacher, a constant.
    """
    return (log_q - log_p).detach() * log_q


def skew_coefficients(gap: Tensor, mean_gap: float | Tensor, *, alpha: float) -> Tensor:
    """α = clip(1 - (1 - α0) m / (gap + 1e-5), 0.01, α0) of each response, in the shape of `gap` (DistiLLM-2's code).

    A response on which the two models are further apart than the mean keeps α0; the nearer they are, the smaller α.

    Args:
        gap: e^{mean log p} - e^{mean log q} of the tokens of a teacher's response, and with p and q exchanged of a
            student's (Ko et al. 2025).
        mean_gap: m, what `gap` is on the mean.
        alpha: α0, the largest.
    """
    return (1 - (1 - alpha) * mean_gap / (gap + 1e-5)).clamp(min(0.01, alpha), alpha)


def contrast_weight(progress: float) -> float:
    """β = 1 + ½ min(1, 2 k / K): 1 at first, 3/2 from the middle of the training on (DistiLLM-2's code).

    The loss on the student's responses is weighted by β, that on the teacher's by 2 - β.

    Raises:
        ValueError: if `progress`, k / K, lies outside of [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"`progress` must lie in [0, 1]. Got {progress}.")
    return 1 + 0.5 * min(1.0, 2 * progress)
