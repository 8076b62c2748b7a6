"""Fused layers: the decoder layers of the Llama family, with norms, rotary positions and SwiGLU from `fused_ops.py`.

The last layer runs only at the tokens whose states are asked for. A model belongs to the family by its classes; that it
computes the same is shown by a trial (`verify.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from promptkd.engine.attention import Attention, AttentionSettings
from promptkd.engine.backbone import embedding_device
from promptkd.engine.fused_ops import ApplyRotary, RMSNorm, SwiGLU, rotation
from promptkd.engine.recompute import is_recomputed

_FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
_WEIGHT_DTYPES = {torch.float32, torch.bfloat16}


def supports_fused_forward(model: PreTrainedModel) -> bool:
    """Whether a model is of the Llama family, on one device, and nothing hooks into its modules."""
    if not _has_layers_of_family(model):
        return False
    if any(_is_hooked(module) for module in model.base_model.modules()):
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
    config, backbone = model.config, model.base_model
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


def sliding_window(attention: Any) -> int | None:
    """The sliding window of a layer, as in `AttentionSettings`."""
    architecture = attention.config.model_type
    if architecture == "llama":
        return None
    return attention.config.sliding_window if architecture == "mistral" else attention.sliding_window


def fused_forward(model: PreTrainedModel, inputs: dict[str, Tensor], attention: Attention, indices: Tensor) -> Tensor:
    """Last hidden states (N, H) at the indices (N,) of one packed sequence of S tokens.

    Args:
        model: one that `supports_fused_forward`, in a mode without dropout.
        inputs: `position_ids` with `input_ids` (1, S) or `inputs_embeds` (1, S, E).
    """
    backbone = model.base_model
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
    query, key, value = (
        project(hidden).unflatten(-1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )  # (S, heads, D)
    if norms := head_norms(layer):
        query, key = (_rms_norm(*each) for each in zip(norms, (query, key), strict=True))
    query, key = (ApplyRotary.apply(each, cosines, sines) for each in (query, key))
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, S, D)
    settings = AttentionSettings(layer.scaling, sliding_window=sliding_window(layer))
    return attention(layer, query, key, value, settings)[0].flatten(1)


def _rms_norm(norm: Any, inputs: Tensor) -> Tensor:
    return RMSNorm.apply(inputs, norm.weight, norm.variance_epsilon)
