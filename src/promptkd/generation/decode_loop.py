"""Responses to many prompts (sorted by length, finished rows dropped, sampled by inverse CDF), or one token by token.

A response does not depend on which rows share its batch. Settings that a model folder brings along (a repetition
penalty, a top-p) are not applied.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.data.batch import on_device
from promptkd.engine import (
    DecodeSession,
    decoding,
    embedding_device,
    engine_for,
    evaluating,
    first_verified,
    unwrap_peft,
)
from promptkd.engine.reference import DECODERS
from promptkd.errors import check_all
from promptkd.generation.sampling import SamplingParams, next_tokens, uniforms

Prompts = Sequence[Sequence[int]]  # token ids


class Mixture(NamedTuple):
    """Another model that writes along."""

    model: nn.Module
    share: float  # α: tokens come from (1 - α) q + α p
    prompts: Sequence[Sequence[int]] | None = None  # what it reads in place of the first model's prompts


Seeds = Sequence[int] | None


def generate(
    model: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    *,
    seeds: Seeds = None,
    batch_size: int = 32,
    mixed_with: Mixture | tuple[nn.Module, float] | None = None,
    prompt: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id or the length limit.

    Args:
        model: a causal model of transformers or a PeftModel of one; it runs in evaluation mode.
        prompts, seeds: at least one token id per prompt, and one seed unless greedy.
        mixed_with: another model p and its share α; tokens come from (1 - α) q + α p, both at `params.temperature`.
        prompt: (n, E) embeddings put before each request, at positions 0 … n - 1; not together with `mixed_with`.
        on_batch: called with the number of rows finished so far.

    Returns the responses in the order of `prompts`, a stop id included. Raises `RequestError`, naming everything that
    is wrong with the request.
    """
    limits = params.limits(len(prompts))
    check_request(prompts, params, seeds, batch_size, mixes=mixed_with is not None and prompt is not None)
    prompt = None if prompt is None or len(prompt) == 0 else prompt
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    responses: list[list[int]] = [[] for _ in prompts]
    other = None if mixed_with is None else Mixture(*mixed_with)
    models = [(model, 1.0)] if other is None else [(model, 1 - other.share), (other.model, other.share)]
    read = [prompts, prompts if other is None or other.prompts is None else other.prompts]  # by each of the models
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
                logits = [
                    (each.prefill([own[row] for row in rows], prompt), share)
                    for (each, share), own in zip(readers, read, strict=False)
                ]
                tokens = _decoded(readers, logits, params, ends, None if drawn is None else drawn.to(device), device)
            for row, limit, response in zip(rows, ends, tokens, strict=True):
                stops = [response.index(stop) + 1 for stop in params.stop_ids if stop in response[:limit]]
                responses[row] = response[: min([limit, *stops])]
            if on_batch is not None:
                on_batch(first + len(rows))
    return responses


def _decoded(
    readers: Sequence[tuple[DecodeSession, float]],
    logits: Sequence[tuple[Tensor, float]],
    params: SamplingParams,
    limits: Sequence[int],
    drawn: Tensor | None,
    device: torch.device,
) -> list[list[int]]:
    """The tokens of rows that are decoded together; what stands behind a row's end has no meaning.

    To look for rows that have ended waits for the device, so it is done every few tokens, and where a row is at its
    limit, which the model's table of positions may end at.
    """
    check_every, stops = engine_for(device).check_every, on_device(list(params.stop_ids), device)
    last = on_device(limits, device) - 1  # (R,) the step of each row's last token
    masked = masked_columns(params, logits[0][0])
    written = torch.zeros(len(limits), max(limits), dtype=torch.long, device=device)
    index = torch.arange(len(limits), device=device)  # rows still decoded, in the order of the readers' rows
    going = torch.ones(len(limits), dtype=torch.bool, device=device)
    for step in range(max(limits)):
        if masked is not None:
            logits = [(each.index_fill_(-1, masked, -torch.inf), share) for each, share in logits]
        tokens = next_tokens(logits, params, None if drawn is None else drawn[index, step])  # (R,)
        written[index, step] = tokens
        going &= ~torch.isin(tokens, stops) & (step < last[index])
        if (step + 1) % check_every == 0 or step + 1 in limits:
            slots = moved_up(going.tolist())
            if not slots:
                break
            if len(slots) < len(going):
                for reader, _ in readers:
                    reader.select(slots)
                chosen = on_device(slots, device)
                index, going, tokens = index[chosen], going[chosen], tokens[chosen]
        if step + 1 < max(limits):
            logits = [(reader.decode(tokens), share) for reader, share in readers]
    return written.tolist()


def masked_columns(params: SamplingParams, logits: Tensor) -> Tensor | None:
    """The columns of `logits` (R, V) that are never chosen; None for none."""
    masked = [index for index in params.masked_ids if index < logits.shape[-1]]
    return on_device(masked, logits.device) if masked else None


def moved_up(going: Sequence[bool]) -> list[int]:
    """Slots of the rows that go on, with rows from the end in the places of those that do not: few rows move."""
    slots = list(range(len(going)))
    for slot in reversed(range(len(going))):
        if not going[slot]:
            last = slots.pop()
            if slot < len(slots):
                slots[slot] = last
    return slots


def stream(
    model: nn.Module, prompt: Sequence[int], params: SamplingParams, *, seed: int | None = None
) -> Generator[int]:
    """The tokens that `generate` writes behind `prompt` with the same settings and seed, each as soon as it is known.

    The model stays in evaluation mode until the generator ends. Streams of several models may be read in turns.
    """
    check_request([prompt], params, None if seed is None else [seed])
    return _tokens(unwrap_peft(model), prompt, params, seed)


@torch.no_grad()  # as a decorator it holds while the generator runs, and not between two of its tokens
def _tokens(model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams, seed: int | None) -> Generator[int]:
    (limit,) = params.limits(1)
    drawn = None if params.is_greedy or seed is None else uniforms([seed], limit)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        # by the reference, since sessions of other engines exclude each other and hold copies of the weights
        sessions = stack.enter_context(first_verified(DECODERS, model).open(model, 1, params.vocabulary))
        session = stack.enter_context(sessions(limit))
        logits = session.prefill([prompt])
        masked = masked_columns(params, logits)
        for step in range(limit):
            if masked is not None:
                logits = logits.index_fill_(-1, masked, -torch.inf)
            token = next_tokens([(logits, 1.0)], params, None if drawn is None else drawn[:, step].to(logits.device))
            yield int(token)
            if int(token) in params.stop_ids or step + 1 == limit:
                return
            logits = session.decode(token)


def check_request(
    prompts: Prompts, params: SamplingParams, seeds: Seeds, batch_size: int = 1, mixes: bool = False
) -> None:
    """Refuse what cannot be decoded, all at once. `mixes`: a soft prompt and a second model."""
    count, limits, given = len(prompts), len(params.limits(len(prompts))), None if seeds is None else len(seeds)
    unseeded = not params.is_greedy and given != count
    checks = [
        (any(len(prompt) == 0 for prompt in prompts), "every prompt needs at least one token"),
        (limits != count, f"max_new_tokens must be one number, or one per prompt ({count}), got {limits}"),
        (batch_size < 1, f"batch_size must be at least 1, got {batch_size}"),
        (unseeded, f"sampling needs one seed per prompt ({count}), got {given}"),
        (mixes, "a soft prompt stands before one model, not before a mixture of two"),
    ]
    check_all("Cannot generate", checks)
