"""The transformers model inside its wrappers: its device, precision and mode, its attention, its recomputed layers.

Attention is replaced for a pass at a time: transformers builds no mask for the one registered here, so that it would
let rows see padding and each other. Layers are recomputed here since transformers' own gradient checkpointing works
only in training mode and for a whole run; a frozen teacher is in evaluation mode, and one of its passes has a backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from promptkd.errors import RequestError


class UnsupportedError(Exception):
    """A way of running a model meets what it does not know; its trial then turns to the next one."""


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The model itself, or that inside a PEFT wrapper; a soft prompt is a RequestError, anything else a TypeError."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise RequestError("A model with a soft prompt of its own is not read here: the prompt would be left out.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PeftModel of one. Got {type(model).__name__}.")
    return inner


def backbone_of(model: PreTrainedModel) -> Any:
    """The model without its head: what its class names so, or its first part where that names none (Llama 4)."""
    if model.base_model is not model or model.get_output_embeddings() is None:
        return model.base_model
    return next((each for each in model.children() if isinstance(each, PreTrainedModel)), model)


def embedding_device(model: PreTrainedModel) -> torch.device:
    """The device on which `model` expects token ids."""
    return model.get_input_embeddings().weight.device


def model_matmul_dtype(model: PreTrainedModel) -> torch.dtype:
    """See `matmul_dtype`."""
    return matmul_dtype(model.get_input_embeddings().weight)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The precision of matrix products with a weight at this moment: autocast's within autocast, else the weight's."""
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, which under an autocast to bfloat16 refuses the states of a model in float16."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(list(parts), dim)


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


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer sets for its attention, named as in transformers."""

    scaling: float | None = None  # factor of the scores; None for 1 / sqrt(D)
    dropout: float = 0.0
    sliding_window: int | None = None  # each token sees so many tokens, the last of which is itself
    softcap: float | None = None  # scores become softcap · tanh(scores / softcap)

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


Attention = Callable[[Any, Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""Takes an attention layer, its query (B, heads, T, D), key and value (B, key-value heads, T, D) and its settings, and
returns (B, T, heads, D)."""

_NAME = "promptkd"
_SETTINGS = [each.name for each in fields(AttentionSettings)]
_in_use: list[Attention] = []  # of the forward passes under way, the innermost last


@contextmanager
def use_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Every attention layer of `model` calls `attention` within this context."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    _in_use.append(attention)
    try:
        yield
    finally:
        _in_use.pop()
        model.config._attn_implementation = before


def reuse_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """A context with the attention of the pass under way, to recompute its layers after the pass has ended."""
    return use_attention(model, _in_use[-1]) if model.config._attn_implementation == _NAME else nullcontext()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    if not _in_use:
        raise RuntimeError("promptkd's attention was called outside of a forward pass by promptkd.")
    if settings.get("s_aux") is not None:
        raise UnsupportedError("attention sinks")
    known = AttentionSettings(**{name: settings[name] for name in _SETTINGS if name in settings})
    return _in_use[-1](module, query, key, value, known), None


AttentionInterface.register(_NAME, _attend)


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: AttentionSettings
) -> Tensor:
    """As torch's `scaled_dot_product_attention` with grouped heads, of scores softcap · tanh(scores / softcap)."""
    assert settings.softcap is not None
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * settings.scale(query) / settings.softcap) * settings.softcap
    wide = torch.promote_types(torch.float32, query.dtype)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(query.dtype)
    return dropout(weights, settings.dropout) @ value


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
