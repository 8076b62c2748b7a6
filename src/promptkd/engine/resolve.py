"""Which engine runs a model, and which of its implementations: each is held to the reference before it is used.

A verdict is kept for a model, its device, the precision of its weights and of its matrix products, and its attention:
what agrees in float32 on a CPU may not in bfloat16 on a GPU.
"""

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batch import right_pad
from promptkd.engine.backbone import embedding_device, evaluating, joined, model_matmul_dtype
from promptkd.engine.base import Decoder, Engine, Scorer
from promptkd.engine.checks import reads_embeddings, reason_of
from promptkd.engine.reference import REFERENCE
from promptkd.errors import RequestError

VARIABLE = "PROMPTKD_ENGINE"
ENGINES = ("reference", "cpu", "cuda")

# Of four tokens, by number. Of different lengths, so that there is padding on both sides, and of the same, so that rows
# may share a cache.
_PROMPTS, _RESPONSES = [[0, 1, 2], [3], [2, 1, 0]], [[1, 0], [2, 1, 3], [3]]
_CONTEXT = [3, 0, 2, 1, 3, 0]  # of more tokens than what follows it, so that rows share most of theirs
_DRAWS = 4  # of rounding, by which the reference's own spread is measured
_LOGGER = logging.getLogger(__name__)
_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()

Way = TypeVar("Way", Scorer, Decoder)


def engine_for(device: torch.device) -> Engine:
    """The engine for models on `device`, unless `PROMPTKD_ENGINE` names another that can run them."""
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in ENGINES:
        raise RequestError(f"{VARIABLE} must be one of {', '.join(ENGINES)}. Got {asked!r}.")
    if asked in ("cpu", "cuda") and asked != device.type:
        raise RequestError(
            f"{VARIABLE}={asked} was asked for, and a model is on {device}. Leave it out, or set it to reference."
        )
    return REFERENCE if asked == "reference" else _of_kind(device.type)


@cache
def _of_kind(kind: str) -> Engine:
    """The engine for a kind of device, whose package is imported at its first use."""
    return import_module(f"promptkd.engine.{kind}").ENGINE if kind in ("cpu", "cuda") else REFERENCE


def first_verified(candidates: Sequence[Way], model: PreTrainedModel) -> Way:
    """The first candidate that supports the model and agrees with the last one, which is the reference."""
    reference = candidates[-1]
    trial: Callable[[Any, PreTrainedModel], Tensor] = _decode_trial if isinstance(reference, Decoder) else _score_trial
    expected = _Reference(partial(trial, reference, model))  # for all that need a trial now
    for candidate in candidates[:-1]:
        if candidate.supports(model) and _is_verified(candidate, partial(trial, candidate, model), expected, model):
            return candidate
    return reference


def rolls_back(candidates: Sequence[Decoder], model: PreTrainedModel) -> bool:
    """Whether the decoder that `first_verified` takes extends and rolls back rows as the last candidate does."""
    decoder, reference = first_verified(candidates, model), candidates[-1]
    if decoder is reference:
        return True
    trials = partial(_rollback_trial, decoder, model), _Reference(partial(_rollback_trial, reference, model))
    told = "%s is not rolled back by %s on %s, so that a teacher checks one proposed token per pass: %s"
    return not _problem_told(decoder, *trials, model, told)


class _Reference:
    """A trial of the reference, whose result is computed once, when it is needed."""

    def __init__(self, trial: Callable[[], Tensor]):
        self.trial = trial

    @cached_property
    def result(self) -> Tensor:
        return self.trial()


def _is_verified(candidate: Way, trial: Callable[[], Tensor], expected: _Reference, model: PreTrainedModel) -> bool:
    problem = _problem_told(candidate, trial, expected, model, "%s is not run by %s on %s: %s")
    if problem:
        candidate.forget(model)
    return not problem


def _problem_told(
    candidate: Way, trial: Callable[[], Tensor], expected: _Reference, model: PreTrainedModel, told: str
) -> bool:
    """Whether the trial differs from what is expected; the first time, it is run, and the log is `told` a problem."""
    verdicts = _verdicts.setdefault(model, {})
    weight, attention = model.get_input_embeddings().weight, str(model.config._attn_implementation)
    key = (told, candidate.name, weight.device, weight.dtype, model_matmul_dtype(model), attention)
    if key not in verdicts:
        problem = _problem(trial, expected, model)
        verdicts[key] = bool(problem)
        if problem:
            _LOGGER.warning(told, type(model).__name__, candidate.name, weight.device.type, problem)
    return verdicts[key]


def _problem(trial: Callable[[], Tensor], reference: _Reference, model: PreTrainedModel) -> str:
    """What keeps a candidate from running the model; "" if its trial agrees with that of the reference."""
    # Autocast's cache would keep casts made here, without a graph, for the pass that asked for this trial.
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), evaluating(model):
            expected = reference.result
            try:
                got = trial()
            except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):  # says nothing about the candidate
                raise
            except Exception as error:  # an unknown architecture may answer an unexpected call with any
                return reason_of(error)
            eps = torch.finfo(model_matmul_dtype(model)).eps
            gaps, limits = _row_gaps(got, expected), torch.tensor(max(1e-3, eps**0.5))
            if eps > 1e-4 and not bool((gaps <= limits).all()):
                limits = limits.maximum(2 * _spread(reference, model, eps / 2))
    finally:
        torch.set_autocast_cache_enabled(caches)
    return "" if bool((gaps <= limits).all()) else f"it differs by {float(gaps.max()):.1e}."  # NaN differs, too


def _row_gaps(got: Tensor, expected: Tensor) -> Tensor:
    """The relative error of each row (…, D) on the CPU: averaged, one wrong row would be lost among the others."""
    sizes = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return ((got - expected).norm(dim=-1) / sizes).cpu()


def _spread(reference: _Reference, model: PreTrainedModel, rounding: float) -> Tensor:
    """By how much each row of the reference moves if its embeddings are rounded otherwise, at most over a few draws.

    In half precision a deep model can lose all digits of a row: where two tokens compete to be the attention sink, one
    rounding decides, and the reference is then as far from the truth as from any other implementation.
    """
    draw = torch.Generator().manual_seed(0)

    def round_otherwise(module: Any, args: Any, embedded: Tensor) -> Tensor:
        factors = 1 + rounding * (2 * torch.rand(embedded.shape, generator=draw) - 1)
        return (embedded.float() * factors.to(embedded.device)).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(round_otherwise)
    try:
        return torch.stack([_row_gaps(reference.trial(), reference.result) for _ in range(_DRAWS)]).amax(dim=0)
    finally:
        hook.remove()


def _tokens(model: PreTrainedModel) -> list[int]:
    """Four ids from the middle of the vocabulary: the first and last ones are special tokens, which are ill-conditioned
    in half precision."""
    size = model.get_input_embeddings().num_embeddings
    return [size * part // 7 for part in (2, 3, 4, 5)]


def _of_tokens(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    ids = _tokens(model)
    return [[ids[each] for each in row] for row in rows]


def _tensors(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(_of_tokens(model, rows), device=embedding_device(model))


def _score_trial(scorer: Scorer, model: PreTrainedModel) -> Tensor:
    """Hidden states of a few rows, with and without a soft prompt if the model takes one, and after one context."""
    prompts, responses, [context] = (_of_tokens(model, each) for each in (_PROMPTS, _RESPONSES, [_CONTEXT]))
    batch = right_pad(prompts, responses, device=embedding_device(model))
    prompt, after = _soft_prompt(model), batch.with_prompts([[*context, *each] for each in prompts])
    prompted = [] if prompt is None else [scorer.hidden(model, batch, prompt)]
    return joined([*prompted, scorer.hidden(model, batch, None), scorer.hidden(model, after, prompt)]).float()


def _decode_trial(decoder: Decoder, model: PreTrainedModel) -> Tensor:
    """Logits of three rows over two tokens, of two of them, in another order, over a third, of one over a fourth."""
    prompts, [tokens] = _of_tokens(model, _PROMPTS), _tensors(model, [[2, 1, 3, 0, 1]])
    with decoder.open(model, len(prompts), None) as sessions, sessions(4) as session:
        logits = [session.prefill(prompts, _soft_prompt(model)).clone()]
        logits += [session.decode(tokens[step : step + 3]).clone() for step in range(2)]
        for kept, step in (([2, 1], 3), ([1], 4)):
            session.select(kept)
            logits.append(session.decode(tokens[step - len(kept) + 1 : step + 1]).clone())
    return torch.cat(logits).float()


def _rollback_trial(decoder: Decoder, model: PreTrainedModel) -> Tensor:
    """Logits of rows that are extended and rolled back, each by another number of tokens, twice; then rows leave."""
    prompts, tokens = _of_tokens(model, _PROMPTS), _tensors(model, [[2, 1, 3], [0, 1, 2], [3, 0, 1]])
    with decoder.open(model, len(prompts), None) as sessions, sessions(9) as session:
        logits = [session.prefill(prompts, _soft_prompt(model))[:, None].clone()]
        for extended, kept in ((tokens, [0, 1, 2]), (tokens[:, :2], [2, 1, 0])):
            logits.append(session.extend(extended).clone())
            session.rollback([extended.shape[1] - each for each in kept])
        session.select([2, 1])
        for extended in (tokens[:2, 2:], tokens[1:]):
            logits.append(session.extend(extended).clone())
    return torch.cat([each.flatten(0, 1) for each in logits]).float()


def _soft_prompt(model: PreTrainedModel) -> Tensor | None:
    if not reads_embeddings(model):
        return None
    return model.get_input_embeddings()(_tensors(model, [[0, 1]])[0])
