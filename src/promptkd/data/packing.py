"""Prompts and responses as one rectangle of tokens, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenBatch", "right_pad"]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of prompt + response, padded on the right. Positions decide what is scored, never token ids.

    Padding stands behind every real token, where a causal model cannot see it, so its id means nothing.
    """

    input_ids: Tensor
    """(B, T)"""
    rows: Tensor
    """(N,) the row of each response token, in row-major order."""
    columns: Tensor
    """(N,) the column that predicts each response token: the one before it."""
    targets: Tensor
    """(N,) the response tokens."""
    lengths: tuple[int, ...]
    """Real tokens of each row."""

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
        return [self._between(start, end) for start, end in zip(starts, ends, strict=True)]

    def _between(self, start: int, end: int) -> "TokenBatch":
        inside = (self.rows >= start) & (self.rows < end)
        lengths = self.lengths[start:end]
        ids = self.input_ids[start:end, : max(lengths)]
        return TokenBatch(ids, self.rows[inside] - start, self.columns[inside], self.targets[inside], lengths)

    def by_row(self, values: Tensor) -> Tensor:
        """Values of the response tokens, (N,), as (B, length of the longest response); 0 where a row has none."""
        counts = torch.bincount(self.rows, minlength=self.input_ids.shape[0])  # (B,)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]
        table = values.new_zeros(self.input_ids.shape[0], int(counts.max()))
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
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = [*prompt, *response]
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        rows.extend([row] * len(response))
        columns.extend(range(len(prompt) - 1, len(tokens) - 1))
        targets.extend(response)
    return TokenBatch(
        input_ids=input_ids.to(device),
        rows=torch.tensor(rows, dtype=torch.long, device=device),
        columns=torch.tensor(columns, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        lengths=tuple(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)),
    )
