"""Fused layers: the decoder layers of the Llama family, with hand-written norms, rotary positions and SwiGLU.

These keep less for backward than autograd would and pass over memory less often; on CUDA each is compiled into one
kernel. A model belongs to the family by its classes; that it computes the same is shown by a trial (`resolve.py`).
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from promptkd.engine.backbone import Attention, AttentionSettings, backbone_of, embedding_device, is_recomputed

_FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
_WEIGHT_DTYPES = {torch.float32, torch.bfloat16}
_compiled = cache(partial(torch.compile, dynamic=True))


def _compiled_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled once for all shapes where its first argument is on CUDA and Triton can compile.

    Its callers have a backward of their own, or none. So it sees its inputs without a graph and outside of autocast:
    the compiler makes a variant for each of these states, and runs a function plainly from the ninth variant on.
    """

    @wraps(function)
    def call(inputs: Tensor, *others: Any) -> Any:
        if not _compiles_for(inputs):
            return function(inputs, *others)
        plain = [each.detach() if isinstance(each, Tensor) else each for each in (inputs, *others)]
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False, cache_enabled=True):
            return _compiled(function)(*plain)

    return call


def _compiles_for(inputs: Tensor) -> bool:
    return inputs.is_cuda and has_triton()


def _wide(inputs: Tensor) -> Tensor:
    return inputs.to(torch.promote_types(torch.float32, inputs.dtype))


@_compiled_on_cuda
def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """w x r with r = (mean(x²) + ε)^-½; and r, (…, 1), in float32 or wider. x r is rounded before w."""
    wide = _wide(inputs)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
    return (wide * scale).to(inputs.dtype).mul_(weight), scale


@_compiled_on_cuda
def _rms_norm_to_inputs(gradient: Tensor, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx = r g' - x r³ mean(g' x) with g' = w g."""
    wide = _wide(inputs)
    weighted = _wide(gradient) * weight
    along = (weighted * wide).mean(-1, keepdim=True).mul_(scale.pow(3))
    return weighted.mul_(scale).addcmul_(wide, along, value=-1).to(inputs.dtype)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` of inputs (…, H) with a weight (H,)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        outputs, scale = rms_norm(inputs, weight, epsilon)
        ctx.save_for_backward(inputs, weight, scale)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, scale = ctx.saved_tensors
        to_inputs = _rms_norm_to_inputs(gradient, inputs, weight, scale) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_inputs, None, None
        to_weight = (_wide(gradient) * inputs).mul_(scale).flatten(0, -2).sum(0)  # Σ g x r
        return to_inputs, to_weight.to(weight.dtype), None


def rotation(rotary: nn.Module, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, D) for `rotate` at `positions` (B, T); the sines of the first half are negative."""
    cosines, sines = (each[:, :, None] for each in rotary(states, positions))
    half = sines.shape[-1] // 2
    return cosines, torch.cat([-sines[..., :half], sines[..., half:]], -1)


@_compiled_on_cuda
def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions of heads (…, heads, D): x cos + rotate_half(x) sin, in the precision of the heads."""
    return (heads * cosines).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sines).to(heads.dtype)


class ApplyRotary(torch.autograd.Function):
    """`rotate` of heads (S, heads, D), with the cosines and sines of `rotation`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return rotate(heads, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return rotate(gradient, cosines, -sines), None, None  # by the opposite angle


@_compiled_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return silu(gate).mul_(up)


@_compiled_on_cuda
def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


class SwiGLU(torch.autograd.Function):
    """`swiglu`, keeping only its inputs for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _swiglu_backward(gradient, *ctx.saved_tensors)


def supports_fused_forward(model: PreTrainedModel) -> bool:
    """Whether a model is of the Llama family, on one device, and nothing hooks into its modules."""
    if not _has_layers_of_family(model) or any(map(_is_hooked, backbone_of(model).modules())):
        return False
    device = embedding_device(model)
    return all(
        weight.device == device
        and weight.dtype in _WEIGHT_DTYPES
        and weight.numel() > 0  # sharded by DeepSpeed
        and not isinstance(weight, DTensor)
        for weight in model.parameters()
    )


def _has_layers_of_family(model: PreTrainedModel) -> bool:
    """Whether every module that is replaced here is of transformers' own class."""
    config, backbone = model.config, backbone_of(model)
    home = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    if config.model_type not in _FAMILY or type(backbone).__module__ != home or config.hidden_act != "silu":
        return False
    modules = [backbone.norm, backbone.rotary_emb]
    for layer in backbone.layers:
        modules += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        modules += head_norms(layer.self_attn)
    return all(type(module).__module__ == home for module in modules)


def _is_hooked(module: nn.Module) -> bool:
    """Whether something relies on the module being called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or ("forward" in vars(module) and not is_recomputed(module))


def head_norms(attention: Any) -> list[Any]:
    """The norms of a layer's query and key heads; none in most architectures."""
    return [attention.q_norm, attention.k_norm] if attention.config.model_type == "qwen3" else []


def fused_forward(model: PreTrainedModel, inputs: dict[str, Tensor], attention: Attention, indices: Tensor) -> Tensor:
    """Last hidden states (N, H) at the indices (N,) of one packed sequence; the last layer runs only there.

    The model is one that `supports_fused_forward`, in a mode without dropout; `inputs` are those of `pack_inputs`.
    """
    backbone = backbone_of(model)
    hidden = inputs["inputs_embeds"] if "inputs_embeds" in inputs else backbone.embed_tokens(inputs["input_ids"])
    cosines, sines = (each[0] for each in rotation(backbone.rotary_emb, hidden, inputs["position_ids"]))
    hidden, last = hidden[0], backbone.layers[-1]  # (S, H)
    for layer in backbone.layers:
        arguments = (layer, hidden, cosines, sines, attention, indices if layer is last else None)
        if is_recomputed(layer) and torch.is_grad_enabled():
            hidden = checkpoint(_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = _layer(*arguments)
    return _rms_norm(backbone.norm, hidden)


def _layer(
    layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, attention: Attention, indices: Tensor | None
) -> Tensor:
    """(S, H) to (S, H), or to (N, H) at `indices`. Cosines and sines: (S, 1, D)."""
    attended = _self_attention(layer.self_attn, _rms_norm(layer.input_layernorm, hidden), cosines, sines, attention)
    if indices is not None:
        attended, hidden = attended[indices], hidden[indices]
    hidden = hidden + layer.self_attn.o_proj(attended)
    normed, mlp = _rms_norm(layer.post_attention_layernorm, hidden), layer.mlp
    return hidden + mlp.down_proj(SwiGLU.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _self_attention(layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, attention: Attention) -> Tensor:
    """(S, heads · D), before the output projection."""
    projections = layer.q_proj, layer.k_proj, layer.v_proj
    query, key, value = (project(hidden).unflatten(-1, (-1, layer.head_dim)) for project in projections)
    if norms := head_norms(layer):
        query, key = (_rms_norm(*each) for each in zip(norms, (query, key), strict=True))
    query, key = (ApplyRotary.apply(each, cosines, sines) for each in (query, key))  # (S, heads, D)
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, S, D)
    kind = layer.config.model_type
    window = None if kind == "llama" else (layer.config if kind == "mistral" else layer).sliding_window
    settings = AttentionSettings(layer.scaling, sliding_window=window)
    return attention(layer, query, key, value, settings)[0].flatten(1)


def _rms_norm(norm: Any, inputs: Tensor) -> Tensor:
    return RMSNorm.apply(inputs, norm.weight, norm.variance_epsilon)
