"""Decoder layers whose activations are not kept for backward but computed a second time there.

transformers' own gradient checkpointing works in training mode alone and for a whole run. A frozen teacher stays in
evaluation mode, and only one of its passes has a backward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from promptkd.engine.attention import in_place_again
from promptkd.engine.backbone import unwrap_peft
from promptkd.errors import RequestError

__all__ = ["marks_layers", "recomputable_layers", "recomputed_layers", "recomputes"]


def marks_layers(model: nn.Module) -> bool:
    """Whether the model's class marks layers whose activations can be computed again."""
    return any(isinstance(each, GradientCheckpointingLayer) for each in unwrap_peft(model).modules())


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that `recomputed_layers` means.

    Raises:
        RequestError: if the model's class marks none, as transformers' classes do.
    """
    layers = [each for each in unwrap_peft(model).modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise RequestError(
            f"{type(unwrap_peft(model)).__name__} marks no layers whose activations could be computed again. "
            "Leave --teacher_gradient_checkpointing out."
        )
    return layers


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Passes that start while this is entered keep the input of every layer alone; the rest comes back in backward.

    Exact as long as weights and random numbers do not change in between: meant for a model in evaluation mode.
    Backward may run after this is left.
    """
    inner = unwrap_peft(model)
    layers = recomputable_layers(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # A packed pass has attention and linear layers of its own, which backward must find in place again.
        return nullcontext(), in_place_again(inner)

    for layer in layers:
        vars(layer)["forward"] = _Recomputed(layer.forward, contexts)  # found before the class's own
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def recomputes(layer: nn.Module) -> bool:
    """Whether `recomputed_layers` has this layer's activations computed again: fused layers call no forward of one."""
    return isinstance(vars(layer).get("forward"), _Recomputed)


class _Recomputed:
    """The forward of a layer, computed again in backward."""

    def __init__(self, forward: Callable[..., Any], contexts: Callable[[], Any]):
        self._forward, self._contexts = forward, contexts

    def __call__(self, *args: Any, **settings: Any) -> Any:
        forward = partial(self._forward, **settings)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)
