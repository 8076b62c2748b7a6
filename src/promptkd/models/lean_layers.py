"""The layers of Llama's family as transformers has them, with what stands between their matrices written out.

Norms, rotary positions and gates have backwards of their own, which keep less than autograd's and pass over it less
often; behind its attention, the last layer is run only where states are asked for.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from promptkd.data.prefixes import Pack
from promptkd.models.row_attention import row_attention

__all__ = ["head_norms", "is_lean", "lean_states", "rotation", "turned"]

_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}


def is_lean(model: PreTrainedModel) -> bool:
    """Whether a model is of Llama's family, whole on a CPU, in float32, and nothing hooks into its modules."""
    if not _has_layers_of_family(model) or torch.is_autocast_enabled("cpu"):
        return False
    if any(_hooks(each) or _has_own_forward(each) for each in model.base_model.modules()):
        return False
    return all(
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() > 0  # DeepSpeed's are elsewhere
        and not isinstance(weight, DTensor)
        for weight in model.parameters()
    )


def _has_layers_of_family(model: PreTrainedModel) -> bool:
    """Whether all that is written out here is, in this model, of transformers' own classes."""
    config, backbone = model.config, model.base_model
    home = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    if config.model_type not in _FAMILIES or type(backbone).__module__ != home or config.hidden_act != "silu":
        return False
    parts = [backbone.norm, backbone.rotary_emb]
    for layer in backbone.layers:
        parts += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        parts += head_norms(layer.self_attn)
    return all(type(each).__module__ == home for each in parts)


def head_norms(attention: Any) -> list[Any]:
    """The norms of a layer's query and key heads; none in most families."""
    return [attention.q_norm, attention.k_norm] if attention.config.model_type == "qwen3" else []


def _hooks(module: nn.Module) -> bool:
    """Whether something would miss that the module is not called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not _recomputes(module)


def _recomputes(layer: nn.Module) -> bool:
    """Whether `recomputed_layers` has been here."""
    return getattr(vars(layer).get("forward"), "recomputes", False)


def _sliding_window(attention: Any) -> int | None:
    """How far a layer's attention sees back, itself included."""
    family = attention.config.model_type
    if family == "llama":
        return None
    return attention.config.sliding_window if family == "mistral" else attention.sliding_window


def lean_states(model: PreTrainedModel, pack: Pack, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """Last hidden states (N, H) of a model for which `is_lean` holds.

    Args:
        inputs: the pack as `pack_inputs` gives it.
        places: (N,) those of the pack that are wanted.
    """
    backbone = model.base_model
    hidden = inputs["inputs_embeds"] if "inputs_embeds" in inputs else backbone.embed_tokens(inputs["input_ids"])
    cosines, sines = (each[0] for each in rotation(backbone.rotary_emb, hidden, inputs["position_ids"]))  # (S, 1, D)
    hidden, last = hidden[0], len(backbone.layers) - 1  # (S, H)
    for index, layer in enumerate(backbone.layers):
        inputs_of_layer = (layer, hidden, cosines, sines, pack, places if index == last else None)
        if _recomputes(layer) and torch.is_grad_enabled():
            hidden = checkpoint(_layer, *inputs_of_layer, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = _layer(*inputs_of_layer)
    return _normed(backbone.norm, hidden)


def _layer(layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, pack: Pack, places: Tensor | None) -> Tensor:
    """(S, H) to (S, H), or to (N, H) at `places`."""
    seen = _attended(layer.self_attn, _normed(layer.input_layernorm, hidden), cosines, sines, pack)
    if places is not None:
        seen, hidden = seen[places], hidden[places]
    hidden = hidden + layer.self_attn.o_proj(seen)
    normed, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
    return hidden + mlp.down_proj(_Gated.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _attended(attention: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, pack: Pack) -> Tensor:
    """(S, heads · D), what the heads of a layer see."""
    query, key, value = (
        project(hidden).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (S, heads, D)
    if norms := head_norms(attention):
        query, key = (_normed(*each) for each in zip(norms, (query, key), strict=True))
    query, key = (_Turned.apply(each, cosines, sines) for each in (query, key))
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, S, D)
    window = _sliding_window(attention)
    return row_attention(query, key, value, pack, scaling=attention.scaling, sliding_window=window)[0].flatten(1)


def _normed(norm: Any, inputs: Tensor) -> Tensor:
    return _Normed.apply(inputs, norm.weight, norm.variance_epsilon)


class _Normed(torch.autograd.Function):
    """RMSNorm: w x r with r = (mean(x²) + ε)^-½ over the last dimension."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(inputs.square().mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(inputs, weight, scale)
        return (inputs * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dx = r g' - x r³ mean(g' x) with g' = w g, and dw = Σ g x r."""
        inputs, weight, scale = ctx.saved_tensors
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * inputs).mul_(scale).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        to_inputs = gradient * weight
        along = (to_inputs * inputs).mean(-1, keepdim=True).mul_(scale.pow(3))
        return to_inputs.mul_(scale).addcmul_(inputs, along, value=-1), to_weight, None


class _Turned(torch.autograd.Function):
    """Rotary positions of heads (S, heads, D), as `turned` has them."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return turned(heads, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return turned(gradient, cosines, -sines), None, None  # back by the same angle


def rotation(rotary: nn.Module, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, D) for `turned` at `positions` (B, T); the sines of the first half are negative."""
    cosines, sines = (each[:, :, None] for each in rotary(states, positions))
    half = sines.shape[-1] // 2
    return cosines, torch.cat([-sines[..., :half], sines[..., half:]], -1)


def turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Heads (..., heads, D) at their places: x cos + rotate_half(x) sin."""
    return (heads * cosines).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sines)


class _Gated(torch.autograd.Function):
    """silu(gate) · up; only what comes in is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)
