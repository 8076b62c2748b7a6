"""Prompts and responses as one right-padded batch of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """Integers (nested sequences as usual) as a tensor on a device, without waiting for it."""
    return moved(torch.tensor(values, dtype=torch.long), device)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; a plain copy to a GPU would wait until all work queued there is done."""
    is_cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if is_cuda else tensor.to(device)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of prompt + response, padded on the right by an arbitrary id: positions decide what is scored, never ids.

    The host has a copy of all that is known of the rows, so that nothing here waits for a device.
    """

    input_ids: Tensor  # (B, T)
    rows: Tensor  # (N,) the row of each response token, in row-major order
    columns: Tensor  # (N,) the column that predicts each response token: the one before it
    targets: Tensor  # (N,) the response tokens
    token_ids: tuple[list[int], ...]  # each row without padding, on the host
    prompt_lengths: tuple[int, ...]  # tokens of each row's prompt
    shared_prefix: int = 0  # first tokens that all rows have alike, where `with_prompts` put them there

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, without padding."""
        return tuple(map(len, self.token_ids))

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Response tokens of each row."""
        return tuple(total - prompt for total, prompt in zip(self.lengths, self.prompt_lengths, strict=True))

    @cached_property
    def scored_places(self) -> tuple[list[int], list[int]]:
        """`rows` and `columns`, on the host."""
        return _scored_places(self.token_ids, self.prompt_lengths)

    @property
    def position_ids(self) -> Tensor:
        """(B, T) 0 … T - 1 in each row."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand(self.input_ids.shape)

    def split(self, max_tokens: int, *, shares: bool = False) -> list["TokenBatch"]:
        """The batch in parts of consecutive rows, each of at most `max_tokens` tokens (padding aside) or one row.

        `shares`: whether a part computes `shared_prefix` once, and so counts it once.
        """
        once = self.shared_prefix if shares else 0
        bounds, total = [0], once
        for row, tokens in enumerate(self.lengths):
            if total > once and total + tokens - once > max_tokens:
                bounds.append(row)
                total = once
            total += tokens - once
        return [self] if len(bounds) == 1 else [self._part(*each) for each in pairwise([*bounds, len(self.lengths)])]

    def _part(self, start: int, end: int) -> "TokenBatch":
        first, last = sum(self.response_lengths[:start]), sum(self.response_lengths[:end])
        input_ids = self.input_ids[start:end, : max(self.lengths[start:end])]
        scored = self.rows[first:last] - start, self.columns[first:last], self.targets[first:last]
        rows = self.token_ids[start:end], self.prompt_lengths[start:end]
        return TokenBatch(input_ids, *scored, *rows, self.shared_prefix)

    def with_prompts(self, prompts: Sequence[Sequence[int] | None]) -> "TokenBatch":
        """The same responses after other prompts, one per row; None keeps the row's own. Itself where all do."""
        if len(prompts) != len(self.token_ids):
            raise ValueError(
                f"Expected a prompt, or None, for each of the {len(self.token_ids)} rows. Got {len(prompts)}."
            )
        if all(prompt is None for prompt in prompts):
            return self
        rows = list(zip(prompts, self.token_ids, self.prompt_lengths, strict=True))
        exchanged = [ids[:length] if prompt is None else prompt for prompt, ids, length in rows]
        made = right_pad(exchanged, [ids[length:] for _, ids, length in rows], device=self.input_ids.device)
        alike = zip(min(map(list, exchanged)), max(map(list, exchanged)), strict=False)  # what these two share, all do
        return replace(made, shared_prefix=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], alike)))

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the response tokens, (N,), as (B, longest response), 0 behind the end of a response."""
        place = self.columns + 1 - on_device(self.prompt_lengths, self.rows.device)[self.rows]
        table = values.new_zeros(self.input_ids.shape[0], max(self.response_lengths))
        return table.index_put((self.rows, place), values)


def right_pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> TokenBatch:
    """Join each prompt with its response and pad to the longest row. Refuses prompts without tokens."""
    if len(prompts) != len(responses) or not prompts:
        got = f"{len(prompts)} and {len(responses)}"
        raise ValueError(f"Expected as many responses as prompts, and at least one. Got {got}.")
    if empty := [row for row, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ValueError(f"A prompt needs at least one token. Got none in row {empty[0]} of the batch.")
    token_ids = tuple([*prompt, *response] for prompt, response in zip(prompts, responses, strict=True))
    prompt_lengths, longest = tuple(map(len, prompts)), max(map(len, token_ids))
    rows, columns = _scored_places(token_ids, prompt_lengths)
    input_ids = on_device([[*ids, *[0] * (longest - len(ids))] for ids in token_ids], device)
    targets = [token for response in responses for token in response]
    scored = on_device(rows, device), on_device(columns, device), on_device(targets, device)
    return TokenBatch(input_ids, *scored, token_ids, prompt_lengths)


def _scored_places(token_ids: Sequence[list[int]], prompt_lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Row and column of each token that predicts a response token, in row-major order."""
    spans = [range(prompt - 1, len(ids) - 1) for ids, prompt in zip(token_ids, prompt_lengths, strict=True)]
    rows = [row for row, span in enumerate(spans) for _ in span]
    return rows, [column for span in spans for column in span]
