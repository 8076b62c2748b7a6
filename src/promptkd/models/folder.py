"""A model's folder is checked before transformers and PEFT read it, since it may come from anybody.

Weights are read only from safetensors, since unpickling can run code. No file that a folder names may lie outside of
it, except the base of an adapter, which is checked as a model of its own. No code that a folder names is downloaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.files import is_plain_name, read_json_object

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
_SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_LAYERS_WITHOUT_WEIGHTS = 1024


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that would run code, read files elsewhere, or ask for far more than its files hold."""
    names = [name for name in (*_SETTINGS, _ADAPTER_CONFIG, _INDEX) if (folder / name).is_file()]
    found = {name: read_json_object(folder / name) for name in names}
    config, adapter = found.get("config.json"), found.get(_ADAPTER_CONFIG)
    if adapter is not None:
        _need_safetensors(folder, _ADAPTER_WEIGHTS)
        _check_rank(folder, adapter)
    if config is not None:
        _check_names_no_code(folder, config)
        if adapter is None:
            _need_safetensors(folder, "*.safetensors")
        if _INDEX in found:
            _check_index(folder / _INDEX, found[_INDEX].get("weight_map"))
        _check_layers(folder, config)


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in `folder` belongs to: a path or a hub name. None if there is no adapter."""
    file = folder / _ADAPTER_CONFIG
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
    if pattern == _ADAPTER_WEIGHTS:  # PEFT would look for it on the hub
        raise RequestError(f"{folder} holds an adapter's configuration and no {pattern}.")


def _check_index(index: Path, files: Any) -> None:
    if not isinstance(files, dict):
        raise RequestError(f"{index} must hold a weight_map, the file of each weight. Got {type(files).__name__}.")
    for name in files.values():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise RequestError(f"{index} must name safetensors files of its own folder. Got {name!r:.200}.")


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
    for settings in (config, config.get("text_config")):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            layers = settings.get(name) if isinstance(settings, dict) else None
            if isinstance(layers, int) and layers > _MOST_LAYERS_WITHOUT_WEIGHTS:
                weights = sum(len(_shapes(file)) for file in folder.glob("*.safetensors"))
                if layers > weights:
                    raise RequestError(
                        f"{folder / 'config.json'} asks for {layers} layers ({name}), and the folder holds {weights} "
                        "weights."
                    )


def _check_rank(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse an adapter of a higher rank than its weights have: PEFT allocates it before it compares the two."""
    patterns = settings.get("rank_pattern")
    ranks = [settings.get("r"), settings.get("num_virtual_tokens")]
    ranks += patterns.values() if isinstance(patterns, dict) else []
    shapes = _shapes(folder / _ADAPTER_WEIGHTS)
    largest = max((size for shape in shapes for size in shape), default=0)
    for rank in ranks:
        if shapes and isinstance(rank, int) and rank > largest:
            raise RequestError(
                f"{folder / _ADAPTER_CONFIG} asks for a rank or length of {rank}, and no weight beside it is larger "
                f"than {largest}."
            )


def _shapes(file: Path) -> list[list[int]]:
    """Of the tensors in a safetensors file, by its header; none if it is no such file."""
    try:
        with safe_open(file, "pt") as tensors:
            return [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except SafetensorError:
        return []
