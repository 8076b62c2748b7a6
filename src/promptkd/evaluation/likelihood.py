"""What models' distributions say of given responses: the loss on references, the KL to a teacher on samples."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedExample
from promptkd.engine import evaluating, head_logits, response_hidden
from promptkd.models import shared_vocabulary_size
from promptkd.objectives import reverse_kl

__all__ = ["kl_nats", "reference_nats"]

_TOKENS_AT_A_TIME = 256


def reference_nats(
    model: nn.Module, rows: Sequence[EncodedExample], *, vocabulary: int, batch_size: int = 8
) -> list[float]:
    """-log q(first reference and its end | prompt) of each row, in nats.

    Args:
        vocabulary: the ids that mean something; the further columns of a padded head are left out.
    """
    nats = [0.0] * len(rows)
    with torch.no_grad(), evaluating(model):
        for indices, batch in _batches(rows, [row.response_ids for row in rows], batch_size, model):
            losses = [
                cross_entropy(head_logits(model, hidden, vocabulary=vocabulary), targets, reduction="none")
                for hidden, targets in _chunks(response_hidden(model, batch), batch.targets)
            ]
            _sum_by_row(torch.cat(losses), batch, indices, nats)
    return nats


def kl_nats(
    model: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    samples: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[float]:
    """Σ over the tokens of a row's sample of KL(model || teacher), each over the whole vocabulary, in nats."""
    nats = [0.0] * len(rows)
    vocabulary = shared_vocabulary_size(model, teacher, tokenizer)
    with torch.no_grad(), evaluating(model), evaluating(teacher):
        for indices, batch in _batches(rows, samples, batch_size, model):
            divergences = [
                reverse_kl(
                    head_logits(model, ours, vocabulary=vocabulary), head_logits(teacher, theirs, vocabulary=vocabulary)
                )
                for ours, theirs in _chunks(response_hidden(model, batch), response_hidden(teacher, batch))
            ]
            _sum_by_row(torch.cat(divergences), batch, indices, nats)
    return nats


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some tokens of every tensor at a time: logits of all tokens at once would take gigabytes."""
    return zip(*(tensor.split(_TOKENS_AT_A_TIME) for tensor in tensors), strict=True)


def _batches(
    rows: Sequence[EncodedExample], responses: Sequence[Sequence[int]], size: int, model: nn.Module
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows of like length together, with their indices."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt_ids) + len(responses[row]))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        prompts = [rows[row].prompt_ids for row in chosen]
        yield chosen, right_pad(prompts, [list(responses[row]) for row in chosen], device=device)


def _sum_by_row(values: Tensor, batch: TokenBatch, indices: list[int], into: list[float]) -> None:
    sums = torch.zeros(len(indices), dtype=torch.float64, device=values.device).index_add(
        0, batch.rows, values.double()
    )
    for index, value in zip(indices, sums.tolist(), strict=True):
        into[index] = value
