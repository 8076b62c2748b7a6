"""Measure a model on rows: loss on the references, scores of its own answers, KL to a teacher on its own samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from promptkd.data.encode import EncodedExample
from promptkd.evaluation.bootstrap import mean_interval, token_mean_interval
from promptkd.evaluation.likelihood import kl_nats, reference_nats
from promptkd.evaluation.text_metrics import answer_scores
from promptkd.generation import Decoding, generate, row_seeds
from promptkd.models import vocabulary_size
from promptkd.results import Evaluation, Metric, RowResult

__all__ = [
    "REFERENCES_AT_A_TIME",
    "Decoding",
    "decode_rows",
    "evaluate_model",
    "measure_rows",
    "row_batches",
    "row_results",
    "summarize",
]

T = TypeVar("T")
REFERENCES_AT_A_TIME = 32
"""Rows whose references are scored together."""
_OF_THE_REFERENCES = ("loss",)  # figures that no decoding takes part in


def row_batches(rows: Sequence[EncodedExample], size: int) -> list[list[int]]:
    """Places in `rows`, `size` at a time, the longest prompts first.

    Validation and `promptkd evaluate` both measure in these batches. In bfloat16 the rows that share a batch decide
    how products are rounded, and so, now and then, which token is drawn: other batches would give other answers.
    """
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].prompt_ids), rows[place].row))
    return [order[first : first + size] for first in range(0, len(order), size)]


def _in_order(batches: Sequence[list[int]], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """What `work` makes of the rows at the places of every batch, in the order of the rows."""
    made: dict[int, T] = {}
    for places in batches:
        made |= zip(places, work(places), strict=True)
    return [made[place] for place in range(len(made))]


def measure_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    decoding: Decoding,
    *,
    teacher: nn.Module | None = None,
    samples_per_row: int = 1,
    batch_size: int = 8,
) -> list[RowResult]:
    """Scores of `model` row by row.

    With a teacher, KL(model || teacher) is taken on responses sampled at temperature 1: the answers themselves, unless
    these were decoded otherwise. `samples_per_row` samples, of seeds from `decoding.seed` on, are taken of each row.
    """
    if not rows:
        return []

    batches = row_batches(rows, decoding.batch_size)

    def at(places: list[int]) -> list[EncodedExample]:
        return [rows[place] for place in places]

    def decoded(how: Decoding) -> list[list[int]]:
        return _in_order(batches, lambda places: decode_rows(model, tokenizer, at(places), how))

    def kl_to(teacher: nn.Module, seed: int) -> list[tuple[float, int]]:
        plain = decoding.plain(seed)
        samples = answers if plain == decoding else decoded(plain)

        def nats(places: list[int]) -> list[float]:
            own = [samples[place] for place in places]
            return kl_nats(model, teacher, tokenizer, at(places), own, batch_size=batch_size)

        return [(kl, len(sample)) for kl, sample in zip(_in_order(batches, nats), samples, strict=True)]

    answers = decoded(decoding)
    vocabulary = vocabulary_size(tokenizer)
    losses = _in_order(
        row_batches(rows, REFERENCES_AT_A_TIME),
        lambda places: reference_nats(model, at(places), vocabulary=vocabulary, batch_size=batch_size),
    )
    kls = []
    if teacher is not None and teacher is not model:
        kls = [kl_to(teacher, decoding.seed + draw) for draw in range(samples_per_row)]
    return row_results(tokenizer, rows, answers, decoding, losses=losses, kls=kls)


def decode_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedExample], decoding: Decoding
) -> list[list[int]]:
    """The answers' token ids, in the order of `rows`, the stop id at the end where one was written."""
    # Seeds follow the row's place in its file, so that a part of the file gets the answers it gets in the whole.
    seeds = row_seeds(decoding.seed, max(row.row for row in rows) + 1)
    return generate(
        model,
        [row.prompt_ids for row in rows],
        replace(decoding, vocabulary=vocabulary_size(tokenizer)),
        seeds=[seeds[row.row] for row in rows],
        batch_size=decoding.batch_size,
    )


def row_results(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    answers: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    losses: Sequence[float],
    kls: Sequence[Sequence[tuple[float, int]]] = (),
) -> list[RowResult]:
    """Each row with its answer and every score of it.

    Args:
        answers: token ids a row, as `decode_rows` gives them.
        losses: nats of the first reference, a row.
        kls: for each sample a row, a list of (nats, tokens) a row; empty without a teacher.
    """
    texts = [tokenizer.decode(list(answer), skip_special_tokens=True).strip() for answer in answers]
    scores = answer_scores(
        texts,
        [row.references for row in rows],
        answers,
        [len(row.response_ids) for row in rows],
        stop_ids=decoding.stop_ids,
        max_new_tokens=decoding.limits(1)[0],
    )
    results = []
    for index, row in enumerate(rows):
        wanted = len(row.response_ids)
        figures, tokens = {"loss": losses[index] / wanted}, {"loss": wanted, "length_ratio": wanted}
        if kls:
            tokens["kl_to_teacher"] = sum(sample[index][1] for sample in kls)
            figures["kl_to_teacher"] = sum(sample[index][0] for sample in kls) / tokens["kl_to_teacher"]
        results.append(
            RowResult(
                row=row.row,
                seed=None if decoding.is_greedy else decoding.seed,
                prompt=row.prompt,
                references=list(row.references),
                response=texts[index],
                scores=figures | scores[index],
                tokens=tokens,
            )
        )
    return results


def summarize(results: Sequence[RowResult]) -> dict[str, Metric]:
    """Means with 95 % intervals by bootstrap over rows; a row that was answered under several seeds is averaged first.

    A score that is a mean over tokens weighs every token alike, of all seeds. `Metric.deviation` is the standard
    deviation (of a sample, over n - 1) between the seeds' figures.

    Args:
        results: the same rows, in the same order, under every seed.
    """
    by_seed: dict[int | None, list[RowResult]] = {}
    for result in results:
        by_seed.setdefault(result.seed, []).append(result)
    return {name: _metric(name, list(by_seed.values())) for name in results[0].scores}


def _metric(name: str, by_seed: list[list[RowResult]]) -> Metric:
    scores = np.array([[each.scores[name] for each in results] for results in by_seed])  # (seeds, rows)
    if name in by_seed[0][0].tokens:
        tokens = np.array([[each.tokens[name] for each in results] for results in by_seed])
        sums = scores * tokens
        metric = token_mean_interval(sums.sum(0), tokens.sum(0))
        of_seeds = sums.sum(1) / tokens.sum(1)
    else:
        metric = mean_interval(scores.mean(0))
        of_seeds = scores.mean(1)
    if len(by_seed) > 1 and name not in _OF_THE_REFERENCES:
        metric.deviation = float(of_seeds.std(ddof=1))
    return metric


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    decoding: Decoding,
    *,
    model_label: str,
    data_label: str,
    teacher: nn.Module | None = None,
    samples_per_row: int = 1,
    batch_size: int = 8,
) -> Evaluation:
    """`measure_rows` as a record for `results.json`."""
    results = measure_rows(
        model,
        tokenizer,
        rows,
        decoding,
        teacher=teacher,
        samples_per_row=samples_per_row,
        batch_size=batch_size,
    )
    return Evaluation(
        model=model_label,
        data=data_label,
        decoding=decoding.record([decoding.seed]),
        metrics=summarize(results),
        samples=results,
    )
