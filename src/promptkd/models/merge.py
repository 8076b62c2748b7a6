"""Adapters of PEFT on their base model: merged into its weights, so that everything else meets a plain model.

What was merged into a model is remembered: a new adapter that is trained on it belongs to those weights, and is saved
joined with it (`adapter_files`).
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.engine import unwrap_peft
from promptkd.errors import RequestError
from promptkd.models.folder import ADAPTER_WEIGHTS, clear_load_errors, tensor_shapes
from promptkd.models.source import Adapter, Source, absolute_name

Updates = dict[str, tuple[Tensor, Tensor]]
"""By the name of a module: A (r, in) and B (out, r), float32 on the CPU, whose product BA is what its weight gained."""

_LOW_RANK = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class Merged:
    """What was merged into a model."""

    source: Source
    told: str  # what the model is, after "is", for the terminal and for records
    updates: Updates | None = field(repr=False)  # None where they are more than products of low rank

    @property
    def name(self) -> str | None:
        """Of the model with all that was merged into it; None if no folder holds that."""
        return self.source.adapters[-1].name if self.source.adapters else None


_MERGED: "WeakKeyDictionary[nn.Module, Merged]" = WeakKeyDictionary()
_TRAINED: WeakSet[nn.Module] = WeakSet()  # models whose weights are no longer those that their names lead to


def merged_parts(model: nn.Module) -> Merged | None:
    """What was merged into the weights of `model`, or of the model inside its wrapper; None for a model as it came."""
    return _MERGED.get(unwrap_peft(model))


def forget_origin(model: nn.Module) -> None:
    """Note that the weights of `model` are being trained: neither its name leads to them now, nor what was merged."""
    inner = unwrap_peft(model)
    _MERGED.pop(inner, None)
    _TRAINED.add(inner)


def base_name(model: nn.Module) -> str | None:
    """What an adapter that is trained on `model` names as its base, from any working directory; None if nothing is."""
    inner = unwrap_peft(model)
    if inner in _TRAINED:
        return None
    merged = _MERGED.get(inner)
    return merged.name if merged is not None else absolute_name(inner.name_or_path) or None


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is more than the model of its name: with an adapter, merged or not."""
    return merged_parts(model) is not None or has_adapter(model)


def merge_adapters(model: PreTrainedModel, source: Source, adapters: Sequence[Adapter]) -> PreTrainedModel:
    """`model`, the base of `source`, with `adapters` merged into its weights, one after the other."""
    if not adapters:
        return model
    updates: Updates | None = {}
    told = []
    if dequantized := vars(model).get("is_quantized", False):
        model = _dequantized(model, source.base)
    for adapter in adapters:
        ends = [each.detach().clone() for each in _end_weights(model)]
        wrapped = with_adapter(model, adapter)
        # embeddings that were saved whole beside the adapter are no product of low rank
        has_same_ends = all(map(torch.equal, ends, _end_weights(wrapped)))
        own = low_rank_updates(wrapped) if has_same_ends else None
        updates = None if updates is None or own is None else joined(updates, own)
        told.append(f"{adapter.name} ({_kind(wrapped.peft_config['default'])})")
        model = _merged(wrapped)
    how = ", dequantized," if dequantized else ""
    whole = f"{absolute_name(source.base)}{how} with {', then '.join(told)} merged into its weights"
    _MERGED[model] = Merged(Source(source.base, source.revision, tuple(adapters)), whole, updates)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same weights: what is put between its layers is not in `model`."""
    made = copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
    keep_origin(made, model)
    return made


def keep_origin(made: nn.Module, model: nn.Module) -> None:
    """Note of `made`, a copy of `model`, what is known of where its weights came from."""
    for copied, own in zip(made.modules(), model.modules(), strict=True):  # of a wrapper, the model inside it
        if own in _MERGED:
            _MERGED[copied] = _MERGED[own]
        if own in _TRAINED:
            _TRAINED.add(copied)


def remember_merged(model: PreTrainedModel, merged: Merged) -> None:
    """Note that `model` is, in other precision or elsewhere, what `merged` was said of."""
    _MERGED[model] = merged


def with_adapter(model: PreTrainedModel, adapter: Adapter, *, trainable: bool = False) -> PeftModel:
    """`model` in PEFT's wrapper with `adapter`, whose weights must all find their place. Random states stay."""
    with clear_load_errors(adapter.folder), torch.random.fork_rng(devices=[]), _silence():
        config = PeftConfig.from_pretrained(str(adapter.folder))
        _check_kind(config, adapter)
        _make_room(model, adapter)
        config.inference_mode = not trainable
        wrapped = PeftModelForCausalLM(model, config)
        keys = vars(type(model)).get("_checkpoint_conversion_mapping") or {}
        place = {"is_trainable": trainable, "torch_device": "cpu"}
        loaded = wrapped.load_adapter(str(adapter.folder), "default", key_mapping=keys, **place)
    if lost := [*loaded.unexpected_keys, *loaded.missing_keys]:
        problem = f"{len(lost)} weights of the adapter in {adapter.folder} and of {model.name_or_path} do not match"
        raise RequestError(f"{problem}, {lost[0]} among them. Is it an adapter of another model?")
    if not all(weight.isfinite().all() for name, weight in wrapped.named_parameters() if ".default" in name):
        raise RequestError(f"The adapter in {adapter.folder} holds weights that are NaN or infinite.")
    _untie(wrapped)
    return wrapped


def merge_given(model: nn.Module) -> nn.Module:
    """A loaded model with its adapter, if any, merged in place: a `PeftModel`, or one that transformers loaded so.

    `RequestError` for a quantized model, whose weights would be rounded anew.
    """
    if not has_adapter(model):
        return model
    inner = unwrap_peft(model)
    if vars(inner).get("is_quantized", False):
        problem = "has an adapter on quantized weights, which would be rounded anew"
        raise RequestError(
            f"{inner.name_or_path or type(inner).__name__} {problem}. Give the adapter's folder instead."
        )
    configs = model.peft_config if isinstance(model, PeftModel) else inner.peft_config
    before, updates = _MERGED.get(inner), low_rank_updates(model)
    earlier: Updates | None = {} if before is None else before.updates
    updates = None if updates is None or earlier is None else joined(earlier, updates)
    kinds = ", ".join(_kind(config) for config in configs.values())
    _untie(model)
    plain = _merged(model)
    name = "" if plain in _TRAINED else plain.name_or_path
    base = Source(name) if before is None else Source(before.source.base, before.source.revision)
    whole = f"{absolute_name(name) or 'a loaded model'} with {kinds} merged into its weights"
    _MERGED[plain] = Merged(base, whole if before is None else f"{before.told}, and {kinds} after that", updates)
    return plain


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` computes with weights of an adapter that are not merged."""
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def low_rank_updates(model: nn.Module) -> Updates | None:
    """What the active adapters of `model` add to its weights; None where that is more than a product of low rank."""
    inner = unwrap_peft(model)
    configs = model.peft_config if isinstance(model, PeftModel) else inner.peft_config
    tuned = [layer for layer in inner.modules() if isinstance(layer, BaseTunerLayer)]
    active = list(dict.fromkeys(name for layer in tuned for name in layer.active_adapters))
    layers = {name: layer for name, layer in inner.named_modules() if isinstance(layer, LoraLayer)}
    found: Updates = {}
    for adapter in active:
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        if not is_low_rank(configs[adapter]) or not all(any(part in key for part in _LOW_RANK) for key in state):
            return None
        if any(layer.lora_variant or type(layer).__name__ == "ParamWrapper" for layer in layers.values()):
            return None
        for name, layer in layers.items():
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            elif adapter in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                continue
            own = a.detach().float().cpu().clone(), b.detach().float().cpu() * layer.scaling[adapter]
            found = joined(found, {name: own})
    return found


def is_low_rank(config: PeftConfig) -> bool:
    """Whether such an adapter adds a product of two small matrices to weights, and does nothing else."""
    return (
        isinstance(config, LoraConfig)
        and not (config.use_dora or config.lora_bias or config.alora_invocation_tokens or config.target_parameters)
        and not (config.modules_to_save or config.layer_replication or config.trainable_token_indices)
        and config.bias == "none"
        and config.init_lora_weights in (True, False, "gaussian", "orthogonal")  # others change the base's weights
    )


def joined(first: Updates, second: Updates) -> Updates:
    """Both updates as one: ranks add up where a module has both."""
    both = {
        name: (torch.cat([first[name][0], second[name][0]]), torch.cat([first[name][1], second[name][1]], dim=1))
        for name in first.keys() & second.keys()
    }
    return {**first, **second, **both}


def _merged(model: nn.Module) -> PreTrainedModel:
    """The model with its adapter in its weights, all of which train again. Sums are float32, and rounded once."""
    with _silence():
        if isinstance(model, PeftModel):
            plain = model.merge_and_unload()
        else:
            plain = unwrap_peft(model)
            layers = {name: each for name, each in plain.named_modules() if isinstance(each, BaseTunerLayer)}
            for name, layer in layers.items():
                layer.merge()
                plain.set_submodule(name, layer.get_base_layer())
            del plain.peft_config
            plain._hf_peft_config_loaded = False
            vars(plain).pop("_weight_conversions", None)  # the adapter's: its keys would be saved in PEFT's manner
    return plain.requires_grad_(True).eval()


def _check_kind(config: PeftConfig, adapter: Adapter) -> None:
    if config.task_type not in (None, "CAUSAL_LM"):
        raise RequestError(
            f"The adapter in {adapter.folder} makes no causal language model: it is for {config.task_type}."
        )
    if isinstance(config, LoraConfig) and (config.alora_invocation_tokens or config.layer_replication):
        what = "acts on parts of a text alone (aLoRA)" if config.alora_invocation_tokens else "repeats layers"
        raise RequestError(f"The adapter in {adapter.folder} {what}, so it cannot be merged into its model.")


def _kind(config: PeftConfig) -> str:
    if not isinstance(config, LoraConfig):
        return f"an adapter of type {config.peft_type.value}"
    return f"{'DoRA' if config.use_dora else 'LoRA'} of rank {config.r}"


def _make_room(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give the embeddings as many rows as the adapter's own: tokens were added before it was trained."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    prefixes = tuple(f"base_model.model.{name}." for name in names)
    rows = set()
    for key, shape in (tensor_shapes(adapter.folder / ADAPTER_WEIGHTS) or {}).items():
        if key.startswith(prefixes) and len(shape) == 2:
            if "lora_embedding_A" in key:
                rows.add(shape[1])
            elif key.endswith(".weight") and not key.endswith(".lora_A.weight"):
                rows.add(shape[0])
    if len(rows) == 1 and (count := rows.pop()) != ends[0].weight.shape[0]:
        model.resize_token_embeddings(count, mean_resizing=False)


def _end_weights(model: nn.Module) -> list[Tensor]:
    """The weights of embeddings and head, without what an adapter adds to them."""
    inner = unwrap_peft(model)
    ends = inner.get_input_embeddings(), inner.get_output_embeddings()
    return [(end.get_base_layer() if isinstance(end, BaseTunerLayer) else end).weight for end in ends]


def _untie(model: nn.Module) -> None:
    """Give the head a weight of its own, where an adapter would otherwise be merged into the embeddings too."""
    inner = unwrap_peft(model)
    ends = inner.get_input_embeddings(), inner.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embedding, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        inner.config.tie_word_embeddings = inner.config.get_text_config().tie_word_embeddings = False


def _dequantized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with weights that an adapter can be merged into."""
    try:
        return model.dequantize(dtype=torch.float32)
    except (NotImplementedError, ValueError, ImportError) as error:
        problem = f"{name} is quantized, and its adapter cannot be merged into it: {error}"
        advice = "Name the model before its quantization as base_model_name_or_path in adapter_config.json"
        raise RequestError(f"{problem} {advice}.") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Without PEFT's warnings: of ties between embeddings, which are seen to here, and of what is said by `Merged`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
