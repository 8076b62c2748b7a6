"""The input of every variant of the step benchmark: the rows, and the length of each response.

Responses have the data's own lengths. A rollout samples as usual, but each row ends where the data's response ends. The
sampled text is then discarded and the data's response is scored, so that all variants score the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessor

from promptkd.data import encode_examples, read_examples
from promptkd.data.encode import EncodedExample

__all__ = ["EndAtLengths", "Shape", "workload"]


@dataclass(frozen=True)
class Shape:
    """Which rows to use, and the lengths to which the authors' implementation pads them."""

    max_length: int = 512
    max_prompt_length: int = 256
    batch_size: int = 8
    length_factor: int = 1
    """How many times every prompt and response is repeated."""


def workload(data: str, tokenizer, shape: Shape, template: str, *, first: int, steps: int) -> list[EncodedExample]:
    """Rows for `steps` steps, in the order of the data, starting at row `first` x batch size."""
    rows = encode_examples(
        read_examples(data),
        tokenizer,
        template,
        max_prompt_length=shape.max_prompt_length,
        max_response_length=shape.max_length - shape.max_prompt_length,
    ).examples
    # The same rows at every batch size: four times the batch uses the rows of four steps.
    start, count = first * shape.batch_size, steps * shape.batch_size
    chosen = [rows[index % len(rows)] for index in range(start, start + count)]
    times = shape.length_factor
    return [replace(row, prompt_ids=row.prompt_ids * times, response_ids=row.response_ids * times) for row in chosen]


class EndAtLengths(LogitsProcessor):
    """Row i of `generate` writes the end token as its `lengths[i]`-th token, and not before."""

    def __init__(self, lengths: Sequence[int], prompt_width: int, end: int, device: torch.device | str = "cpu"):
        self.lengths, self.prompt_width, self.end = torch.tensor(lengths, device=device), prompt_width, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt_width + 1
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.end] = torch.where(ends, 0.0, -torch.inf)
        return scores
