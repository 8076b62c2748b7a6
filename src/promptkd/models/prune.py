"""Layer pruning: a student made of some of the teacher's layers, by block influence, evenly spaced or by index."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptkd.data.batch import TokenBatch, on_device
from promptkd.engine import evaluating
from promptkd.engine.backbone import backbone_of, embedding_device
from promptkd.errors import RequestError


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers; `RequestError` if the text model does not hold them in one `ModuleList`."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    names = {id(each): name for name, each in model.named_modules()}
    # `get_decoder`: of a multimodal model its text part
    text = model.get_decoder() if model.get_decoder() is not model else backbone_of(model)
    lists = [each for each in text.children() if isinstance(each, nn.ModuleList)]
    found = [(names[id(each)], each) for each in lists if len(each) == count]
    if len(found) != 1:
        expected = f"Expected one list of {count} decoder layers in {type(model).__name__}"
        raise RequestError(f"{expected}. Found {len(found)}: this architecture cannot be pruned by layer.")
    return found[0]


def block_influence(model: PreTrainedModel, batches: Sequence[TokenBatch]) -> list[float]:
    """1 - cosine of each layer's input and output, averaged over real tokens (ShortGPT, Men et al. 2024, eq. 1)."""
    if not batches:
        raise RequestError("Block influence needs at least one row to be measured on. Got no batch.")
    _, layers = decoder_layers(model)
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0

    def record(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
        sums[index] += float((1 - cosine)[is_real.to(cosine.device)].double().sum())

    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(record, index), with_kwargs=True))
        for batch in batches:
            is_real = batch.position_ids < on_device(batch.lengths, batch.input_ids.device)[:, None]
            tokens += sum(batch.lengths)
            backbone_of(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return (sums / tokens).tolist()


def most_influential(influence: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` layers with the highest influence, in order of depth."""
    _check_count(count, len(influence))
    return sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:count])


def evenly_spaced(total: int, count: int) -> list[int]:
    """Indices of `count` of `total` layers at even distances, from first to last (only the first if count is 1)."""
    _check_count(count, total)
    return [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]


def _check_count(count: int, total: int) -> None:
    if not 1 <= count <= total:
        raise RequestError(f"The student needs between 1 and {total} layers, the number its teacher has. Got {count}.")


def prune_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with copies of the given layers; `RequestError` for none, unknown, repeated or unordered ones."""
    name, stack = decoder_layers(model)
    last = len(stack) - 1
    if not layers:
        raise RequestError(f"Expected at least one layer to keep, of 0 … {last}. Got none.")
    if outside := [index for index in layers if not 0 <= index <= last]:
        raise RequestError(f"The teacher has layers 0 … {last}. Got {outside[0]}.")
    if list(layers) != sorted(set(layers)):
        raise RequestError(f"Layers must be given once each, in ascending order. Got {list(layers)}.")
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = len(layers)
    for key, value in text.to_dict().items():  # settings per layer: layer_types, no_rope_layers, layers_block_type, …
        if "layer" in key and isinstance(value, list) and len(value) == len(stack):
            setattr(text, key, [value[index] for index in layers])
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)  # buffers such as RoPE's stay float32
    weights = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{name}.")}
    for new, old in enumerate(layers):
        weights |= {f"{name}.{new}.{key}": tensor for key, tensor in stack[old].state_dict().items()}
    student = student.to(device=embedding_device(model))
    problem = RequestError(
        f"{type(model).__name__} cannot be pruned by layer: its layers do not give the student that they make up. "
        "Merge adapters into the weights first; models whose layers depend on their depth are not supported."
    )
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise problem from error
    student.name_or_path = student.config.name_or_path = ""  # no folder holds it yet
    student.generation_config = copy.deepcopy(model.generation_config)
    student.tie_weights()
    if not _is_part(model, student.eval(), stack, layers):
        raise problem
    return student


def _is_part(model: PreTrainedModel, student: PreTrainedModel, stack: nn.ModuleList, layers: Sequence[int]) -> bool:
    """Whether the student computes what the teacher computes when its other layers pass their input through."""

    def pass_through(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return before if isinstance(output, Tensor) else (before, *output[1:])

    ids = torch.arange(4, device=embedding_device(model))[None]
    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for index, layer in enumerate(stack):
            if index not in layers:
                hooks.enter_context(layer.register_forward_hook(pass_through, with_kwargs=True))
        expected = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state.float()
        got = backbone_of(student)(input_ids=ids, use_cache=False).last_hidden_state.float()
    return not float((got - expected).abs().max()) > 1e-3 * float(expected.abs().max())
