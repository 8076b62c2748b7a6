"""Exposure bias: how much more a student errs on its own continuations than on the teacher's.

An error is KL(teacher || student) after the request and the first t - 1 tokens of a continuation. Continuations are
sampled from the whole distribution at temperature 1: the definition's expectations are over what the models themselves
would write. With a soft prompt the teacher is the prompted one throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from promptkd.engine import Vocabulary, evaluating
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.accumulated_error import Ended, excess_accumulated_error
from promptkd.evaluation.measure import TokenIds, batches_by_length, token_divergences
from promptkd.evaluation.statistics import DEFAULT, Bootstrap, Floats, token_mean_interval
from promptkd.generation import Decoding, generate, row_seeds
from promptkd.objectives import forward_kl
from promptkd.results import CurvePoint, Metric

Samples = Sequence[Sequence[TokenIds]]  # continuations: samples[row][draw]


@dataclass(frozen=True)
class ExposureBias:
    """The curve of one student, and the errors themselves, whose size a percentage does not show."""

    points: list[CurvePoint]  # ExAccErr in % at l = 1, 2, … up to the longest continuation
    on_student: Metric  # KL(teacher || student) in nats per token, over all tokens of the student's continuations
    on_teacher: Metric


@dataclass(frozen=True)
class Scoring:
    """How continuations are scored."""

    prompt: Tensor | None = None  # (n, E) soft prompt before the teacher
    vocabulary: Vocabulary | int | None = None  # compare these, or the first so many ids, as heads may be padded
    batch_size: int = 8
    on_batch: Callable[[int], None] | None = None  # called with the number of continuations of both scored so far
    contexts: Sequence[TokenIds | None] | None = None  # of each request, what the teacher reads in its place


def sample_continuations(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    decoding: Decoding,
    *,
    samples_per_row: int,
    rows: Sequence[int] | None = None,
    prompt: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Several continuations of each request at temperature 1, `samples[row][draw]`.

    Draw d of a row has the seed that `promptkd evaluate` gives the row under seed `decoding.seed` + d. It is the same
    for every model: common random numbers, whose effect on both models cancels in their comparison. `decoding`'s
    temperature and cut-offs are not used; `rows` are the requests' indices in their file, by default 0, 1, …; `prompt`
    is an (n, E) soft prompt before the model.
    """
    indices = range(len(prompts)) if rows is None else rows
    by_draw = [row_seeds(decoding.seed + draw, max(indices, default=0) + 1) for draw in range(samples_per_row)]
    seeds = [by_row[index] for index in indices for by_row in by_draw]
    repeated, size = [each for each in prompts for _ in by_draw], decoding.batch_size
    decoding = decoding.plain(decoding.seed)
    written = generate(model, repeated, decoding, seeds=seeds, prompt=prompt, batch_size=size, on_batch=on_batch)
    return [written[first : first + samples_per_row] for first in range(0, len(written), samples_per_row)]


def exposure_bias(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[TokenIds],
    student_samples: Samples,
    teacher_samples: Samples,
    scoring: Scoring = Scoring(),
    *,
    ended: Ended = "leave",
    bootstrap: Bootstrap = DEFAULT,
) -> ExposureBias:
    """ExAccErr of `student` over given continuations, token ids as `samples[row][draw]` of `sample_continuations`.

    The teacher's are written under `scoring.prompt` if there is one; the same serve every student. `ended`, `bootstrap`
    and errors are those of `excess_accumulated_error`. Raises `PromptKDError` for a KL that is not finite.
    """
    if not len(prompts) == len(student_samples) == len(teacher_samples):
        got = f"Got {len(prompts)} requests, {len(student_samples)} and {len(teacher_samples)}."
        raise RequestError(f"Every request needs continuations of the student and of the teacher. {got}")
    together = [[*mine, *theirs] for mine, theirs in zip(student_samples, teacher_samples, strict=True)]
    errors = token_errors(student, teacher, prompts, together, scoring)
    rows = list(zip(errors, map(len, student_samples), strict=True))
    on_student, on_teacher = [row[:count] for row, count in rows], [row[count:] for row, count in rows]
    points = excess_accumulated_error(on_student, on_teacher, ended=ended, bootstrap=bootstrap)
    means = [
        token_mean_interval([sum(map(np.sum, row)) for row in each], [sum(map(len, row)) for row in each], bootstrap)
        for each in (on_student, on_teacher)
    ]
    return ExposureBias(points, *means)


def token_errors(
    student: nn.Module, teacher: nn.Module, prompts: Sequence[TokenIds], samples: Samples, scoring: Scoring = Scoring()
) -> list[list[Floats]]:
    """KL(teacher || student) in nats as `errors[row][draw][token]`, from that after the request alone."""
    places = [(row, draw) for row, drawn in enumerate(samples) for draw in range(len(drawn))]
    contexts = [None] * len(prompts) if scoring.contexts is None else scoring.contexts
    flat_prompts, flat_samples = [prompts[row] for row, _ in places], [samples[row][draw] for row, draw in places]
    errors, done = [[np.empty(0)] * len(drawn) for drawn in samples], 0
    with torch.no_grad(), evaluating(student), evaluating(teacher):
        for indices, batch in batches_by_length(flat_prompts, flat_samples, scoring.batch_size, student):
            read = batch.with_prompts([contexts[places[index][0]] for index in indices])
            vocabulary, prompt = scoring.vocabulary, scoring.prompt
            divergences = token_divergences(forward_kl, student, teacher, batch, vocabulary, prompt, read=read)
            for index, values in zip(indices, divergences.split(batch.response_lengths), strict=True):
                row, draw = places[index]
                errors[row][draw] = values.double().cpu().numpy()
                if not np.isfinite(errors[row][draw]).all():
                    raise PromptKDError(f"The KL(teacher || student) is not finite in row {row}, continuation {draw}.")
            done += len(indices)
            if scoring.on_batch is not None:
                scoring.on_batch(done)
    return errors
