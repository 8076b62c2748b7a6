"""Quantised models that gradients pass through."""

import sys

from torch import nn

from promptkd.errors import RequestError

__all__ = ["keep_backward"]


def keep_backward(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers keep their weights in the form that they can be differentiated in.

    On CPUs with bfloat16 units the first pass without a gradient lays them out for inference, and from then on no
    gradient goes through the layer: bitsandbytes 0.50 only warns, and the soft prompt would learn nothing.

    Raises:
        RequestError: if the weights have been laid out already.
    """
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            if state is not None and vars(state).get("packing_format_for_cpu"):
                raise RequestError(
                    "The 4-bit model has been read without a gradient before, and bitsandbytes has laid its weights "
                    "out for inference alone. Load it anew."
                )
            layer.support_avx512bf16_for_cpu = False
