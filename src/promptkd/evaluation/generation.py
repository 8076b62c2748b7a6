"""Responses of a model: a decode loop that sorts by length, drops finished rows and samples by inverse CDF.

Every row draws its random numbers from a seed of its own, so a response does not depend on which rows share its batch.
Settings that a model folder brings along (a repetition penalty, a top-p) are not applied: what is asked for is what
runs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from promptkd.errors import RequestError
from promptkd.models.scoring import head_logits, text_model

__all__ = ["evaluating", "generate", "row_seeds"]


def row_seeds(seed: int, rows: int) -> list[int]:
    """Independent seeds for `rows` rows from one named seed."""
    return [int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> 1) for row in range(rows)]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 32,
    vocabulary: int | None = None,
    mixed_with: tuple[nn.Module, float] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id or the length limit.

    Args:
        model: a causal model of transformers or a PeftModel of one; it runs in evaluation mode.
        prompts: token ids, at least one a prompt.
        max_new_tokens: the length limit of every response, or one for each prompt.
        stop_ids: ids that end a response, and belong to it; may be empty.
        temperature: 0 decodes greedily.
        top_p: share of the probability mass to sample from, 1 for all of it.
        top_k: number of tokens to sample from, 0 for all.
        seeds: one a prompt, needed unless greedy.
        vocabulary: write only the first so many ids; the further columns of a padded head mean nothing.
        mixed_with: another model and its share α; tokens come from (1 - α) q + α p, both at `temperature`.
        on_batch: called with the number of rows finished so far.

    Returns:
        The responses in the order of `prompts`, the stop id at the end where one was written.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(prompts, limits, temperature, top_p, top_k, seeds, batch_size)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    responses: list[list[int]] = [[] for _ in prompts]
    pick = _Sampler(temperature, top_p, top_k)
    share = 0.0 if mixed_with is None else mixed_with[1]
    models = [(model, 1 - share)] if mixed_with is None else [(model, 1 - share), mixed_with]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for each, _ in models:
            stack.enter_context(evaluating(each))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [limits[row] for row in rows]
            uniforms = None if temperature == 0 else _uniforms([seeds[row] for row in rows], max(ends))  # type: ignore[index]
            readers = [_Reader(each, weight, vocabulary) for each, weight in models]
            decoded = _decode(readers, [prompts[row] for row in rows], ends, stop_ids, pick, uniforms)
            for row, response in zip(rows, decoded, strict=True):
                responses[row] = response
            if on_batch is not None:
                on_batch(first + len(rows))
    return responses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (no dropout), then the mode that was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _decode(
    readers: Sequence["_Reader"],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    pick: "_Sampler",
    uniforms: Tensor | None,
) -> list[list[int]]:
    device = readers[0].device
    ids, mask = _left_pad(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    responses: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for step in range(max(limits)):
        logits = [(each.logits(ids, mask, positions), each.weight) for each in readers]  # (A, V) of rows still alive
        tokens = pick(logits, None if uniforms is None else uniforms[alive, step].to(device))
        for row, token in zip(alive, tokens.tolist(), strict=True):
            responses[row].append(token)
        going = ~torch.isin(tokens, stops)
        going &= torch.tensor([step + 1 < limits[row] for row in alive], device=device)
        if not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            for each in readers:
                each.cache.batch_select_indices(keep)
            mask, positions, tokens = mask[keep], positions[keep], tokens[keep]
            alive = [alive[index] for index in keep.tolist()]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return responses


class _Reader:
    """A model with its cache, read a column of tokens at a time."""

    def __init__(self, model: nn.Module, weight: float, vocabulary: int | None):
        self.model, self.weight, self.vocabulary = model, weight, vocabulary
        self.inner = text_model(model)
        if "past_key_values" not in inspect.signature(self.inner.base_model.forward).parameters:
            raise RequestError(f"{type(self.inner).__name__} keeps no key-value cache; promptkd cannot decode with it.")
        self.cache = DynamicCache(config=self.inner.config)
        self.device = self.inner.get_input_embeddings().weight.device

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """(A, V) float32 logits behind the last column."""
        hidden = self.inner.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]
        return head_logits(self.model, hidden)[:, : self.vocabulary].float()


class _Sampler:
    """Picks a token a row: the most probable one at temperature 0, else the one at which the CDF passes u."""

    def __init__(self, temperature: float, top_p: float, top_k: int):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, logits: Sequence[tuple[Tensor, float]], uniforms: Tensor | None) -> Tensor:
        if len(logits) == 1 and uniforms is None:
            return logits[0][0].argmax(-1)
        temperature = self.temperature or 1.0  # the most probable token of a mixture is that at temperature 1
        probabilities = sum(weight * (each / temperature).softmax(-1) for each, weight in logits)
        assert isinstance(probabilities, Tensor)
        if uniforms is None:
            return probabilities.argmax(-1)
        if self.top_k > 0 or self.top_p < 1:
            probabilities = self._truncate(probabilities)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # float32 loses the tail of large vocabularies
        target = uniforms.to(torch.float64) * cumulative[:, -1]
        picked = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        return picked.clamp(max=probabilities.shape[-1] - 1)

    def _truncate(self, probabilities: Tensor) -> Tensor:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k > 0:
            keep[:, self.top_k :] = False
        if self.top_p < 1:
            ranked = ranked * keep  # top-p of what top-k has left, as transformers and vLLM have it
            keep &= ranked.cumsum(-1) - ranked < self.top_p * ranked.sum(-1, keepdim=True)  # what crosses top-p stays
        return torch.zeros_like(probabilities).scatter(-1, order, ranked * keep)


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(rows, length) uniform numbers in [0, 1), each row from its own seed."""
    drawn = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _check(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int,
    seeds: Sequence[int] | None,
    batch_size: int,
) -> None:
    problems = []
    if any(len(prompt) == 0 for prompt in prompts):
        problems.append("every prompt needs at least one token")
    if len(limits) != len(prompts):
        problems.append(f"max_new_tokens must be one number, or one a prompt ({len(prompts)}), got {len(limits)}")
    if any(limit < 1 for limit in limits):
        problems.append(f"max_new_tokens must be at least 1, got {min(limits)}")
    if batch_size < 1:
        problems.append(f"batch_size must be at least 1, got {batch_size}")
    if temperature < 0:
        problems.append(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        problems.append(f"top_k must be 0 (off) or more, got {top_k}")
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        problems.append(
            f"sampling needs one seed a prompt ({len(prompts)}), got {None if seeds is None else len(seeds)}"
        )
    if problems:
        raise ValueError(f"Cannot generate: {'; '.join(problems)}.")
