"""A state of tensors, numbers and texts as NAME.json and NAME.safetensors: nothing is pickled, so no code can hide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from promptkd.errors import PromptKDError


def write_state(path: Path, state: Any) -> None:
    """Write `state` as `path`.json, and its tensors, if it holds any, as `path`.safetensors; types are kept.

    Raises `PromptKDError` for what is not made of tensors, arrays, numbers, texts, None, lists, tuples and mappings.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encoded(state, path.name, tensors)
    path.with_suffix(".json").write_text(json.dumps(encoded) + "\n", encoding="utf-8")
    if tensors:
        save_file(_apart(tensors), path.with_suffix(".safetensors"))


def has_state(path: Path) -> bool:
    """Whether `write_state` has written here."""
    return path.with_suffix(".json").is_file()


def read_state(path: Path) -> Any:
    """What `write_state` was given, its tensors on the CPU. Raises `PromptKDError` if the files are damaged."""
    try:
        encoded = json.loads(path.with_suffix(".json").read_bytes())
        file = path.with_suffix(".safetensors")
        return _decoded(encoded, load_file(file) if file.is_file() else {})
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PromptKDError(f"{path.with_suffix('.json')} is damaged, or no state of a checkpoint: {reason}") from error


def _encoded(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON. What JSON has no form for is a mapping with one key, which names the form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and type(value.detach()) is Tensor:
        name = f"{place}#{len(tensors)}" if place in tensors else place
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return {"array": [str(value.dtype), value.tolist()]}
    if isinstance(value, list | tuple):
        parts = [_encoded(part, f"{place}.{at}", tensors) for at, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        pairs = value.items()  # whose keys need not be texts
        return {"mapping": [[_encoded(k, place, tensors), _encoded(v, f"{place}.{k}", tensors)] for k, v in pairs]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    told = f"A checkpoint holds tensors, numbers and texts, but {place} is a {kind}, which only a pickle could keep."
    raise PromptKDError(f"{told} Choose another optimizer, schedule or source of responses, or give --save_only_model.")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((form, held),) = value.items()
    if form == "tensor":
        return tensors[held]
    if form == "array":
        return np.array(held[1], dtype=held[0])
    if form == "tuple":
        return tuple(_decoded(part, tensors) for part in held)
    if form == "mapping":
        return {_decoded(key, tensors): _decoded(part, tensors) for key, part in held}
    raise ValueError(f"unknown form {form!r}")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.cpu().contiguous()
        if (at := own.untyped_storage().data_ptr()) in held:
            own = own.clone()
        held.add(at)
        found[name] = own
    return found
