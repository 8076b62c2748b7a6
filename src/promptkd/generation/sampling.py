"""How responses are sampled: greedily, or by a uniform number in the cumulative distribution."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promptkd.errors import check_all

_BLOCK = 256  # tokens summed first, so that no cumulative sum over the whole vocabulary is needed


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a response ends. Raises `RequestError`, naming every setting that is wrong."""

    temperature: float = 1.0  # divides the logits; 0 decodes greedily
    top_p: float = 1.0  # share of the probability mass to sample from, 1 for all of it
    top_k: int = 0  # number of tokens to sample from, 0 for all
    max_new_tokens: int | Sequence[int] = 256  # length limit of every response, or one for each prompt
    stop_ids: Sequence[int] = ()  # tokens that end a response, and belong to it
    vocabulary: int | None = None  # only the first so many ids are written: a head may have padding columns
    masked_ids: Sequence[int] = ()  # tokens that are never written

    def __post_init__(self) -> None:
        check_all("Cannot decode", self._checks())

    def _checks(self) -> Iterator[tuple[bool, str]]:
        shortest = min(self.limits(1), default=1)
        yield shortest < 1, f"max_new_tokens must be at least 1, got {shortest}"
        yield self.temperature < 0, f"temperature must be 0 (greedy) or more, got {self.temperature}"
        yield not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"
        yield self.top_k < 0, f"top_k must be 0 (off) or more, got {self.top_k}"

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def limits(self, prompts: int) -> list[int]:
        return [self.max_new_tokens] * prompts if isinstance(self.max_new_tokens, int) else list(self.max_new_tokens)


@dataclass(frozen=True)
class Decoding(SamplingParams):
    """How the rows of a data set, or the turns of a conversation, are answered."""

    seed: int = 10  # row or turn i is sampled under the i-th of the `row_seeds` of this one
    batch_size: int = 32

    def _checks(self) -> Iterator[tuple[bool, str]]:
        yield from super()._checks()
        yield self.seed < 0, f"seed must be 0 or more, got {self.seed}"

    @property
    def is_plain(self) -> bool:
        """Whether answers are drawn from the model's own distribution, on which the KL is taken."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)

    def plain(self, seed: int) -> "Decoding":
        return replace(self, temperature=1.0, top_p=1.0, top_k=0, seed=seed)

    def record(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What the answers depend on, as an `Evaluation` holds it."""
        names = ["temperature", *([] if self.is_greedy else ["top_p", "top_k"]), "max_new_tokens"]
        return {name: vars(self)[name] for name in names} | ({} if self.is_greedy else {"seeds": list(seeds)})


def row_seeds(seed: int, rows: int) -> list[int]:
    """Independent seeds for `rows` rows from one named seed."""
    return [int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> 1) for row in range(rows)]


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(rows, length) uniform numbers in [0, 1), each row from its own seed."""
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(length, dtype=torch.float64, generator=each) for each in generators])


def next_tokens(logits: Sequence[tuple[Tensor, float]], params: SamplingParams, uniforms: Tensor | None) -> Tensor:
    """The tokens (R,) that follow: by `uniforms` (R,) in [0, 1), or greedily where that is None.

    `logits` are (R, V) float32 of each model, with its share of the mixture.
    """
    if len(logits) == 1 and uniforms is None:
        return logits[0][0].argmax(-1)
    temperature = params.temperature or 1.0  # the most probable token of a mixture is that at temperature 1
    first, *others = (_softmax(each, temperature, share) for each, share in logits)
    probabilities = sum(others, first)
    if uniforms is None:
        return probabilities.argmax(-1)
    if params.top_k > 0 or params.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if params.top_k > 0:
            keep[:, params.top_k :] = False
        if params.top_p < 1:
            ranked = ranked * keep  # top-p of what top-k has left, as transformers and vLLM have it
            keep &= ranked.cumsum(-1) - ranked < params.top_p * ranked.sum(-1, keepdim=True)  # what crosses top-p stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked * keep)
    return _inverse_cdf(probabilities, uniforms)


def _softmax(logits: Tensor, temperature: float, share: float) -> Tensor:
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(-1)
    return probabilities if share == 1 else probabilities.mul_(share)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative sum of `weights` (R, V), in float64, passes the share u of the total, (R,)."""
    size = weights.shape[-1]
    even = size // _BLOCK * _BLOCK
    sums = weights[:, :even].unflatten(-1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)  # (R, blocks)
    if even < size:
        sums = torch.cat([sums, weights[:, even:].sum(-1, keepdim=True, dtype=torch.float64)], -1)
    ends = sums.cumsum(-1)
    target = uniforms.to(ends) * ends[:, -1]
    block = _first_beyond(ends, target, sums)
    before = ends.gather(-1, block[:, None])[:, 0] - sums.gather(-1, block[:, None])[:, 0]
    columns = block[:, None] * _BLOCK + torch.arange(min(_BLOCK, size), device=weights.device)  # (R, block)
    inside = weights.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0.0)
    rest = (target - before).clamp(min=0)  # rounding may leave it below 0, where a token without weight would be next
    return block * _BLOCK + _first_beyond(inside.cumsum(-1), rest, inside)


def _first_beyond(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """(R,) first column whose cumulative sum lies above the target, else (rounding) the last one of any weight."""
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    columns = torch.arange(weights.shape[-1], device=weights.device)
    return torch.minimum(place, torch.where(weights > 0, columns, 0).amax(-1))
