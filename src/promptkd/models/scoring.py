"""From token batches to the logits of their response tokens, with or without a soft prompt.

The backbone runs over whole rows; only the positions that predict a response token reach the head.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from promptkd.data.packing import TokenBatch
from promptkd.errors import RequestError
from promptkd.models.packed import packed_hidden, packs
from promptkd.models.prepacked import multiplies_by_onednn
from promptkd.objectives.linear import Head
from promptkd.switches import switched_on

__all__ = [
    "check_scoring",
    "head_logits",
    "head_size",
    "linear_head",
    "response_hidden",
    "response_logits",
    "text_model",
]


def text_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    from peft import PeftModel

    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise RequestError("A model with a soft prompt of its own is not read here: the prompt would be left out.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PeftModel of one. Got {type(model).__name__}.")
    return inner


def response_hidden(model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None) -> Tensor:
    """Last hidden states that predict the response tokens.

    Args:
        model: a causal model of transformers, or a PeftModel of one.
        batch: right-padded rows.
        prompt: (n, E) embeddings put before each row, or None. Rows follow it at positions n, n + 1, …

    Returns:
        (N, H), one row a response token, in the order of `batch.targets`.
    """
    inner = text_model(model)
    if prompt is not None and prompt.shape[0] == 0:
        prompt = None
    if packs(inner):
        return packed_hidden(inner, batch, prompt)
    return padded_hidden(inner, batch, prompt)


def padded_hidden(inner: PreTrainedModel, batch: TokenBatch, prompt: Tensor | None) -> Tensor:
    """`response_hidden` over the rectangle as it is: padding is computed, and not looked at."""
    positions = batch.position_ids
    if prompt is None:
        length, inputs = 0, {"input_ids": batch.input_ids}
    else:
        length = prompt.shape[0]
        embedded = inner.get_input_embeddings()(batch.input_ids)  # (B, T, E), scaled where the model scales
        before = prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        inputs = {"inputs_embeds": torch.cat([before, embedded], dim=1)}
        leading = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
        positions = torch.cat([leading, positions + length], dim=1)
    hidden = inner.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    return hidden[batch.rows, batch.columns + length]


def response_logits(
    model: nn.Module, batch: TokenBatch, prompt: Tensor | None = None, *, vocabulary: int | None = None
) -> Tensor:
    """Logits that predict the response tokens, (N, V); sliced to the first `vocabulary` columns if given."""
    logits = head_logits(model, response_hidden(model, batch, prompt))
    return logits if vocabulary is None else logits[:, :vocabulary]


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Project hidden states (…, H) to logits (…, V), with the model's own logit scale and soft cap."""
    inner = text_model(model)
    logits = inner.get_output_embeddings()(hidden)
    scale, softcap = _logit_transform(inner.config.get_text_config())
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def linear_head(model: nn.Module) -> Head | None:
    """The head as plain tensors; None if it is more than a linear layer (LoRA, quantised).

    Sharded weights are gathered, once for all chunks; their gradient is the mean over the processes, as FSDP's are.
    """
    inner = text_model(model)
    layer = inner.get_output_embeddings()
    # FSDP2 puts a class of its own before a module's
    kind = type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
    if kind is not nn.Linear:
        return None
    tensors = [_gathered(each) for each in (layer.weight, layer.bias) if each is not None]
    bias = tensors[1] if len(tensors) > 1 else None
    scale, softcap = _logit_transform(inner.config.get_text_config())
    return Head(
        tensors[0], bias, scale, softcap, onednn=switched_on("onednn_head") and multiplies_by_onednn(tensors[0])
    )


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
    return text_model(model).get_output_embeddings().out_features  # DeepSpeed's sharded weights have no shape


def check_scoring(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head on its backbone's last hidden state, by trying two tokens.

    Raises:
        RequestError: if the backbone cannot be reached, or the logits differ from the model's own.
    """
    inner = text_model(model)
    device = inner.get_input_embeddings().weight.device
    ids = torch.tensor([[0, 1]], device=device)
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            expected = inner(input_ids=ids, use_cache=False).logits.float()
            hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            got = head_logits(model, hidden).float()
            embedded = inner.base_model(inputs_embeds=inner.get_input_embeddings()(ids), use_cache=False)
            from_embeddings = head_logits(model, embedded.last_hidden_state).float()
    finally:
        inner.train(training)
    tolerance = 1e-3 * float(expected.abs().max().clamp(min=1.0))
    if (
        got.shape != expected.shape
        or max(float((each - expected).abs().max()) for each in (got, from_embeddings)) > tolerance
    ):
        raise RequestError(
            f"{type(inner).__name__} computes its logits in a way promptkd does not know: its head on the last hidden "
            "state does not give the model's own logits. Supported are decoder-only models with a linear head, a "
            "constant logit scale and a tanh soft cap."
        )


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
