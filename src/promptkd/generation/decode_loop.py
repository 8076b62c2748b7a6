"""Responses of a model: a decode loop that sorts by length, drops finished rows and samples by inverse CDF.

Every row draws its random numbers from a seed of its own, so a response does not depend on which rows share its batch.
Settings that a model folder brings along (a repetition penalty, a top-p) are not applied: what is asked for is what
runs.
"""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from promptkd.data.packing import on_device
from promptkd.engine import DecodeSession, decoding, embedding_device, engine_for, evaluating, unwrap_peft
from promptkd.generation.sampling import Sampler, uniforms

__all__ = ["check_request", "generate", "row_seeds"]


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
    prompt: Tensor | None = None,
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
        prompt: (n, E) embeddings put before each request, at positions 0 … n - 1; not together with `mixed_with`.
        on_batch: called with the number of rows finished so far.

    Returns:
        The responses in the order of `prompts`, the stop id at the end where one was written.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    check_request(prompts, limits, temperature, top_p, top_k, seeds, batch_size)
    if prompt is not None and mixed_with is not None:
        raise ValueError("Cannot generate: a soft prompt stands before one model, not before a mixture of two.")
    if prompt is not None and len(prompt) == 0:
        prompt = None
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    responses: list[list[int]] = [[] for _ in prompts]
    pick = Sampler(temperature, top_p, top_k)
    share = 0.0 if mixed_with is None else mixed_with[1]
    models = [(model, 1 - share)] if mixed_with is None else [(model, 1 - share), mixed_with]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for each, _ in models:
            stack.enter_context(evaluating(each))
        size = min(batch_size, len(prompts))
        sessions = [
            (stack.enter_context(decoding(each, size, vocabulary=vocabulary)), weight) for each, weight in models
        ]
        device = embedding_device(unwrap_peft(model))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [limits[row] for row in rows]
            drawn = None if temperature == 0 else uniforms([seeds[row] for row in rows], max(ends))  # type: ignore[index]
            with contextlib.ExitStack() as running:
                readers = [(running.enter_context(each(max(ends))), weight) for each, weight in sessions]
                batch = _Batch(readers, pick, ends, stop_ids, drawn, device)
                decoded = batch.decoded([prompts[row] for row in rows], prompt, engine_for(device).check_every)
            for row, response in zip(rows, decoded, strict=True):
                responses[row] = response
            if on_batch is not None:
                on_batch(first + len(rows))
    return responses


class _Batch:
    """Rows that are decoded together. Tokens stay on the device; every few of them, rows that have ended leave.

    A row that has ended goes on until it leaves; what it writes meanwhile is dropped.
    """

    def __init__(
        self,
        readers: Sequence[tuple[DecodeSession, float]],
        pick: Sampler,
        limits: Sequence[int],
        stop_ids: Sequence[int],
        drawn: Tensor | None,
        device: torch.device,
    ):
        self.readers, self.pick, self.limits, self.stop_ids = readers, pick, limits, stop_ids
        self.drawn = None if drawn is None else drawn.to(device)  # (R, T)
        self.stops = on_device(list(stop_ids), device)
        self.last = on_device(limits, device) - 1  # (R,) the step of each row's last token
        self.written = torch.zeros(len(limits), max(limits), dtype=torch.long, device=device)
        self.rows = list(range(len(limits)))  # those still decoded, in the order of the readers' rows
        self.index = torch.arange(len(limits), device=device)  # the same
        self.going = torch.ones(len(limits), dtype=torch.bool, device=device)

    def decoded(
        self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None, check_every: int
    ) -> list[list[int]]:
        """The responses. Rows that have ended are looked for, which waits for the device, every few tokens."""
        limits = set(self.limits)  # a row at its limit may have no further place in the model's table of positions
        logits = [(reader.prefill(prompts, soft_prompt), weight) for reader, weight in self.readers]
        for step in range(max(self.limits)):
            tokens = self.pick(logits, None if self.drawn is None else self.drawn[self.index, step])  # (R,)
            self.written[self.index, step] = tokens
            self.going &= ~torch.isin(tokens, self.stops) & (step < self.last[self.index])
            if (step + 1) % check_every == 0 or step + 1 in limits:
                slots = _moved_up(self.going.tolist())
                if not slots:
                    break
                if len(slots) < len(self.rows):
                    tokens = self._select(slots, tokens)
            if step + 1 < max(self.limits):
                logits = [(reader.decode(tokens), weight) for reader, weight in self.readers]
        return [self._response(*each) for each in zip(self.written.tolist(), self.limits, strict=True)]

    def _select(self, slots: list[int], tokens: Tensor) -> Tensor:
        for reader, _ in self.readers:
            reader.select(slots)
        chosen = on_device(slots, tokens.device)
        self.rows = [self.rows[slot] for slot in slots]
        self.index, self.going = self.index[chosen], self.going[chosen]
        return tokens[chosen]

    def _response(self, tokens: list[int], limit: int) -> list[int]:
        """A row's tokens up to its first stop id or its limit."""
        ends = [tokens.index(stop) + 1 for stop in self.stop_ids if stop in tokens[:limit]]
        return tokens[: min([limit, *ends])]


def _moved_up(going: Sequence[bool]) -> list[int]:
    """Slots of the rows that go on, with rows from the end in the places of those that do not: few rows move."""
    slots = list(range(len(going)))
    for slot in reversed(range(len(going))):
        if not going[slot]:
            last = slots.pop()
            if slot < len(slots):
                slots[slot] = last
    return slots


def check_request(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int,
    seeds: Sequence[int] | None,
    batch_size: int,
) -> None:
    """Refuse what cannot be decoded, all at once, by `ValueError`. `limits`: a length limit a prompt."""
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
