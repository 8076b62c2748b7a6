"""What is measured of rows: losses and divergences of models, answers and their scores; and the metrics of all rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from promptkd.data.batch import TokenBatch, right_pad
from promptkd.data.encode import EncodedExample
from promptkd.engine import Vocabulary, embedding_device, evaluating, head_logits, response_hidden, unwrap_peft
from promptkd.evaluation.rouge_tokenizer import DEFAULT, Tokenize
from promptkd.evaluation.statistics import mean_interval, token_mean_interval
from promptkd.evaluation.text_metrics import exact_match_scores, form_scores, rouge_scores
from promptkd.generation import Decoding, generate, row_seeds
from promptkd.models import vocabulary_size
from promptkd.objectives import reverse_kl
from promptkd.results import Evaluation, Metric, RowResult

TokenIds = Sequence[int]
Rows = Sequence[EncodedExample]
OF_REFERENCES = frozenset({"loss"})  # measured on the references: the same however answers are decoded
BY_REFERENCES = ("loss", "rouge_l", "rouge_1", "exact_match", "length_ratio")  # not measured of rows without any
MEASURED = (  # of every model; with a teacher kl_to_teacher too
    *("loss", "rouge_l", "rouge_1", "exact_match", "eos_share", "cut_share", "response_length", "length_ratio"),
    *("distinct_1", "distinct_2"),
)
_TOKENS_AT_A_TIME = 256


def has_references(rows: Rows) -> bool:
    """Whether rows can be measured by references of theirs: all have some, or none has."""
    return any(row.response_ids for row in rows)


def row_batches(rows: Rows, size: int) -> list[list[EncodedExample]]:
    """`size` rows at a time, the longest prompts first.

    In bfloat16 the rows that share a batch decide how products are rounded, and so, now and then, which token is drawn.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.row))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def decode_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows, decoding: Decoding
) -> list[list[int]]:
    """The answers' token ids, in the order of `rows`, the stop id at the end where one was generated."""
    # Seeds follow the row's place in its file, so that a subset of the file gets the answers of the whole.
    seeds = row_seeds(decoding.seed, max(row.row for row in rows) + 1)
    prompts, own = [row.prompt_ids for row in rows], [seeds[row.row] for row in rows]
    decoding = replace(decoding, vocabulary=vocabulary_size(tokenizer))
    return generate(model, prompts, decoding, seeds=own, batch_size=decoding.batch_size)


def row_results(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    answers: Sequence[TokenIds],
    decoding: Decoding,
    *,
    losses: Sequence[float],
    kls: Sequence[Sequence[tuple[float, int]]],
    tokenize: Tokenize,
) -> list[RowResult]:
    """Each row with its answer and every score of it.

    `tokenize` gives ROUGE's tokens, `losses` are nats of the first references, empty where there are none; `kls` per
    sample (nats, tokens) of every row, empty without a teacher.
    """
    texts = [tokenizer.decode(list(answer), skip_special_tokens=True).strip() for answer in answers]
    references = [row.references for row in rows]
    if losses:
        rouge = rouge_scores(texts, references, kinds=("rougeL", "rouge1"), tokenize=tokenize)
        exact = exact_match_scores(texts, references)
    limit, seed, results = decoding.limits(1)[0], None if decoding.is_greedy else decoding.seed, []
    for index, row in enumerate(rows):
        wanted = len(row.response_ids)
        scores: dict[str, float] = {}
        tokens: dict[str, int] = {}
        if losses:
            scores, tokens = {"loss": losses[index] / wanted}, {"loss": wanted, "length_ratio": wanted}
        if kls:
            tokens["kl_to_teacher"] = sum(sample[index][1] for sample in kls)
            scores["kl_to_teacher"] = sum(sample[index][0] for sample in kls) / tokens["kl_to_teacher"]
        if losses:
            scores |= {"rouge_l": rouge["rougeL"][index], "rouge_1": rouge["rouge1"][index]}
            scores["exact_match"] = exact[index]
        scores |= form_scores(answers[index], wanted, stop_ids=decoding.stop_ids, max_new_tokens=limit)
        request: dict[str, Any] = {"row": row.row, "prompt": row.prompt, "references": list(row.references)}
        request["request"] = list(row.request)
        results.append(RowResult(**request, seed=seed, response=texts[index], scores=scores, tokens=tokens))
    return results


def evaluation_of(
    results: Sequence[RowResult],
    decoding: Decoding,
    seeds: Sequence[int],
    *,
    model: str,
    data: str,
    rouge_tokenizer: str = DEFAULT,
) -> Evaluation:
    """`results` with their metrics; `model` and `data` are labels."""
    return Evaluation(
        model=model,
        data=data,
        decoding=decoding.record(seeds),
        rouge_tokenizer=rouge_tokenizer,
        metrics=summarize(results),
        samples=list(results),
    )


def summarize(results: Sequence[RowResult]) -> dict[str, Metric]:
    """Means with 95 % intervals by bootstrap over rows, which are the same, in the same order, under every seed.

    A row with answers under several seeds is averaged first; a score that is a mean over tokens weighs all tokens of
    all seeds equally. `Metric.deviation` is the standard deviation (over n - 1) between the seeds' metrics. A score
    that some seeds lack, as the KL with `kl_seeds`, is summarized over the others.
    """
    every = [[each for each in results if each.seed == seed] for seed in dict.fromkeys(each.seed for each in results)]
    metrics = {}
    for name in dict.fromkeys(name for own in every for name in own[0].scores):
        by_seed = [own for own in every if name in own[0].scores]
        scores = np.array([[each.scores[name] for each in own] for own in by_seed])  # (seeds, rows)
        if name in results[0].tokens:
            tokens = np.array([[each.tokens[name] for each in own] for own in by_seed])
            sums = scores * tokens
            metrics[name], of_seeds = token_mean_interval(sums.sum(0), tokens.sum(0)), sums.sum(1) / tokens.sum(1)
        else:
            metrics[name], of_seeds = mean_interval(scores.mean(0)), scores.mean(1)
        if len(by_seed) > 1 and name not in OF_REFERENCES:
            metrics[name].deviation = float(of_seeds.std(ddof=1))
    return metrics


def reference_nats(model: nn.Module, rows: Rows, vocabulary: Vocabulary | int, batch_size: int) -> list[float]:
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
    rows: Rows,
    samples: Sequence[TokenIds],
    vocabulary: Vocabulary | int,
    batch_size: int,
) -> list[float]:
    """Σ over the tokens of a row's sample of KL(model || teacher), each over the `vocabulary`, in nats.

    The teacher reads the context that a row has for it.
    """
    prompts, contexts = [row.prompt_ids for row in rows], [row.teacher_prompt_ids for row in rows]
    with torch.no_grad(), evaluating(model), evaluating(teacher):
        scored = []
        for indices, batch in batches_by_length(prompts, samples, batch_size, model):
            read = batch.with_prompts([contexts[index] for index in indices])
            values = token_divergences(reverse_kl, model, teacher, batch, vocabulary, read=read)
            scored.append((indices, batch, values))
        return _sums_by_row(scored)


def token_divergences(
    objective: Callable[[Tensor, Tensor], Tensor],
    student: nn.Module,
    teacher: nn.Module,
    batch: TokenBatch,
    vocabulary: Vocabulary | int | None,
    prompt: Tensor | None = None,
    *,
    read: TokenBatch | None = None,
) -> Tensor:
    """(N,) `objective` of both models' logits at each response token.

    The teacher reads `read` in place of the student's `batch`, after `prompt`, (n, E).
    """

    def divergences(*hidden: Tensor) -> Tensor:
        models = zip((student, teacher), hidden, strict=True)
        return objective(*(head_logits(model, states, vocabulary=vocabulary) for model, states in models))

    return _in_chunks(divergences, response_hidden(student, batch), response_hidden(teacher, read or batch, prompt))


def batches_by_length(
    prompts: Sequence[TokenIds], responses: Sequence[TokenIds], size: int, model: nn.Module
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows of similar length together on the model's device, with their indices."""
    device = embedding_device(unwrap_peft(model))
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
