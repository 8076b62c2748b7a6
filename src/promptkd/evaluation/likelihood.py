"""Losses and divergences of models on given responses: the loss on references, the KL to a teacher on samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedExample
from promptkd.engine import evaluating, head_logits, response_hidden
from promptkd.models import shared_vocabulary_size
from promptkd.objectives import reverse_kl

Ids = Sequence[Sequence[int]]
_TOKENS_AT_A_TIME = 256


def reference_nats(
    model: nn.Module, rows: Sequence[EncodedExample], *, vocabulary: int, batch_size: int
) -> list[float]:
    """-log q(first reference and its end | prompt) of each row, in nats, q over the first `vocabulary` ids."""

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head_logits(model, hidden, vocabulary=vocabulary), targets, reduction="none")

    prompts, responses = [row.prompt_ids for row in rows], [row.response_ids for row in rows]
    with torch.no_grad(), evaluating(model):
        return _sums_by_row(
            (indices, batch, _in_chunks(loss, response_hidden(model, batch), batch.targets))
            for indices, batch in batches_by_length(prompts, responses, batch_size, model)
        )


def kl_nats(
    model: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    samples: Ids,
    *,
    batch_size: int,
) -> list[float]:
    """Σ over the tokens of a row's sample of KL(model || teacher), each over the whole vocabulary, in nats."""
    vocabulary, prompts = shared_vocabulary_size(model, teacher, tokenizer), [row.prompt_ids for row in rows]
    with torch.no_grad(), evaluating(model), evaluating(teacher):
        return _sums_by_row(
            (indices, batch, token_divergences(reverse_kl, model, teacher, batch, vocabulary=vocabulary))
            for indices, batch in batches_by_length(prompts, samples, batch_size, model)
        )


def token_divergences(
    objective: Callable[[Tensor, Tensor], Tensor],
    student: nn.Module,
    teacher: nn.Module,
    batch: TokenBatch,
    *,
    vocabulary: int | None,
    prompt: Tensor | None = None,
) -> Tensor:
    """(N,) `objective` of both models' logits, of the first `vocabulary` ids, at each response token.

    `prompt`: (n, E) soft prompt before the teacher.
    """

    def divergences(*hidden: Tensor) -> Tensor:
        models = zip((student, teacher), hidden, strict=True)
        return objective(*(head_logits(model, states, vocabulary=vocabulary) for model, states in models))

    return _in_chunks(divergences, response_hidden(student, batch), response_hidden(teacher, batch, prompt))


def batches_by_length(
    prompts: Ids, responses: Ids, size: int, model: nn.Module
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows of similar length together on the model's device, with their indices."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(responses[row]))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        yield rows, right_pad([prompts[row] for row in rows], [list(responses[row]) for row in rows], device=device)


def _in_chunks(score: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`score` of some tokens of every tensor at a time: logits of all tokens at once would take gigabytes."""
    chunks = zip(*(tensor.split(_TOKENS_AT_A_TIME) for tensor in tensors), strict=True)
    return torch.cat([score(*chunk) for chunk in chunks])


def _sums_by_row(scored: Iterable[tuple[list[int], TokenBatch, Tensor]]) -> list[float]:
    """The sum of each row's values (N,), in the order of the rows."""
    sums: dict[int, float] = {}
    for indices, batch, values in scored:
        zeros = torch.zeros(len(indices), dtype=torch.float64, device=values.device)
        sums |= zip(indices, zeros.index_add(0, batch.rows, values.double()).tolist(), strict=True)
    return [sums[row] for row in range(len(sums))]
