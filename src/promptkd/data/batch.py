"""Prompts and responses as one right-padded batch of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """A tensor of integers (nested sequences as usual) on a device, without waiting for it.

    A plain copy to a GPU waits until all work queued there is done.
    """
    return moved(torch.tensor(values, dtype=torch.long), device)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of prompt + response, padded on the right. Positions decide what is scored, never token ids.

    Padding follows every real token, where a causal model cannot see it, so its id is arbitrary. The host has a copy of
    all that is known of the rows, so that nothing here waits for a device.
    """

    input_ids: Tensor  # (B, T)
    rows: Tensor  # (N,) the row of each response token, in row-major order
    columns: Tensor  # (N,) the column that predicts each response token: the one before it
    targets: Tensor  # (N,) the response tokens
    token_ids: tuple[list[int], ...]  # each row without padding, on the host
    prompt_lengths: tuple[int, ...]  # tokens of each row's prompt

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
        return _scored_places(self.prompt_lengths, self.lengths)

    @property
    def position_ids(self) -> Tensor:
        """(B, T) 0 … T - 1 in each row."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand(self.input_ids.shape)

    @property
    def response_tokens(self) -> int:
        """N, the number of scored tokens."""
        return self.targets.numel()

    def split(self, max_tokens: int) -> list["TokenBatch"]:
        """The batch in parts of consecutive rows, each of at most `max_tokens` tokens (padding aside) or one row."""
        starts, total = [0], 0
        for row, tokens in enumerate(self.lengths):
            if total and total + tokens > max_tokens:
                starts.append(row)
                total = 0
            total += tokens
        ends = [*starts[1:], len(self.lengths)]
        return [self] if len(starts) == 1 else [self._between(*each) for each in zip(starts, ends, strict=True)]

    def _between(self, start: int, end: int) -> "TokenBatch":
        first, last = sum(self.response_lengths[:start]), sum(self.response_lengths[:end])
        return TokenBatch(
            self.input_ids[start:end, : max(self.lengths[start:end])],
            self.rows[first:last] - start,
            self.columns[first:last],
            self.targets[first:last],
            self.token_ids[start:end],
            self.prompt_lengths[start:end],
        )

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the response tokens, (N,), as (B, longest response), 0 behind the end of a response."""
        counts = self.response_lengths
        first = on_device([0, *accumulate(counts)][:-1], self.rows.device)
        place = torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]
        table = values.new_zeros(self.input_ids.shape[0], max(counts))
        return table.index_put((self.rows, place), values)


def right_pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> TokenBatch:
    """Join each prompt with its response and pad to the longest row.

    Raises:
        ValueError: for unequal counts, no rows, or a prompt of no tokens (nothing would predict its response).
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"Expected as many responses as prompts, and at least one. Got {len(prompts)} and {len(responses)}."
        )
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"A prompt needs at least one token. Got none in row {empty[0]} of the batch.")
    token_ids = tuple([*prompt, *response] for prompt, response in zip(prompts, responses, strict=True))
    prompt_lengths, lengths = tuple(map(len, prompts)), tuple(map(len, token_ids))
    rows, columns = _scored_places(prompt_lengths, lengths)
    return TokenBatch(
        input_ids=on_device([[*ids, *[0] * (max(lengths) - len(ids))] for ids in token_ids], device),
        rows=on_device(rows, device),
        columns=on_device(columns, device),
        targets=on_device([token for response in responses for token in response], device),
        token_ids=token_ids,
        prompt_lengths=prompt_lengths,
    )


def _scored_places(prompt_lengths: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Row and column of each token that predicts a response token, in row-major order."""
    bounds = list(enumerate(zip(prompt_lengths, lengths, strict=True)))
    rows = [row for row, (prompt, total) in bounds for _ in range(total - prompt)]
    columns = [column for _, (prompt, total) in bounds for column in range(prompt - 1, total - 1)]
    return rows, columns
