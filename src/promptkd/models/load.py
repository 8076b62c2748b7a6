"""Models and tokenizers from a hub name, a folder, a run of promptkd, or a GGUF file; adapters are merged."""

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from promptkd.errors import RequestError
from promptkd.models.end_tokens import GENERATION_CONFIG, load_generation_config
from promptkd.models.folder import clear_load_errors
from promptkd.models.gguf_format import cache_folder
from promptkd.models.merge import merge_adapters, merged_parts, remember_merged, with_adapter
from promptkd.models.source import Adapter, Source, absolute_name, model_source, resolve_model
from promptkd.precision import WeightPrecision
from promptkd.results import ModelPart, ModelRecord, file_sha256

_FROM_FILES = ("quantization_config", "device_map", "max_memory")  # what transformers does only while it reads a model


def load_model(
    name: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode: by hub name, folder, run folder (its student) or GGUF file.

    A LoRA folder, or another adapter of PEFT, is its base with the adapter merged into the weights: see `merged_parts`.
    `dtype` "auto" is that of the model's files; `settings` go to `from_pretrained` of transformers (`revision`,
    `quantization_config`, …). `RequestError` if there is no such model.
    """
    _check_dtype(dtype)
    source = model_source(name, settings.pop("revision", None))
    settings |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if not source.adapters:
        return _whole_model(source, name, settings)
    return _merged_model(source, name, settings)


def load_adapted(
    name: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, **settings: Any
) -> PeftModel:
    """A LoRA folder as PEFT's model, whose adapter can be trained on; adapters that its base came with are merged.

    Arguments as for `load_model`. `RequestError` if `name` is no adapter.
    """
    _check_dtype(dtype)
    source = model_source(name, settings.pop("revision", None))
    if not source.adapters:
        raise RequestError(f"{name} is no LoRA folder: there is no adapter to train on. Leave that out.")
    *merged, last = source.adapters
    settings |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    base = Source(source.base, source.revision, tuple(merged))
    model = _merged_model(base, name, settings) if merged else _whole_model(base, name, settings)
    load_generation_config(model, last.folder)
    return with_adapter(model, last, trainable=True)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, of a LoRA folder without one its base's.

    A missing padding token becomes EOS if there is one; ids never tell padding.
    """
    source = model_source(name, settings.pop("revision", None))
    place, revision = source.tokenizer
    settings |= {"trust_remote_code": trust_remote_code} | _at(revision)
    with clear_load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(place, **settings)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_config_of(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> GenerationConfig:
    """How a model decodes by its own files, without its weights: its generation configuration, or its configuration."""
    source = model_source(name, revision)
    own = [each.folder for each in source.adapters if (each.folder / GENERATION_CONFIG).is_file()]
    with clear_load_errors(name):
        if own:
            return GenerationConfig.from_pretrained(own[-1])
        try:
            return GenerationConfig.from_pretrained(source.base, **_at(source.revision))
        except OSError:  # there is none
            settings = {"trust_remote_code": trust_remote_code} | _at(source.revision)
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(source.base, **settings))


def saved_dtype(name: str | Path, *, trust_remote_code: bool = False) -> str:
    """The dtype of a model's weights by its configuration; float32 where adapters are merged into them."""
    source = model_source(name)
    if source.adapters:
        return "float32"
    with clear_load_errors(name):
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=trust_remote_code, **_at(source.revision))
    return _dtype_of(config)


def _dtype_of(config: Any) -> str:
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _whole_model(source: Source, name: str | Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The base of a source, as transformers reads it."""
    settings = {**settings, "use_safetensors": True, **_at(source.revision)}
    with clear_load_errors(name):
        model, report = AutoModelForCausalLM.from_pretrained(source.base, output_loading_info=True, **settings)
    if missing := report["missing_keys"]:
        count, first = len(missing), min(missing)
        raise RequestError(f"{name} lacks {count} weights that its configuration asks for, {first} among them.")
    keep_differentiable(model)
    return model.eval()


def _merged_model(source: Source, name: str | Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The base with its adapters merged in float32, or in the precision of its files if that is what is asked for.

    What transformers does only while it reads files (rounding included) is done to the merged model, which is written
    into the cache for that moment.
    """
    plain = {key: value for key, value in settings.items() if key not in _FROM_FILES}
    with clear_load_errors(name):
        trusted = {"trust_remote_code": settings["trust_remote_code"]} | _at(source.revision)
        config = AutoConfig.from_pretrained(source.base, **trusted)
    own = _dtype_of(config)
    wanted = own if settings["dtype"] == "auto" else settings["dtype"]
    is_quantized = "quantization_config" in vars(config)
    plain["dtype"] = wanted if wanted == own and not is_quantized else "float32"
    model = merge_adapters(_whole_model(source, name, plain), source, source.adapters)
    for adapter in source.adapters:
        load_generation_config(model, adapter.folder)
    if plain["dtype"] == wanted and not any(settings.get(key) for key in _FROM_FILES):
        return model
    merged = merged_parts(model)
    assert merged is not None
    cache_folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_folder(), prefix="merged-") as place, clear_load_errors(name):
        model.save_pretrained(place)
        del model
        model = _whole_model(Source(place), name, {**settings, "dtype": wanted})
    model.name_or_path = model.config.name_or_path = source.base  # where vLLM looks for the model's shape
    remember_merged(model, merged)
    return model


def _at(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _check_dtype(dtype: str) -> None:
    if dtype not in get_args(WeightPrecision):
        raise RequestError(f"Expected a dtype of {', '.join(get_args(WeightPrecision))}. Got {dtype!r}.")


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in a form that gradients can pass; `RequestError` if it is too late."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            if state is not None and vars(state).get("packing_format_for_cpu"):
                problem = "has run without a gradient before, and bitsandbytes has reordered its weights for inference"
                raise RequestError(f"The 4-bit model {problem}. Load it again.")
            # On CPUs with bfloat16 units, bitsandbytes 0.50 would reorder the weights for inference in the first pass
            # without a gradient. After that no gradient passes the layer, of which it only warns.
            layer.support_avx512bf16_for_cpu = False


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of distinct parameters; tied weights count once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trainable)


def model_record(name: str | Path, model: nn.Module, *, about: str = "", revision: str | None = None) -> ModelRecord:
    """Provenance of a model: path, size, hash over configuration and weights ("" for a hub name), bytes on disk.

    Of a merged model also its base and adapters, each with its hash.
    """
    place = resolve_model(name)
    if Path(place).is_dir():
        source = model_source(place)
    else:  # what the hub holds by now may be another
        merged = merged_parts(model)
        source = Source(place) if merged is None else merged.source
    sha256, base, adapters = _hashes(source)
    return ModelRecord(
        path=str(name),
        parameters=count_parameters(model),
        sha256=sha256,
        bytes_on_disk=bytes_on_disk(name, revision),
        about=about,
        base=base,
        adapters=adapters,
    )


def folder_sha256(folder: Path) -> str:
    """The hash that `model_record` gives the model in a folder, its base included where it is an adapter."""
    return _hashes(model_source(folder))[0]


def _hashes(source: Source) -> tuple[str, ModelPart | None, list[ModelPart]]:
    """Of a whole model, and of its base and adapters if it is merged from those."""
    sha256 = _sha256(Path(source.base))
    if not source.adapters:
        return sha256, None, []
    base = ModelPart(path=absolute_name(source.base), sha256=sha256)
    adapters = [ModelPart(path=each.name, sha256=_adapter_sha256(each)) for each in source.adapters]
    return hashlib.sha256("".join(each.sha256 for each in (base, *adapters)).encode()).hexdigest(), base, adapters


def bytes_on_disk(name: str | Path, revision: str | None = None) -> int | None:
    """Of a model's weight files, an adapter's base included; None for a hub name that this machine holds no copy of."""
    if (file := Path(name).expanduser()).is_file():
        return file.stat().st_size
    source = model_source(name, revision)
    folder = Path(source.base)
    if not folder.is_dir():
        weights, revision = "*.safetensors", source.revision
        try:
            held = snapshot_download(source.base, revision=revision, local_files_only=True, allow_patterns=weights)
            folder = Path(held)
        except LocalEntryNotFoundError:
            return None
    folders = (folder, *(each.folder for each in source.adapters))
    return sum(each.stat().st_size for place in folders for each in _weight_files(place))


def _weight_files(folder: Path) -> list[Path]:
    """Those of the model itself: a checkpoint has the state of training beside them, each part with a JSON file."""
    return sorted(each for each in folder.glob("*.safetensors") if not each.with_suffix(".json").exists())


def _sha256(folder: Path) -> str:
    files = sorted([*folder.glob("config.json"), *_weight_files(folder)])
    return file_sha256(*files) if files else ""


def _adapter_sha256(adapter: Adapter) -> str:
    """Over settings and weights; the name of the base is left out, which is another one where both were moved."""
    settings = {key: value for key, value in adapter.config.items() if key != "base_model_name_or_path"}
    weights = file_sha256(*_weight_files(adapter.folder))
    return hashlib.sha256((json.dumps(settings, sort_keys=True) + weights).encode()).hexdigest()
