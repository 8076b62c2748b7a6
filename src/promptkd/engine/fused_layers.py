"""The layers of Llama's family as transformers has them, with what stands between their matrices written out.

`fused_ops.py` has the norms, rotary positions and gates. The last layer is run only where states are asked for. A model
is of the family by its classes; whether that told the whole truth, a trial shows (`verify.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from promptkd.data.prefixes import Pack
from promptkd.engine.attention import Attention
from promptkd.engine.backbone import applies_dropout, embedding_device
from promptkd.engine.fused_ops import ApplyRotary, RMSNorm, SwiGLU, rotation
from promptkd.engine.packed import PackedScorer
from promptkd.engine.recompute import recomputes

__all__ = ["FusedScorer", "head_norms", "sliding_window", "supports_fused_forward"]

_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
_WEIGHTS = {torch.float32, torch.bfloat16}


def supports_fused_forward(model: PreTrainedModel) -> bool:
    """Whether a model is of Llama's family, whole on one device, and nothing hooks into its modules."""
    if not _has_layers_of_family(model):
        return False
    if any(_hooks(each) or _has_own_forward(each) for each in model.base_model.modules()):
        return False
    device = embedding_device(model)
    return all(
        weight.device == device
        and weight.dtype in _WEIGHTS
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


def sliding_window(attention: Any) -> int | None:
    """How far a layer's attention sees back, itself included."""
    family = attention.config.model_type
    if family == "llama":
        return None
    return attention.config.sliding_window if family == "mistral" else attention.sliding_window


def _hooks(module: nn.Module) -> bool:
    """Whether something would miss that the module is not called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not recomputes(module)


class FusedScorer(PackedScorer):
    """Scores packed rows through the layers that are written out here.

    Args:
        packed: how rows are packed, and attended to, on this kind of device.
    """

    name = "fused layers"

    def __init__(self, packed: PackedScorer):
        super().__init__(packed.longest)
        self._packed = packed

    def attention(self, pack: Pack, device: torch.device) -> Attention:
        return self._packed.attention(pack, device)

    def shares_prefixes(self, model: PreTrainedModel) -> bool:
        return self._packed.shares_prefixes(model)

    def supports(self, model: PreTrainedModel) -> bool:
        return self._packed.supports(model) and supports_fused_forward(model) and not applies_dropout(model)

    def states(self, model: PreTrainedModel, pack: Pack, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        backbone = model.base_model
        hidden = inputs["inputs_embeds"] if "inputs_embeds" in inputs else backbone.embed_tokens(inputs["input_ids"])
        cosines, sines = (each[0] for each in rotation(backbone.rotary_emb, hidden, inputs["position_ids"]))
        attention = self.attention(pack, hidden.device)
        hidden, last = hidden[0], len(backbone.layers) - 1  # (S, H)
        for index, layer in enumerate(backbone.layers):
            inputs_of_layer = (layer, hidden, cosines, sines, attention, places if index == last else None)
            if recomputes(layer) and torch.is_grad_enabled():
                hidden = checkpoint(_layer, *inputs_of_layer, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = _layer(*inputs_of_layer)
        return _normed(backbone.norm, hidden)


def _layer(
    layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, attention: Attention, places: Tensor | None
) -> Tensor:
    """(S, H) to (S, H), or to (N, H) at `places`. Cosines and sines: (S, 1, D)."""
    attended = _attended(layer.self_attn, _normed(layer.input_layernorm, hidden), cosines, sines, attention)
    if places is not None:
        attended, hidden = attended[places], hidden[places]
    hidden = hidden + layer.self_attn.o_proj(attended)
    normed, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
    return hidden + mlp.down_proj(SwiGLU.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _attended(layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, attention: Attention) -> Tensor:
    """(S, heads · D), what the heads of a layer see."""
    query, key, value = (
        project(hidden).unflatten(-1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )  # (S, heads, D)
    if norms := head_norms(layer):
        query, key = (_normed(*each) for each in zip(norms, (query, key), strict=True))
    query, key = (ApplyRotary.apply(each, cosines, sines) for each in (query, key))
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))  # (1, heads, S, D)
    attended = attention.attend(
        layer, query, key, value, scaling=layer.scaling, dropout=0.0, sliding_window=sliding_window(layer), softcap=None
    )
    return attended[0].flatten(1)


def _normed(norm: Any, inputs: Tensor) -> Tensor:
    return RMSNorm.apply(inputs, norm.weight, norm.variance_epsilon)
