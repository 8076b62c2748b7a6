"""A model's folder is checked before transformers and PEFT read it, since it may come from anybody.

Weights are read only from safetensors, since unpickling can run code. No file that a folder names may lie outside of
it, except the base of an adapter, which is checked as a model of its own. No code that a folder names is downloaded.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.files import is_plain_name, json_value, read_json_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
_SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_LAYERS_WITHOUT_WEIGHTS = 1024


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that would run code, read files elsewhere, or ask for far more than its files hold."""
    names = [name for name in (*_SETTINGS, ADAPTER_CONFIG, _INDEX) if (folder / name).is_file()]
    found = {name: read_json_object(folder / name) for name in names}
    config, adapter = found.get("config.json"), found.get(ADAPTER_CONFIG)
    if adapter is not None:
        _need_safetensors(folder, ADAPTER_WEIGHTS)
        patterns, shapes = adapter.get("rank_pattern"), tensor_shapes(folder / ADAPTER_WEIGHTS)
        ranks = [adapter.get("r"), adapter.get("num_virtual_tokens")]
        ranks += patterns.values() if isinstance(patterns, dict) else []
        rank = max((each for each in ranks if isinstance(each, int)), default=0)
        largest = max((size for shape in (shapes or {}).values() for size in shape if isinstance(size, int)), default=0)
        if shapes is not None and rank > largest:  # PEFT allocates them before it compares the two
            asked = f"{folder / ADAPTER_CONFIG} asks for a rank or length of {rank}"
            raise RequestError(f"{asked}, and no weight beside it is larger than {largest}.")
    if config is not None:
        _check_names_no_code(folder, config)
        if adapter is None:
            _need_safetensors(folder, "*.safetensors")
        if _INDEX in found:
            index, files = folder / _INDEX, found[_INDEX].get("weight_map")
            if not isinstance(files, dict):
                got = type(files).__name__
                raise RequestError(f"{index} must hold a weight_map, the file of each weight. Got {got}.")
            for name in files.values():
                if not is_plain_name(name) or not name.endswith(".safetensors"):
                    raise RequestError(f"{index} must name safetensors files of its own folder. Got {name!r:.200}.")
        _check_layers(folder, config)


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in `folder` belongs to: a path or a hub name. None if there is no adapter."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    base = read_json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(f"{file} must name the model it belongs to as base_model_name_or_path. Got {base!r}.")
    return base


@contextmanager
def clear_load_errors(name: str | Path) -> Iterator[None]:
    """Turn whatever prevents a model from being read into a `RequestError` that names the model and the reason."""
    try:
        yield
    except (PromptKDError, torch.OutOfMemoryError):  # of a GPU; of main memory, a damaged file may ask for any size
        raise
    except Exception as error:  # a broken file makes transformers, tokenizers and gguf raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if found := re.search(r"got an unexpected keyword argument '(\w+)'", reason):
            told = f"Could not load {name}: from_pretrained takes no {found[1]}"
            raise RequestError(f"{told}. Leave it out, or correct its name.") from error
        if found := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", reason):
            kind = "an encoder-decoder model or another that writes no text token by token from left to right"
            raise RequestError(
                f"{name} is no causal language model: {found[1]} is {kind}. See docs/models.md."
            ) from error
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other sizes than its config.json asks for."
        similar = similar_here(name)
        listed = f" (similar: {', '.join(similar)})" if similar else ""
        missing = "" if similar is None else f"no folder {name} here{listed}, and as a hub name: "
        problem = f"Could not load a causal language model from {name}: {missing}{reason[:400]}"
        advice = "Check the name, or the network if it is a hub name."
        if Path(name).exists():
            problem, advice = (
                problem.rstrip(".") + ".",
                "It was found here, so look at its files; no network is needed.",
            )
        raise RequestError(f"{problem} {advice}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer's files. Raises `OSError`, also where the tokenizers library raises a bare `Exception`."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        of_system = re.search(r"\(os error (\d+)\)", str(error))
        if type(error) is not Exception or of_system is None:
            raise
        number = int(of_system[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def similar_here(name: str | Path) -> list[str] | None:
    """Existing paths that are spelled like `name`, the nearest first.

    None where `name` exists, or can only mean the hub's: it is owner/name, and there is no folder of the owner's name.
    """
    path = Path(name).expanduser()
    missing = next((each for each in reversed((path, *path.parents)) if not os.path.lexists(each)), None)
    if missing is None or (len(path.parts) > 1 and missing.parent == Path()):
        return None
    above, rest = missing.parent, path.relative_to(missing)
    beside = os.listdir(above) if above.is_dir() and os.access(above, os.R_OK) else []
    found = [above / near / rest for near in get_close_matches(missing.name, beside)]
    return [str(each) for each in found if each.exists()]


def _need_safetensors(folder: Path, pattern: str) -> None:
    if any(file.is_file() for file in folder.glob(pattern)):
        return
    pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind) if file.name != "training_args.bin")
    if pickles:
        advice = "convert it where you trust it, by `save_pretrained` of transformers or PEFT"
        problem = f"holds its weights as pickle ({pickles[0]}), and unpickling can run code"
        raise RequestError(f"{folder} {problem}. Expected {pattern}: {advice}.")
    if pattern == ADAPTER_WEIGHTS:  # PEFT would look for it on the hub
        raise RequestError(f"{folder} holds an adapter's configuration and no {pattern}.")


def _check_names_no_code(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse attention that comes as code from a hub ("owner/kernel"), which transformers would download and run."""
    file = folder / "config.json"
    for key, value in settings.items():
        if key.endswith("_implementation"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if isinstance(name, str) and "/" in name:
                    raise RequestError(f"{file} asks for code from the hub: {key} is {name!r}. Remove it there.")
        elif isinstance(value, dict):
            _check_names_no_code(folder, value)


def _check_layers(folder: Path, config: dict[str, Any]) -> None:
    """Refuse more layers than there are weights: creating them would take hours before the weights are missed."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        layers = max((part[name] for part in parts if isinstance(part.get(name), int)), default=0)
        if layers > _MOST_LAYERS_WITHOUT_WEIGHTS:
            weights = sum(len(tensor_shapes(file) or ()) for file in folder.glob("*.safetensors"))
            if layers > weights:
                file = folder / "config.json"
                raise RequestError(f"{file} asks for {layers} layers ({name}), and the folder holds {weights} weights.")


def tensor_shapes(file: Path) -> dict[str, list[Any]] | None:
    """Of the tensors in a safetensors file, by its header alone, since the rest may be cut; None without a header."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json_value(stream.read(size)) if size <= file.stat().st_size - 8 else None
        except ValueError:
            return None
    named = header.items() if isinstance(header, dict) else ()
    is_tensor = {name: each for name, each in named if name != "__metadata__" and isinstance(each, dict)}
    return {name: each.get("shape") or [] for name, each in is_tensor.items()} if header else None
