"""Activation recomputation (gradient checkpointing) for single passes of a model in evaluation mode.

transformers' own works only in training mode and for a whole run. A frozen teacher stays in evaluation mode, and only
one of its passes has a backward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from promptkd.engine.attention import reuse_attention
from promptkd.engine.backbone import unwrap_peft
from promptkd.errors import RequestError


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

    Exact as long as weights and random numbers do not change in between: meant for a model in evaluation mode. Backward
    may run after the context has been left.
    """
    inner = unwrap_peft(model)
    layers = recomputable_layers(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # of the pass, and of its recomputation, which must find the attention of a packed pass again
        return nullcontext(), reuse_attention(inner)

    for layer in layers:
        vars(layer)["forward"] = _Recomputed(layer.forward, contexts)  # found before the class's method
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def is_recomputed(layer: nn.Module) -> bool:
    """Whether `recomputed_layers` is in effect for a layer; fused layers, which never call its forward, ask this."""
    return isinstance(vars(layer).get("forward"), _Recomputed)


class _Recomputed:
    """The forward of a layer, recomputed in backward."""

    def __init__(self, forward: Callable[..., Any], contexts: Callable[[], Any]):
        self._forward, self._contexts = forward, contexts

    def __call__(self, *args: Any, **settings: Any) -> Any:
        forward = partial(self._forward, **settings)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)
