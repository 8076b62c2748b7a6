"""What a model must be to be run here: causal, decoder-only, with a known head; whether it takes a soft prompt."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.engine.backbone import embedding_device, evaluating, unwrap_peft
from promptkd.engine.heads import head_logits
from promptkd.engine.reference import row_states
from promptkd.errors import PromptKDError, RequestError

_IDS = [0, 1, 2, 3]
_reads_embeddings: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


def check_scoring(model: nn.Module) -> None:
    """Refuse what is no causal decoder, or computes logits otherwise than by its head on its last hidden states.

    Four tokens are tried. `RequestError` if the model cannot be run, if an earlier state depends on a later token, or
    if the logits differ from the model's own.
    """
    inner = unwrap_peft(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise RequestError(
            f"{name} is an encoder-decoder model. Expected a decoder-only model, as GPT-2 and Llama are."
        )
    with _trying(inner, f"{name} cannot be run here"):
        states = row_states(inner, _IDS)
        beginning = row_states(inner, _IDS[:2])
        expected = _forward(inner)(input_ids=_ids(inner), use_cache=False).logits[0].float()
        got = head_logits(model, states).float()
    if _differ(beginning, states[:2]):
        raise RequestError(
            f"{name} is no causal model as it is configured: what it computes of a token depends on the tokens behind "
            "it, so that it cannot write token by token. Expected a causal language model, as GPT-2 and Llama are."
        )
    tolerance = 1e-3 if inner.dtype.itemsize > 2 else 0.05  # in half precision, the model rounds its own logits
    limit = tolerance * float(expected.abs().max().clamp(min=1.0))
    if got.shape != expected.shape or not float((got - expected).abs().max()) <= limit:
        raise RequestError(
            f"{name} computes its logits in a way promptkd does not know: its head on the last hidden state does not "
            "give the model's own logits. Supported are decoder-only models with a linear head, a constant logit scale "
            "and a tanh soft cap."
        )


def _forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's own forward: after training in half precision, accelerate leaves an autocast of its own around it."""
    return partial(type(model).forward, model) if "_original_forward" in vars(model) else model


def check_soft_prompt(model: nn.Module) -> None:
    """`RequestError` if no soft prompt can precede the model's tokens."""
    inner = unwrap_peft(model)
    if problem := _embeddings_problem(inner):
        raise RequestError(
            f"No soft prompt can stand before {type(inner).__name__}: {problem}. Take a method that trains none, such "
            "as gkd, or one that adapts the teacher's weights (--teacher_adapter lora)."
        )


def reads_embeddings(model: PreTrainedModel) -> bool:
    """Whether the model gives embeddings of tokens the states that it gives the tokens, as a soft prompt needs."""
    return not _embeddings_problem(model)


def _embeddings_problem(model: PreTrainedModel) -> str:
    if model not in _reads_embeddings:
        problem = ""
        try:
            with _trying(model, "its embeddings cannot be given in place of tokens"):
                embedded = model.get_input_embeddings()(_ids(model))
                expected, got = row_states(model, _IDS), row_states(model, _IDS[2:], embedded[0, :2])
            if _differ(got, expected[2:]):
                problem = "it computes something else of its tokens' embeddings than of the tokens"
        except RequestError as error:
            problem = str(error).rstrip(".")
        _reads_embeddings[model] = problem
    return _reads_embeddings[model]


@contextmanager
def _trying(model: PreTrainedModel, problem: str) -> Iterator[None]:
    """Run it without dropout, gradients and autocast, in which it would round its own logits; errors are requests'."""
    try:
        with torch.no_grad(), evaluating(model), torch.autocast(embedding_device(model).type, enabled=False):
            yield
    except (PromptKDError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # an unknown architecture may answer with any
        raise RequestError(f"{problem}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _ids(model: PreTrainedModel) -> Tensor:
    return torch.tensor([_IDS], device=embedding_device(model))


def _differ(got: Tensor, expected: Tensor) -> bool:
    tolerance = max(1e-3, torch.finfo(expected.dtype).eps ** 0.5)
    return not float((got - expected).float().norm()) <= tolerance * float(expected.float().norm())
