"""Prompts and responses as one rectangle of tokens, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

__all__ = ["TokenBatch", "moved", "on_device", "right_pad"]


def on_device(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """Integers, nested as a tensor nests them, on a device, without waiting for it.

    A plain copy to a GPU waits until all that was queued there is done.
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

    Padding stands behind every real token, where a causal model cannot see it, so its id means nothing. What is known
    of the rows stays on the host too: nothing here waits for a device.
    """

    input_ids: Tensor
    """(B, T)"""
    rows: Tensor
    """(N,) the row of each response token, in row-major order."""
    columns: Tensor
    """(N,) the column that predicts each response token: the one before it."""
    targets: Tensor
    """(N,) the response tokens."""
    token_ids: tuple[list[int], ...]
    """Real tokens of each row, on the host."""
    prompt_lengths: tuple[int, ...]
    """Tokens of each row's prompt."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row."""
        return tuple(map(len, self.token_ids))

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Response tokens of each row."""
        return tuple(whole - prompt for whole, prompt in zip(self.lengths, self.prompt_lengths, strict=True))

    @cached_property
    def scored_places(self) -> tuple[list[int], list[int]]:
        """`rows` and `columns`, on the host."""
        rows = [row for row, count in enumerate(self.response_lengths) for _ in range(count)]
        columns = [
            column
            for prompt, whole in zip(self.prompt_lengths, self.lengths, strict=True)
            for column in range(prompt - 1, whole - 1)
        ]
        return rows, columns

    @property
    def position_ids(self) -> Tensor:
        """(B, T) 0 … T - 1 in each row."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand(self.input_ids.shape)

    @property
    def response_tokens(self) -> int:
        """N, the number of scored tokens."""
        return self.targets.numel()

    def parts(self, longest: int) -> list["TokenBatch"]:
        """The batch in pieces of rows that follow each other, each of at most `longest` real tokens, or of one row."""
        starts, total = [0], 0
        for row, tokens in enumerate(self.lengths):
            if total and total + tokens > longest:
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
        """Values of the response tokens, (N,), as (B, length of the longest response); 0 where a row has none."""
        counts = self.response_lengths
        firsts = [0, *accumulate(counts)][:-1]
        first = on_device(firsts, self.rows.device)
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
    whole = tuple([*prompt, *response] for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, response, tokens) in enumerate(zip(prompts, responses, whole, strict=True)):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        rows.extend([row] * len(response))
        columns.extend(range(len(prompt) - 1, len(tokens) - 1))
        targets.extend(response)
    return TokenBatch(
        input_ids=moved(input_ids, device),
        rows=on_device(rows, device),
        columns=on_device(columns, device),
        targets=on_device(targets, device),
        token_ids=whole,
        prompt_lengths=tuple(map(len, prompts)),
    )
