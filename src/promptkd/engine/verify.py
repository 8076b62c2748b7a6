"""One trial that holds a way of running a model to the reference, before it is used.

The verdict is kept for a model, a device, the weights' and the computing precision, and the model's own attention: what
agrees in float32 on a CPU may not in bfloat16 on a GPU.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batch import right_pad
from promptkd.engine.backbone import compute_dtype, embedding_device, evaluating
from promptkd.engine.base import Decoder, Scorer

__all__ = ["first_verified"]

Way = TypeVar("Way", Scorer, Decoder)
_PROMPTS, _RESPONSES = [[0, 1, 2], [3]], [[1, 0], [2, 1, 3, 0]]
_SOFT_PROMPT = 2  # vectors
_LOGGER = logging.getLogger(__name__)
_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def first_verified(ways: Sequence[Way], model: PreTrainedModel) -> Way:
    """The first of `ways` that supports the model and agrees with the last one, which is the reference."""
    reference = ways[-1]
    for way in ways[:-1]:
        if way.supports(model) and _is_verified(way, reference, model):
            return way
    return reference


def _is_verified(way: Any, reference: Any, model: PreTrainedModel) -> bool:
    verdicts = _verdicts.setdefault(model, {})
    weight = model.get_input_embeddings().weight
    key = (way.name, weight.device, weight.dtype, compute_dtype(model), str(model.config._attn_implementation))
    if key not in verdicts:
        verdicts[key] = _agrees(way, reference, model)
        if not verdicts[key] and isinstance(way, Decoder):
            way.forget(model)
    return verdicts[key]


def _agrees(way: Any, reference: Any, model: PreTrainedModel) -> bool:
    trial = _decoded if isinstance(way, Decoder) else _scored
    kind = embedding_device(model).type
    # Without its cache, autocast would keep copies made here, without a graph, for the pass that called for the trial.
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), evaluating(model):
            expected = trial(reference, model)
            try:
                got = trial(way, model)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # which say nothing about the way
                raise
            # What a foreign architecture makes of a call that it does not know can be any of these.
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
                _LOGGER.warning("%s is not run by %s on %s: %s", _name(model), way.name, kind, _line(error))
                return False
    finally:
        torch.set_autocast_cache_enabled(caches)
    tolerance = max(1e-3, torch.finfo(compute_dtype(model)).eps ** 0.5)
    gap = _gap(got, expected)
    if not gap <= tolerance:
        _LOGGER.warning("%s is not run by %s on %s: it differs by %.1e.", _name(model), way.name, kind, gap)
    return gap <= tolerance


def _gap(got: Tensor, expected: Tensor) -> float:
    """The largest relative distance of a row (…, D): one that is wrong is not lost among the others."""
    sizes = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((got - expected).norm(dim=-1) / sizes).max())


def _scored(scorer: Scorer, model: PreTrainedModel) -> Tensor:
    """Hidden states of two rows, without and with a soft prompt."""
    batch = right_pad(_PROMPTS, _RESPONSES, device=embedding_device(model))
    with_prompt = scorer.hidden(model, batch, _soft_prompt(model))
    return torch.cat([scorer.hidden(model, batch, None), with_prompt]).float()


def _decoded(decoder: Decoder, model: PreTrainedModel) -> Tensor:
    """Logits of two rows over two tokens, and of the second one alone over a third."""
    device = embedding_device(model)
    tokens = torch.tensor(_RESPONSES[1], device=device)
    with decoder.opened(model, len(_PROMPTS), None) as sessions, sessions(3) as session:
        logits = [session.prefill(_PROMPTS, _soft_prompt(model)).clone()]
        logits += [session.decode(tokens[step : step + 2]).clone() for step in range(2)]
        session.select([1])
        logits.append(session.decode(tokens[2:3]).clone())
    return torch.cat(logits).float()


def _soft_prompt(model: PreTrainedModel) -> Tensor:
    embedding = model.get_input_embeddings()
    return embedding(torch.arange(_SOFT_PROMPT, device=embedding.weight.device))


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
