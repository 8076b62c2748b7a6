"""Which engine runs a model, and which of its implementations: each is held to the reference before it is used.

A verdict is kept for a model, its device, the precision of its weights and of its matrix products, and its attention:
what agrees in float32 on a CPU may not in bfloat16 on a GPU.
"""

import logging
import os
import weakref
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.data.batch import right_pad
from promptkd.engine.backbone import embedding_device, evaluating, model_matmul_dtype, unwrap_peft
from promptkd.engine.base import Decoder, Engine, Scorer
from promptkd.engine.heads import head_logits
from promptkd.engine.reference import REFERENCE
from promptkd.errors import RequestError

VARIABLE = "PROMPTKD_ENGINE"
ENGINES = ("reference", "cpu", "cuda")

_PROMPTS, _RESPONSES = [[0, 1, 2], [3]], [[1, 0], [2, 1, 3, 0]]
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
    for candidate in candidates[:-1]:
        if candidate.supports(model) and _is_verified(candidate, candidates[-1], model):
            return candidate
    return candidates[-1]


def _is_verified(candidate: Any, reference: Any, model: PreTrainedModel) -> bool:
    verdicts = _verdicts.setdefault(model, {})
    weight, attention = model.get_input_embeddings().weight, str(model.config._attn_implementation)
    key = (candidate.name, weight.device, weight.dtype, model_matmul_dtype(model), attention)
    if key not in verdicts:
        problem = _problem(candidate, reference, model)
        verdicts[key] = not problem
        if problem:
            names = type(model).__name__, candidate.name, weight.device.type
            _LOGGER.warning("%s is not run by %s on %s: %s", *names, problem)
            candidate.forget(model)
    return verdicts[key]


def _problem(candidate: Any, reference: Any, model: PreTrainedModel) -> str:
    """What keeps the candidate from running the model; "" if it agrees with the reference."""
    trial = _decode_trial if isinstance(candidate, Decoder) else _score_trial
    # Autocast's cache would keep casts made here, without a graph, for the pass that asked for this trial.
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), evaluating(model):
            expected = trial(reference, model)
            try:
                got = trial(candidate, model)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing about the candidate
                raise
            # An unknown architecture may answer an unexpected call with any of these.
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
                return " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        torch.set_autocast_cache_enabled(caches)
    tolerance = max(1e-3, torch.finfo(model_matmul_dtype(model)).eps ** 0.5)
    # The largest relative error of a row (…, D): averaged, one wrong row would be lost among the others.
    sizes = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    gap = float(((got - expected).norm(dim=-1) / sizes).max())
    return "" if gap <= tolerance else f"it differs by {gap:.1e}."  # NaN differs, too


def _score_trial(scorer: Scorer, model: PreTrainedModel) -> Tensor:
    """Hidden states of two rows, with and without a soft prompt."""
    batch = right_pad(_PROMPTS, _RESPONSES, device=embedding_device(model))
    prompted = scorer.hidden(model, batch, _soft_prompt(model))
    return torch.cat([scorer.hidden(model, batch, None), prompted]).float()


def _decode_trial(decoder: Decoder, model: PreTrainedModel) -> Tensor:
    """Logits of two rows over two tokens, and of the second row alone over a third."""
    tokens = torch.tensor(_RESPONSES[1], device=embedding_device(model))
    with decoder.open(model, len(_PROMPTS), None) as sessions, sessions(3) as session:
        logits = [session.prefill(_PROMPTS, _soft_prompt(model)).clone()]
        logits += [session.decode(tokens[step : step + 2]).clone() for step in range(2)]
        session.select([1])
        logits.append(session.decode(tokens[2:3]).clone())
    return torch.cat(logits).float()


def _soft_prompt(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings()(torch.arange(2, device=embedding_device(model)))


def check_scoring(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head applied to its backbone's last hidden states, by trying two tokens.

    Raises:
        RequestError: if the backbone cannot be reached, or the logits differ from the model's own.
    """
    inner = unwrap_peft(model)
    ids = torch.tensor([[0, 1]], device=embedding_device(inner))
    # within autocast, the model would round its own logits
    with torch.no_grad(), evaluating(inner), torch.autocast(ids.device.type, enabled=False):
        expected = inner(input_ids=ids, use_cache=False).logits.float()
        inputs = {"input_ids": ids}, {"inputs_embeds": inner.get_input_embeddings()(ids)}
        states = [inner.base_model(**each, use_cache=False).last_hidden_state for each in inputs]
        got = [head_logits(model, each).float() for each in states]
    tolerance = 1e-3 if inner.dtype.itemsize > 2 else 0.05  # in half precision, the model rounds its own logits
    limit = tolerance * float(expected.abs().max().clamp(min=1.0))
    if any(each.shape != expected.shape or float((each - expected).abs().max()) > limit for each in got):
        raise RequestError(
            f"{type(inner).__name__} computes its logits in a way promptkd does not know: its head on the last hidden "
            "state does not give the model's own logits. Supported are decoder-only models with a linear head, a "
            "constant logit scale and a tanh soft cap."
        )
