"""Responses of a model: a decode loop that sorts by length, drops finished rows and samples by inverse CDF.

Every row draws its random numbers from a seed of its own, so a response does not depend on which rows share its batch.
Settings that a model folder brings along (a repetition penalty, a top-p) are not applied: what is asked for is what
runs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from promptkd.errors import RequestError
from promptkd.evaluation.sampling import Sampler, uniforms
from promptkd.models.lean_decoder import LeanDecoder
from promptkd.models.prepacked import prepacked_linears
from promptkd.models.row_cache import Rows, reads_rows, rows_of
from promptkd.models.scoring import head_logits, text_model

__all__ = ["CacheReader", "check_request", "evaluating", "generate", "row_seeds"]


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
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    responses: list[list[int]] = [[] for _ in prompts]
    pick = Sampler(temperature, top_p, top_k)
    share = 0.0 if mixed_with is None else mixed_with[1]
    models = [(model, 1 - share)] if mixed_with is None else [(model, 1 - share), mixed_with]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for each, _ in models:
            stack.enter_context(evaluating(each))
        laid_out = [stack.enter_context(_laid_out(each, min(batch_size, len(prompts)))) for each, _ in models]
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [limits[row] for row in rows]
            drawn = None if temperature == 0 else uniforms([seeds[row] for row in rows], max(ends))  # type: ignore[index]
            with contextlib.ExitStack() as reading:
                readers = [
                    (reading.enter_context(_reader(each, lean, max(ends), vocabulary, prompt)), weight)
                    for (each, weight), lean in zip(models, laid_out, strict=True)
                ]
                decoded = _decode(readers, [prompts[row] for row in rows], ends, stop_ids, pick, drawn)
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


class _Reader(Protocol):
    """A model that reads rows of different lengths, first their prompts, then a token a row."""

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(R, V) float32 logits behind each prompt."""

    def step(self, tokens: Tensor) -> Tensor:
        """(R, V) float32 logits behind one more token a row, (R,)."""

    def keep(self, slots: Sequence[int]) -> None:
        """Row i is from now on what row `slots[i]` was; rows only move forward."""


@contextmanager
def _laid_out(model: nn.Module, rows: int) -> Iterator[LeanDecoder | None]:
    """Lay weights out for steps of `rows` rows; yields what takes them in place of the backbone, if anything does."""
    inner = text_model(model)
    lean = LeanDecoder(inner, rows) if LeanDecoder.suits(inner) and reads_rows(inner) else None
    if lean is not None and not reads_rows(inner, lean):
        lean = None
    with prepacked_linears(model if lean is None else inner.get_output_embeddings(), rows):
        yield lean


@contextmanager
def _reader(
    model: nn.Module, lean: LeanDecoder | None, room: int, vocabulary: int | None, prompt: Tensor | None
) -> Iterator[_Reader]:
    """The fastest reader for `model` while it is entered, for at most `room` tokens behind a prompt.

    On CPU that is our own key-value store for the architectures that it reads, elsewhere transformers' cache.
    """
    inner = text_model(model)
    if inner.get_input_embeddings().weight.device.type == "cpu" and reads_rows(inner):
        with rows_of(inner, room, lean) as rows:
            yield _RowReader(model, rows, vocabulary, prompt)
    else:
        yield CacheReader(model, vocabulary, prompt)


def _decode(
    readers: Sequence[tuple[_Reader, float]],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    pick: Sampler,
    drawn: Tensor | None,
) -> list[list[int]]:
    responses: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    stops = frozenset(stop_ids)
    logits = [(reader.read(prompts), weight) for reader, weight in readers]  # (R, V) of rows still alive
    for step in range(max(limits)):
        tokens = pick(logits, None if drawn is None else drawn[alive, step].to(logits[0][0].device))
        written = tokens.tolist()
        for row, token in zip(alive, written, strict=True):
            responses[row].append(token)
        slots = _moved_up(
            [token not in stops and step + 1 < limits[row] for row, token in zip(alive, written, strict=True)]
        )
        if not slots:
            break
        if len(slots) < len(alive):
            for reader, _ in readers:
                reader.keep(slots)
            alive, tokens = [alive[slot] for slot in slots], tokens[slots]
        logits = [(reader.step(tokens), weight) for reader, weight in readers]
    return responses


def _moved_up(going: Sequence[bool]) -> list[int]:
    """Slots of the rows that go on, with rows from the end in the places of those that do not: few rows move."""
    slots = list(range(len(going)))
    for slot in reversed(range(len(going))):
        if not going[slot]:
            last = slots.pop()
            if slot < len(slots):
                slots[slot] = last
    return slots


class _RowReader:
    """A model read without padding, on its own key-value store."""

    def __init__(self, model: nn.Module, rows: Rows, vocabulary: int | None, prompt: Tensor | None):
        self.model, self.rows, self.vocabulary, self.prompt = model, rows, vocabulary, prompt

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return _logits(self.model, self.rows.read(prompts, self.prompt), self.vocabulary)

    def step(self, tokens: Tensor) -> Tensor:
        return _logits(self.model, self.rows.step(tokens), self.vocabulary)

    def keep(self, slots: Sequence[int]) -> None:
        self.rows.keep(slots)


class CacheReader:
    """A model read on transformers' cache, its rows padded on the left."""

    mask: Tensor
    positions: Tensor

    def __init__(self, model: nn.Module, vocabulary: int | None, prompt: Tensor | None = None):
        self.model, self.vocabulary, self.prompt = model, vocabulary, prompt
        self.inner = text_model(model)
        if "past_key_values" not in inspect.signature(self.inner.base_model.forward).parameters:
            raise RequestError(f"{type(self.inner).__name__} keeps no key-value cache; promptkd cannot decode with it.")
        self.cache = DynamicCache(config=self.inner.config)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        length = 0 if self.prompt is None else len(self.prompt)
        places = [[0] * length + list(each) for each in prompts]  # the vectors' places, and the request's ids
        ids, self.mask = _left_pad(places, self.inner.get_input_embeddings().weight.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(input_ids=ids) if self.prompt is None else self._forward(inputs_embeds=self._embedded(ids))

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(input_ids=tokens[:, None])

    def keep(self, slots: Sequence[int]) -> None:
        chosen = torch.tensor(slots, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.mask, self.positions = self.mask[chosen], self.positions[chosen]

    def _embedded(self, ids: Tensor) -> Tensor:
        """(R, T, E) embeddings of left-padded rows, the soft prompt in the first n places behind the padding."""
        assert self.prompt is not None
        embedded = self.inner.get_input_embeddings()(ids)  # scaled where the model scales
        first = (self.mask == 0).sum(-1, keepdim=True)  # (R, 1)
        columns = first + torch.arange(len(self.prompt), device=ids.device)  # (R, n)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return embedded.index_put((rows, columns), self.prompt.to(embedded))

    def _forward(self, **inputs: Tensor) -> Tensor:
        hidden = self.inner.base_model(
            **inputs,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return _logits(self.model, hidden, self.vocabulary)


def _logits(model: nn.Module, hidden: Tensor, vocabulary: int | None) -> Tensor:
    return head_logits(model, hidden)[:, :vocabulary].float()


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


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
