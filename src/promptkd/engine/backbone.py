"""The transformers model inside its wrappers: its device, its precision, its mode, and activation recomputation.

transformers' own recomputation (gradient checkpointing) works only in training mode and for a whole run. A frozen
teacher stays in evaluation mode, and only one of its passes has a backward.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from promptkd.engine.attention import reuse_attention
from promptkd.errors import RequestError


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself. Others raise a TypeError."""
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


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that `recomputed_layers` recomputes. Raises `RequestError` if the model's class marks none."""
    inner = unwrap_peft(model)
    layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RequestError(
            f"{type(inner).__name__} marks no layers whose activations could be computed again. "
            "Leave --teacher_gradient_checkpointing out."
        )
    return layers


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Passes that start within this context keep only the input of each layer; backward recomputes the rest.

    Exact as long as weights and random numbers do not change in between: meant for a model in evaluation mode.
    """
    inner, layers = unwrap_peft(model), recomputable_layers(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # of the pass, and of its recomputation, which must find the attention of a packed pass again
        return nullcontext(), reuse_attention(inner)

    for layer in layers:  # in the instance, where it is found before the class's method
        vars(layer)["forward"] = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def is_recomputed(layer: nn.Module) -> bool:
    """Whether `recomputed_layers` is in effect for a layer; fused layers, which never call its forward, ask this."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is checkpoint
