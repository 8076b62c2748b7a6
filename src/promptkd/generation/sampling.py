"""Which token follows: the most probable one, or one drawn at a given point of the cumulative distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Sampler", "uniforms"]

_BLOCK = 256
"""Words whose probabilities are summed first, so that a cumulative sum over the whole vocabulary is not needed."""


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(rows, length) uniform numbers in [0, 1), each row from its own seed."""
    drawn = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


class Sampler:
    """Picks a token a row: the most probable one at temperature 0, else the one at which the CDF passes u.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: share of the probability mass to sample from, 1 for all of it.
        top_k: number of tokens to sample from, 0 for all.
    """

    def __init__(self, temperature: float, top_p: float, top_k: int):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, logits: Sequence[tuple[Tensor, float]], uniforms: Tensor | None) -> Tensor:
        """Tokens (R,).

        Args:
            logits: (R, V) float32 of each model, and its share of the mixture.
            uniforms: (R,) numbers in [0, 1), or None to decode greedily.
        """
        if len(logits) == 1 and uniforms is None:
            return logits[0][0].argmax(-1)
        temperature = self.temperature or 1.0  # the most probable token of a mixture is that at temperature 1
        first, *others = (_softmax(each, temperature, weight) for each, weight in logits)
        probabilities = sum(others, first)
        if uniforms is None:
            return probabilities.argmax(-1)
        if self.top_k > 0 or self.top_p < 1:
            probabilities = self._truncate(probabilities)
        return _inverse_cdf(probabilities, uniforms)

    def _truncate(self, probabilities: Tensor) -> Tensor:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k > 0:
            keep[:, self.top_k :] = False
        if self.top_p < 1:
            ranked = ranked * keep  # top-p of what top-k has left, as transformers and vLLM have it
            keep &= ranked.cumsum(-1) - ranked < self.top_p * ranked.sum(-1, keepdim=True)  # what crosses top-p stays
        return torch.zeros_like(probabilities).scatter(-1, order, ranked * keep)


def _softmax(logits: Tensor, temperature: float, share: float) -> Tensor:
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(-1)
    return probabilities if share == 1 else probabilities.mul_(share)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The word at which the cumulative sum of `weights` (R, V), in float64, passes the share u of the whole, (R,)."""
    words = weights.shape[-1]
    whole = words // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)  # (R, blocks)
    if whole < words:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], -1)
    ends = sums.cumsum(-1)
    target = uniforms.to(ends) * ends[:, -1]
    block = _first_beyond(ends, target, sums)
    before = ends.gather(-1, block[:, None])[:, 0] - sums.gather(-1, block[:, None])[:, 0]
    columns = block[:, None] * _BLOCK + torch.arange(min(_BLOCK, words), device=weights.device)  # (R, block)
    inside = weights.gather(-1, columns.clamp(max=words - 1)).double().masked_fill(columns >= words, 0.0)
    rest = (target - before).clamp(min=0)  # rounding may leave it below 0, where a word without weight would be next
    return block * _BLOCK + _first_beyond(inside.cumsum(-1), rest, inside)


def _first_beyond(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """(R,) first column whose cumulative sum lies above the target.

    Sums over blocks and over words round differently, so a target may lie behind the last word of its block; then it
    is the last one of any weight.
    """
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    columns = torch.arange(weights.shape[-1], device=weights.device)
    return torch.minimum(place, torch.where(weights > 0, columns, 0).amax(-1))
