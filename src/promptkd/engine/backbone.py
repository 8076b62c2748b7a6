"""The transformers model inside its wrappers, and the modes that it runs in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.errors import RequestError

__all__ = [
    "applies_dropout",
    "compute_dtype",
    "computing_with",
    "disable_dropout",
    "embedding_device",
    "evaluating",
    "unwrap_peft",
]


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        RequestError: for a `PeftModel` with a prompt of its own, which whoever calls the inner model would leave out.
        TypeError: for anything else that is no transformers model.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise RequestError("A model with a soft prompt of its own is not read here: the prompt would be left out.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PeftModel of one. Got {type(model).__name__}.")
    return inner


def embedding_device(model: PreTrainedModel) -> torch.device:
    """Where token ids must be for `model` to read them."""
    return model.get_input_embeddings().weight.device


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The precision in which `model` multiplies here and now."""
    return computing_with(model.get_input_embeddings().weight)


def computing_with(weight: Tensor) -> torch.dtype:
    """The precision of products with a weight here and now: autocast's within autocast, else the weight's own."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (no dropout), then the mode that was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, also the ones that layers hand to functions (OPT's, any attention's)."""
    for module, name in _rates(model):
        setattr(module, name, 0.0)


def applies_dropout(model: nn.Module) -> bool:
    """Whether a forward of `model`, in the mode that it is in, drops anything."""
    return model.training and any(vars(module)[name] > 0 for module, name in _rates(model))


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module with a rate, and the name that it has there."""
    for module in model.modules():
        for name, value in vars(module).items():
            named = "dropout" in name or name == "layerdrop" or (name == "p" and isinstance(module, nn.Dropout))
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                yield module, name
