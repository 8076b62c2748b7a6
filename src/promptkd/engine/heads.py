"""Language-model heads: the last matrix with its logit scale and soft cap, and matrix products with it.

Logits are float32 or wider whatever the precision around them. Rounded to bfloat16, a logit of 16 is off by 0.06, and a
KL between two such distributions measures the rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import linear
from transformers import PretrainedConfig

from promptkd.data.batch import on_device
from promptkd.engine.backbone import unwrap_peft
from promptkd.objectives.kernels import PLAIN_KERNELS, Kernels

MASKED = -1e15
"""The logit of a masked token: its probability is 0 at any temperature, and no difference of two is NaN."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that distributions are over: ids below `size`, but for those that are masked."""

    size: int
    masked: tuple[int, ...] = ()  # tokens that models to be compared do not share; those from `size` on are cut off


@dataclass(frozen=True)
class Head:
    """A linear head: softcap · tanh(scale · (W h + b) / softcap), for the first `vocabulary_size` tokens."""

    weight: Tensor  # (V or more, H)
    bias: Tensor | None = None  # (V or more,)
    scale: float = 1.0
    softcap: float | None = None
    columns: int | None = None  # V, where columns behind the first V are padding; None for all
    masked: Tensor | None = None  # (M,) columns whose logits are `MASKED` instead

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0] if self.columns is None else self.columns

    @property
    def logits_dtype(self) -> torch.dtype:
        """float32, or float64 for a head in float64."""
        return torch.promote_types(torch.float32, self.weight.dtype)

    @property
    def has_absent_tokens(self) -> bool:
        return self.bias is not None and bool((self.bias[: self.vocabulary_size] == -torch.inf).any())

    def limited_to(self, vocabulary: Vocabulary | int | None) -> "Head":
        """With the columns of a vocabulary, or with the first so many; all of them for None."""
        columns, masked = _columns(vocabulary, self.weight.device)
        return self if columns is None else replace(self, columns=columns, masked=masked)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) in the precision of the logits."""
        size, dtype = self.vocabulary_size, self.logits_dtype
        return self.weight[:size].to(dtype), None if self.bias is None else self.bias[:size].to(dtype)

    def transform_(self, products: Tensor) -> Tensor:
        """W h + b to logits, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products if self.masked is None else products.index_fill_(-1, self.masked, MASKED)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Of the logits with respect to W h + b."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap) ** 2) * self.scale


class Projection:
    """A head's current weights, for products in float32 or wider while autocast is off: plainly here.

    Factors may be rounded to `dtype`, the precision of products around; sums never.
    """

    def __init__(self, head: Head, dtype: torch.dtype):
        self.head, self.dtype = head, dtype
        with torch.no_grad():
            self.weight, self.bias = head.weights()

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, H) to (C, V). May overwrite what an earlier call returned."""
        return self.head.transform_(linear(hidden.to(self.head.logits_dtype), self.weight, self.bias))

    def prepare(self, gradient: Tensor) -> Tensor:
        """A gradient (C, V) with respect to W h + b, as the methods below take it."""
        return gradient

    def hidden_gradient(self, prepared: Tensor) -> Tensor:
        """(C, H), with respect to the hidden states."""
        return prepared @ self.weight

    def add_weight_gradient(self, total: Tensor | None, prepared: Tensor, hidden: Tensor) -> Tensor:
        """total + gradientᵀ hidden, (V, H) in float32 or wider, in place of `total`, which is None at first."""
        hidden = hidden.to(self.head.logits_dtype)
        return prepared.T @ hidden if total is None else total.addmm_(prepared.T, hidden)


@dataclass(frozen=True)
class HeadBackend:
    """How an engine computes with heads: plainly by default."""

    chunk: int = 256  # tokens whose logits are held at a time
    block: int | None = None  # logits that a divergence takes at a time; None for a chunk's
    projection: Callable[[Head, torch.dtype], Projection] = Projection
    kernels: Callable[[torch.dtype], Kernels] = lambda dtype: PLAIN_KERNELS  # for logits of this precision


def head_logits(model: nn.Module, hidden: Tensor, *, vocabulary: Vocabulary | int | None = None) -> Tensor:
    """Project hidden states (…, H) to logits (…, V), in float32 or wider; of a `vocabulary`, or the first so many."""
    inner, head = unwrap_peft(model), linear_head(model)
    columns, masked = _columns(vocabulary, hidden.device)
    if head is None:  # by the head's own module, in its own precision
        scale, softcap = _logit_transform(inner.config.get_text_config())
        products = inner.get_output_embeddings()(hidden)[..., :columns]
        products = products.to(torch.promote_types(torch.float32, products.dtype))
    else:
        head, scale, softcap = head.limited_to(vocabulary), head.scale, head.softcap
        with torch.autocast(hidden.device.type, enabled=False):
            products = linear(hidden.to(head.logits_dtype), *head.weights())
    if scale != 1.0:  # out of place, unlike `Head.transform_`, for autograd
        products = products * scale
    logits = products if softcap is None else torch.tanh(products / softcap) * softcap
    return logits if masked is None else logits.index_fill(-1, masked, MASKED)


def _columns(vocabulary: Vocabulary | int | None, device: torch.device) -> tuple[int | None, Tensor | None]:
    """How many columns, None for all, and which of them are masked, None for none."""
    if not isinstance(vocabulary, Vocabulary):
        return vocabulary, None
    masked = [index for index in vocabulary.masked if index < vocabulary.size]
    return vocabulary.size, on_device(masked, device) if masked else None


def linear_head(model: nn.Module) -> Head | None:
    """The head as plain tensors, gathered where sharded; None if it is no plain linear layer (LoRA, quantized).

    The gradient of gathered weights is the mean over processes, as FSDP's are.
    """
    inner = unwrap_peft(model)
    layer = inner.get_output_embeddings()
    # FSDP2 derives a class of its own from a module's
    kind = type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
    if kind is not nn.Linear:
        return None
    bias = None if layer.bias is None else _gathered(layer.bias)
    return Head(_gathered(layer.weight), bias, *_logit_transform(inner.config.get_text_config()))


def _gathered(weight: Tensor) -> Tensor:
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # sums the gradients of all processes
        if full.requires_grad:
            full.register_hook(lambda gradient: gradient / mesh.size())
        return full
    if weight.numel() == 0:  # DeepSpeed gathers the weights of the model that runs, not of another beside it
        from deepspeed import zero

        with zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def head_size(model: nn.Module) -> int:
    """Number of columns of the head, padding included."""
    return unwrap_peft(model).get_output_embeddings().out_features  # the shape of a weight that DeepSpeed shards is 0


def _logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Scale and soft cap of an architecture's logits: softcap · tanh(scale · logits / softcap)."""
    # Architectures name the scale differently: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
    settings = config.to_dict()
    factors = [settings.get(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scale = next((float(value) for value in factors if value is not None), None)
    if scale is None:
        scaling = float(settings.get("logits_scaling") or 1.0)
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    scale /= float(settings.get("logits_mup_width_multiplier") or 1.0)  # Inkling
    # Gemma's name, RecurrentGemma's and xLSTM's
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((settings[name] for name in names if settings.get(name) is not None), None)
    return scale, None if softcap is None else float(softcap)
