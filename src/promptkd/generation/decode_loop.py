"""Responses of a model to many prompts: sorted by length, finished rows dropped, sampled by inverse CDF.

A response does not depend on which rows share its batch. Settings that a model folder brings along (a repetition
penalty, a top-p) are not applied: what is asked for is what runs.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from promptkd.data.batch import on_device
from promptkd.engine import DecodeSession, decoding, embedding_device, engine_for, evaluating, unwrap_peft
from promptkd.errors import check_all
from promptkd.generation.sampling import SamplingParams, next_tokens, uniforms


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = 32,
    mixed_with: tuple[nn.Module, float] | None = None,
    prompt: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id or the length limit.

    Args:
        model: a causal model of transformers or a PeftModel of one; it runs in evaluation mode.
        prompts: token ids, at least one per prompt.
        seeds: one per prompt, needed unless greedy.
        mixed_with: another model and its share α; tokens come from (1 - α) q + α p, both at `params.temperature`.
        prompt: (n, E) embeddings put before each request, at positions 0 … n - 1; not together with `mixed_with`.
        on_batch: called with the number of rows finished so far.

    Returns:
        The responses in the order of `prompts`, the stop id at the end where one was written.

    Raises:
        RequestError: naming everything that keeps these prompts from being continued.
    """
    limits = params.limits(len(prompts))
    check_request(prompts, params, seeds, batch_size=batch_size, mixes=mixed_with is not None and prompt is not None)
    if prompt is not None and len(prompt) == 0:
        prompt = None
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    responses: list[list[int]] = [[] for _ in prompts]
    models = [(model, 1.0)] if mixed_with is None else [(model, 1 - mixed_with[1]), mixed_with]
    device = embedding_device(unwrap_peft(model))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for each, _ in models:
            stack.enter_context(evaluating(each))
        size = min(batch_size, len(prompts))
        sessions = [
            (stack.enter_context(decoding(each, size, vocabulary=params.vocabulary)), share) for each, share in models
        ]
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [limits[row] for row in rows]
            drawn = None if params.is_greedy or seeds is None else uniforms([seeds[row] for row in rows], max(ends))
            with contextlib.ExitStack() as running:
                readers = [(running.enter_context(each(max(ends))), share) for each, share in sessions]
                batch = _Batch(readers, params, ends, drawn, device)
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
        params: SamplingParams,
        limits: Sequence[int],
        drawn: Tensor | None,
        device: torch.device,
    ):
        self.readers, self.params, self.limits = readers, params, limits
        self.drawn = None if drawn is None else drawn.to(device)  # (R, T)
        self.stops = on_device(list(params.stop_ids), device)
        self.last = on_device(limits, device) - 1  # (R,) the step of each row's last token
        self.written = torch.zeros(len(limits), max(limits), dtype=torch.long, device=device)
        self.index = torch.arange(len(limits), device=device)  # rows still decoded, in the order of the readers' rows
        self.going = torch.ones(len(limits), dtype=torch.bool, device=device)

    def decoded(
        self, prompts: Sequence[Sequence[int]], soft_prompt: Tensor | None, check_every: int
    ) -> list[list[int]]:
        """The responses. Rows that have ended are looked for, which waits for the device, every few tokens."""
        limits = set(self.limits)  # a row at its limit may have no further place in the model's table of positions
        logits = [(reader.prefill(prompts, soft_prompt), share) for reader, share in self.readers]
        for step in range(max(self.limits)):
            drawn = None if self.drawn is None else self.drawn[self.index, step]
            tokens = next_tokens(logits, self.params, drawn)  # (R,)
            self.written[self.index, step] = tokens
            self.going &= ~torch.isin(tokens, self.stops) & (step < self.last[self.index])
            if (step + 1) % check_every == 0 or step + 1 in limits:
                slots = _moved_up(self.going.tolist())
                if not slots:
                    break
                if len(slots) < len(self.going):
                    tokens = self._select(slots, tokens)
            if step + 1 < max(self.limits):
                logits = [(reader.decode(tokens), share) for reader, share in self.readers]
        return [self._response(*each) for each in zip(self.written.tolist(), self.limits, strict=True)]

    def _select(self, slots: list[int], tokens: Tensor) -> Tensor:
        for reader, _ in self.readers:
            reader.select(slots)
        chosen = on_device(slots, tokens.device)
        self.index, self.going = self.index[chosen], self.going[chosen]
        return tokens[chosen]

    def _response(self, tokens: list[int], limit: int) -> list[int]:
        """A row's tokens up to its first stop id or its limit."""
        ends = [tokens.index(stop) + 1 for stop in self.params.stop_ids if stop in tokens[:limit]]
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
    params: SamplingParams,
    seeds: Sequence[int] | None,
    *,
    batch_size: int = 1,
    mixes: bool = False,
) -> None:
    """Refuse what cannot be decoded, all at once, by `RequestError`. `mixes`: a soft prompt and a second model."""
    limits, given = len(params.limits(len(prompts))), None if seeds is None else len(seeds)
    checks = [
        (any(len(prompt) == 0 for prompt in prompts), "every prompt needs at least one token"),
        (
            limits != len(prompts),
            f"max_new_tokens must be one number, or one per prompt ({len(prompts)}), got {limits}",
        ),
        (batch_size < 1, f"batch_size must be at least 1, got {batch_size}"),
        (
            not params.is_greedy and given != len(prompts),
            f"sampling needs one seed per prompt ({len(prompts)}), got {given}",
        ),
        (mixes, "a soft prompt stands before one model, not before a mixture of two"),
    ]
    check_all("Cannot generate", checks)
