"""Language-model heads: the last matrix, a logit scale, a soft cap; and products with them.

Logits are float32 or wider whatever the precision around them: rounded to bfloat16, a logit of 16 is off by 0.06, and a
KL between two such distributions measures the rounding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig

from promptkd.engine.backbone import embedding_device, evaluating, unwrap_peft
from promptkd.errors import RequestError
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

__all__ = ["Head", "HeadProducts", "Projection", "check_scoring", "head_logits", "head_size", "linear_head"]


@dataclass(frozen=True)
class Head:
    """A linear head: softcap · tanh(scale · (W h + b) / softcap), of the first `vocabulary` tokens."""

    weight: Tensor
    """(at least V, H)"""
    bias: Tensor | None = None
    """(at least V,)"""
    scale: float = 1.0
    softcap: float | None = None
    columns: int | None = None
    """V, the columns that stand for tokens; None for all. Those behind them are padding."""

    @property
    def vocabulary(self) -> int:
        """V"""
        return self.weight.shape[0] if self.columns is None else self.columns

    @property
    def wide(self) -> torch.dtype:
        """The precision of logits: float32, or float64 for a head in float64."""
        return torch.promote_types(torch.float32, self.weight.dtype)

    def transformed(self, products: Tensor) -> Tensor:
        """W h + b to logits, written over them."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to W h + b, from the logits."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap) ** 2) * self.scale

    @property
    def has_absent_tokens(self) -> bool:
        """Whether a bias of -inf takes tokens away."""
        return self.bias is not None and bool((self.bias[: self.vocabulary] == -torch.inf).any())

    def of(self, vocabulary: int | None) -> "Head":
        """The same head with its first `vocabulary` columns; all it has for None."""
        return self if vocabulary is None else replace(self, columns=vocabulary)


class Projection:
    """One head, ready for products in float32 or wider. This is the plain form; engines have faster ones.

    Autocast must be off around the calls, or torch would round what they return.

    Args:
        head: its weights are read when this is made.
        computing: the precision that products were asked for in; they may round their factors to it, never their sums.
    """

    def __init__(self, head: Head, computing: torch.dtype):
        self.head, self.computing = head, computing
        bias = None if head.bias is None else head.bias.detach()[: head.vocabulary]
        self.weight = head.weight.detach()[: head.vocabulary].to(head.wide)  # (V, H)
        self.bias = None if bias is None else bias.to(head.wide)

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, H) to (C, V). What an earlier call has returned may be overwritten."""
        return self.head.transformed(torch.nn.functional.linear(hidden.to(self.head.wide), self.weight, self.bias))

    def prepared(self, gradient: Tensor) -> Tensor:
        """A gradient (C, V) with respect to W h + b in the form that `to_hidden` and `add_to_weight` multiply."""
        return gradient

    def to_hidden(self, prepared: Tensor) -> Tensor:
        """The gradient with respect to hidden states, (C, H)."""
        return prepared @ self.weight

    def add_to_weight(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        """total + gradientᵀ hidden, (V, H) in float32 or wider, written over `total`, which is None at first."""
        hidden = hidden.to(self.head.wide)
        return prepared.T @ hidden if total is None else total.addmm_(prepared.T, hidden)


class HeadProducts:
    """How an engine multiplies by heads, and compares what comes out."""

    chunk: int = 256
    """Tokens whose logits are held at a time."""

    def kernels(self, dtype: torch.dtype) -> Kernels:
        """Divergences with their gradients, for logits of this precision."""
        return PLAIN_KERNELS

    def projection(self, head: Head, computing: torch.dtype, *, reuse: bool = False) -> Projection:
        """The head as it is now.

        Args:
            computing: see `Projection`.
            reuse: whether every call of `logits` may overwrite what the one before it returned.
        """
        return Projection(head, computing)

    def block_rows(self, vocabulary: int) -> int | None:
        """Tokens that a divergence sees at a time; None for all of a chunk."""
        return None


def head_logits(model: nn.Module, hidden: Tensor, *, vocabulary: int | None = None) -> Tensor:
    """Project hidden states (…, H) to logits (…, V) in float32 or wider, with the model's own scale and soft cap.

    Args:
        vocabulary: only the first so many columns.
    """
    head = linear_head(model)
    if head is None:
        return module_logits(model, hidden)[..., :vocabulary]
    head = head.of(vocabulary)
    weight, bias = head.weight[: head.vocabulary], head.bias
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias[: head.vocabulary].to(head.wide)
        products = torch.nn.functional.linear(hidden.to(head.wide), weight.to(head.wide), bias)
        return _transformed_with_graph(products, head.scale, head.softcap)


def module_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (…, V) by the head's own module, in the precision that it has: for heads with LoRA, or quantized."""
    inner = unwrap_peft(model)
    products = inner.get_output_embeddings()(hidden)
    wide = products.to(torch.promote_types(torch.float32, products.dtype))
    return _transformed_with_graph(wide, *_logit_transform(inner.config.get_text_config()))


def _transformed_with_graph(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`Head.transformed` for products that autograd may come back to, so nothing is written over."""
    if scale != 1.0:
        products = products * scale
    return products if softcap is None else torch.tanh(products / softcap) * softcap


def linear_head(model: nn.Module) -> Head | None:
    """The head as plain tensors; None if it is more than a linear layer (LoRA, quantized).

    Sharded weights are gathered, once for all chunks; their gradient is the mean over the processes, as FSDP's are.
    """
    inner = unwrap_peft(model)
    layer = inner.get_output_embeddings()
    # FSDP2 puts a class of its own before a module's
    kind = type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
    if kind is not nn.Linear:
        return None
    tensors = [_gathered(each) for each in (layer.weight, layer.bias) if each is not None]
    bias = tensors[1] if len(tensors) > 1 else None
    return Head(tensors[0], bias, *_logit_transform(inner.config.get_text_config()))


def _gathered(weight: Tensor) -> Tensor:
    """A sharded weight whole; as it is if it is not sharded."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # sums the gradients of all processes
        if whole.requires_grad:
            whole.register_hook(lambda gradient: gradient / mesh.size())
        return whole
    if weight.numel() == 0:  # DeepSpeed's; it brings back the weights of the model that runs, not of another beside it
        from deepspeed import zero

        with zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def head_size(model: nn.Module) -> int:
    """Number of columns of the head, padding included."""
    return unwrap_peft(model).get_output_embeddings().out_features  # DeepSpeed's sharded weights have no shape


def check_scoring(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head on its backbone's last hidden state, by trying two tokens.

    Raises:
        RequestError: if the backbone cannot be reached, or the logits differ from the model's own.
    """
    inner = unwrap_peft(model)
    ids = torch.tensor([[0, 1]], device=embedding_device(inner))
    exact = torch.autocast(ids.device.type, enabled=False)  # in it, the model would round its own logits
    with torch.no_grad(), evaluating(inner), exact:
        expected = inner(input_ids=ids, use_cache=False).logits.float()
        embedded = inner.get_input_embeddings()(ids)
        got = [_backbone_logits(model, input_ids=ids), _backbone_logits(model, inputs_embeds=embedded)]
    tolerance = 1e-3 if inner.dtype.itemsize > 2 else 0.05  # of a half precision, the model rounds its own logits
    limit = tolerance * float(expected.abs().max().clamp(min=1.0))
    if any(each.shape != expected.shape or float((each - expected).abs().max()) > limit for each in got):
        raise RequestError(
            f"{type(inner).__name__} computes its logits in a way promptkd does not know: its head on the last hidden "
            "state does not give the model's own logits. Supported are decoder-only models with a linear head, a "
            "constant logit scale and a tanh soft cap."
        )


def _backbone_logits(model: nn.Module, **inputs: Any) -> Tensor:
    hidden = unwrap_peft(model).base_model(**inputs, use_cache=False).last_hidden_state
    return head_logits(model, hidden).float()


def _logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Scale and soft cap of a family's logits: softcap · tanh(scale · logits / softcap)."""
    # Families spell the scale differently: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
    settings = config.to_dict()
    named = [settings.get(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    given = [float(value) for value in named if value is not None]
    scale = given[0] if given else 1.0
    if not given and settings.get("logits_scaling") is not None:
        scaling = float(settings["logits_scaling"])
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    softcap = settings.get("final_logit_softcapping")
    return scale, None if softcap is None else float(softcap)
