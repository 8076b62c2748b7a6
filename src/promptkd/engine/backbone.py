"""The transformers model inside its wrappers: its device, its precision, and its training or evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.errors import RequestError


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        RequestError: for a `PeftModel` with a soft prompt, which the inner model would ignore.
        TypeError: for anything else that is not a transformers model.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise RequestError("A model with a soft prompt of its own is not read here: the prompt would be left out.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PeftModel of one. Got {type(model).__name__}.")
    return inner


def embedding_device(model: PreTrainedModel) -> torch.device:
    """The device on which `model` expects token ids."""
    return model.get_input_embeddings().weight.device


def model_matmul_dtype(model: PreTrainedModel) -> torch.dtype:
    """See `matmul_dtype`, for the weights of `model`."""
    return matmul_dtype(model.get_input_embeddings().weight)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The precision of matrix products with a weight at this moment: autocast's within autocast, else the weight's."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within this context, then the previous mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, also those that layers pass to functions (OPT's, any attention's)."""
    for module, name in _dropout_rates(model):
        setattr(module, name, 0.0)


def applies_dropout(model: nn.Module) -> bool:
    """Whether a forward pass of `model` in its current mode drops anything."""
    return model.training and any(vars(module)[name] > 0 for module, name in _dropout_rates(model))


def _dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module with a dropout rate, and the attribute that holds it."""
    for module in model.modules():
        for name, value in vars(module).items():
            named = "dropout" in name or name == "layerdrop" or (name == "p" and isinstance(module, nn.Dropout))
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                yield module, name
