"""Exposure bias: how much more a student errs on its own continuations than on the teacher's.

An error is KL(teacher || student) behind the request and the first t - 1 tokens of a continuation. What is made of the
errors, and how rows that have ended are counted, stands in `accumulated_error.py`.

Continuations are sampled from the whole distribution at temperature 1: the definition's expectations are over what the
models themselves would write. With a soft prompt the teacher is the prompted one throughout: its continuations are
sampled, and its distribution is compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from promptkd.data.batch import right_pad
from promptkd.engine import evaluating, head_logits, response_hidden
from promptkd.errors import PromptKDError, RequestError
from promptkd.evaluation.accumulated_error import Ended, Floats, excess_accumulated_error
from promptkd.evaluation.bootstrap import token_mean_interval
from promptkd.generation import SamplingParams, generate, row_seeds
from promptkd.objectives import forward_kl
from promptkd.results import CurvePoint, Metric

__all__ = ["ExposureBias", "exposure_bias", "sample_continuations", "token_errors"]

Samples = Sequence[Sequence[Sequence[int]]]
"""Token ids of continuations: samples[row][draw]."""

_CHUNK = 256
"""Tokens whose logits are held at a time."""


@dataclass(frozen=True)
class ExposureBias:
    """The curve of one student, and the errors themselves, of which a percentage says nothing."""

    points: list[CurvePoint]
    """ExAccErr in % at l = 1, 2, … up to the longest continuation."""
    on_student: Metric
    """KL(teacher || student) in nats a token, over all tokens of the student's continuations."""
    on_teacher: Metric
    """The same over those of the teacher's."""


def sample_continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_row: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    rows: Sequence[int] | None = None,
    seed: int = 10,
    prompt: Tensor | None = None,
    vocabulary: int | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Several continuations of each request at temperature 1, samples[row][draw].

    Draw d of a row has the seed that `promptkd evaluate` gives the row under seed `seed` + d. It is the same for every
    model: common random numbers, which make what two models share cancel in their comparison.

    Args:
        rows: each request's index in its file, from which its seeds follow; by default 0, 1, …
        prompt: (n, E) soft prompt before the model.
        max_new_tokens, stop_ids, vocabulary: as in `SamplingParams`.
        batch_size, on_batch: as in `generate`.
    """
    places = range(len(prompts)) if rows is None else rows
    by_draw = [row_seeds(seed + draw, max(places, default=0) + 1) for draw in range(samples_per_row)]
    written = generate(
        model,
        [each for each in prompts for _ in by_draw],
        SamplingParams(max_new_tokens=max_new_tokens, stop_ids=stop_ids, vocabulary=vocabulary),
        seeds=[seeds[place] for place in places for seeds in by_draw],
        prompt=prompt,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return [written[first : first + samples_per_row] for first in range(0, len(written), samples_per_row)]


def exposure_bias(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Sequence[int]],
    student_samples: Samples,
    teacher_samples: Samples,
    *,
    prompt: Tensor | None = None,
    vocabulary: int | None = None,
    ended: Ended = "leave",
    batch_size: int = 8,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    on_batch: Callable[[int], None] | None = None,
) -> ExposureBias:
    """ExAccErr of `student` over continuations that are given; `sample_continuations` draws them.

    Args:
        prompts: token ids of the requests.
        student_samples: continuations that the student wrote, samples[row][draw].
        teacher_samples: those of the teacher, under `prompt` if there is one; the same serve every student.
        prompt: (n, E) soft prompt before the teacher.
        vocabulary: compare the first so many ids; the further columns of a padded head mean nothing.
        ended, resamples, seed, level: as in `excess_accumulated_error`.
        batch_size: continuations that are scored at a time.
        on_batch: called with the number of continuations scored so far, the student's and the teacher's.

    Raises:
        RequestError: unequal numbers of rows, or as `excess_accumulated_error`.
        PromptKDError: a model gives a KL that is not finite.
    """
    if not len(prompts) == len(student_samples) == len(teacher_samples):
        raise RequestError(
            "Every request needs continuations of the student and of the teacher. "
            f"Got {len(prompts)} requests, {len(student_samples)} and {len(teacher_samples)}."
        )
    together = [[*mine, *theirs] for mine, theirs in zip(student_samples, teacher_samples, strict=True)]
    errors = token_errors(
        student, teacher, prompts, together, prompt=prompt, vocabulary=vocabulary, batch_size=batch_size,
        on_batch=on_batch,
    )  # fmt: skip
    on_student = [row[: len(mine)] for row, mine in zip(errors, student_samples, strict=True)]
    on_teacher = [row[len(mine) :] for row, mine in zip(errors, student_samples, strict=True)]
    points = excess_accumulated_error(on_student, on_teacher, ended=ended, resamples=resamples, seed=seed, level=level)
    means = [
        token_mean_interval(
            [sum(map(np.sum, row)) for row in each],
            [sum(map(len, row)) for row in each],
            resamples=resamples,
            seed=seed,
            level=level,
        )
        for each in (on_student, on_teacher)
    ]
    return ExposureBias(points, *means)


def token_errors(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Sequence[int]],
    samples: Samples,
    *,
    prompt: Tensor | None = None,
    vocabulary: int | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Floats]]:
    """KL(teacher || student) behind every context of every continuation, in nats: errors[row][draw][token].

    The first entry is the error behind the request alone, the last that at the stop token (or at the limit). Arguments
    as in `exposure_bias`. Logits are held for some hundred tokens at a time.
    """
    flat = [(row, draw) for row, drawn in enumerate(samples) for draw in range(len(drawn))]
    flat.sort(key=lambda place: len(prompts[place[0]]) + len(samples[place[0]][place[1]]))  # like lengths together
    errors = [[np.empty(0) for _ in drawn] for drawn in samples]
    device = next(student.parameters()).device
    with torch.no_grad(), evaluating(student), evaluating(teacher):
        for first in range(0, len(flat), batch_size):
            places = flat[first : first + batch_size]
            chosen = [samples[row][draw] for row, draw in places]
            batch = right_pad([prompts[row] for row, _ in places], chosen, device=device)
            mine, theirs = response_hidden(student, batch), response_hidden(teacher, batch, prompt)
            values = _kl(student, teacher, mine, theirs, vocabulary).split([len(each) for each in chosen])
            for (row, draw), value in zip(places, values, strict=True):
                errors[row][draw] = value.double().cpu().numpy()
                if not np.isfinite(errors[row][draw]).all():
                    raise PromptKDError(f"The KL(teacher || student) is not finite in row {row}, continuation {draw}.")
            if on_batch is not None:
                on_batch(first + len(places))
    return errors


def _kl(student: nn.Module, teacher: nn.Module, mine: Tensor, theirs: Tensor, vocabulary: int | None) -> Tensor:
    """(N,) KL(teacher || student) from hidden states (N, H)."""
    parts = [
        forward_kl(head_logits(student, own, vocabulary=vocabulary), head_logits(teacher, other, vocabulary=vocabulary))
        for own, other in zip(mine.split(_CHUNK), theirs.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts)
