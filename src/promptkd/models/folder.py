"""A model's folder is checked before transformers and PEFT read it, since it may come from anybody.

Weights are read only from safetensors, since unpickling can run code. No file that a folder names may lie outside of
it, except the base of an adapter, which is checked as a model of its own. No code that a folder names is downloaded.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.files import is_plain_name, json_value, read_json_object

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MOST_LAYERS_WITHOUT_WEIGHTS = 1024


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that would run code, read files elsewhere, or ask for far more than its files hold.

    Raises:
        RequestError: with what was found and what to do.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        settings = read_json_object(folder / "adapter_config.json")
        _need_safetensors(folder, ADAPTER_WEIGHTS)
        _check_rank(folder, settings)
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        _check_names_no_code(folder, config)
        if not is_adapter:
            _need_safetensors(folder, "*.safetensors")
        if (folder / "model.safetensors.index.json").is_file():
            _check_index(folder / "model.safetensors.index.json")
        _check_layers(folder, config)
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in `folder` belongs to: a path or a hub name. None if there is no adapter."""
    file = folder / "adapter_config.json"
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
    except PromptKDError:
        raise
    except Exception as error:  # a broken file makes transformers, tokenizers and gguf raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other sizes than its config.json asks for."
        raise RequestError(
            f"Could not load a causal language model from {name}: {reason[:400]} "
            "Check the name, or the network if it is a hub name."
        ) from error


def _need_safetensors(folder: Path, pattern: str) -> None:
    if any(file.is_file() for file in folder.glob(pattern)):
        return
    pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind) if file.name != "training_args.bin")
    if pickles:
        raise RequestError(
            f"{folder} holds its weights as pickle ({pickles[0]}), and unpickling can run code. Expected {pattern}: "
            "convert it where you trust it, by `save_pretrained` of transformers or PEFT."
        )
    if pattern == ADAPTER_WEIGHTS:  # PEFT would look for it on the hub
        raise RequestError(f"{folder} holds an adapter's configuration and no {pattern}.")


def _check_index(index: Path) -> None:
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict):
        raise RequestError(f"{index} must hold a weight_map, the file of each weight. Got {type(files).__name__}.")
    strange = [name for name in files.values() if not is_plain_name(name) or not name.endswith(".safetensors")]
    if strange:
        raise RequestError(f"{index} must name safetensors files of its own folder. Got {strange[0]!r:.200}.")


def _check_names_no_code(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse attention that comes as code from a hub ("owner/kernel"), which transformers would download and run."""
    for key, value in settings.items():
        if key.endswith("_implementation"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if isinstance(name, str) and "/" in name:
                    raise RequestError(
                        f"{folder / 'config.json'} asks for code from the hub: {key} is {name!r}. Remove it there."
                    )
        elif isinstance(value, dict):
            _check_names_no_code(folder, value)


def _check_layers(folder: Path, config: dict[str, Any]) -> None:
    """Refuse more layers than there are weights: creating them would take hours before the weights are missed."""
    text = config.get("text_config")
    for settings in (config, *([text] if isinstance(text, dict) else [])):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            layers = settings.get(name)
            if isinstance(layers, int) and layers > _MOST_LAYERS_WITHOUT_WEIGHTS and layers > _count_weights(folder):
                raise RequestError(
                    f"{folder / 'config.json'} asks for {layers} layers ({name}), and the folder holds "
                    f"{_count_weights(folder)} weights."
                )


def _check_rank(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse an adapter of a higher rank than its weights have: PEFT allocates it before it compares the two."""
    patterns = settings.get("rank_pattern")
    ranks = [settings.get("r"), settings.get("num_virtual_tokens")]
    ranks += list(patterns.values()) if isinstance(patterns, dict) else []
    header = _header(folder / ADAPTER_WEIGHTS)
    sizes = [size for tensor in header.values() if isinstance(tensor, dict) for size in tensor.get("shape") or ()]
    largest = max((size for size in sizes if isinstance(size, int)), default=0)
    for rank in ranks:
        if header and isinstance(rank, int) and rank > largest:
            raise RequestError(
                f"{folder / 'adapter_config.json'} asks for a rank or length of {rank}, and no weight beside it is "
                f"larger than {largest}."
            )


def _count_weights(folder: Path) -> int:
    return sum(len(_header(file)) for file in sorted(folder.glob("*.safetensors")))


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, by the names of its tensors; {} if it is no such file."""
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size <= min(_MOST_HEADER_BYTES, file.stat().st_size - 8):
            return {}
        try:
            found = json_value(stream.read(size))
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}
