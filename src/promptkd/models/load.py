"""Models and tokenizers from a hub name, a folder, a run of promptkd, or a GGUF file."""

import re
import sys
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from promptkd.errors import RequestError, at
from promptkd.io.files import not_regular
from promptkd.models.end_tokens import GENERATION_CONFIG, load_generation_config
from promptkd.models.folder import adapter_base, check_model_folder, clear_load_errors
from promptkd.models.gguf_format import converted_gguf
from promptkd.precision import WeightPrecision
from promptkd.results import ModelRecord, file_sha256

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_EXPECTED = "Expected a model folder, a GGUF file or a hub name."


def load_model(
    name: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode: by hub name, folder, run folder (its student) or GGUF file.

    `dtype` "auto" is that of the model's files; `settings` go to `from_pretrained` of transformers (`revision`,
    `quantization_config`, …). `RequestError` if there is no such model.
    """
    if dtype not in get_args(WeightPrecision):
        raise RequestError(f"Expected a dtype of {', '.join(get_args(WeightPrecision))}. Got {dtype!r}.")
    source = resolve_model(name)
    settings |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    with clear_load_errors(name):
        model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **settings)
    if missing := report["missing_keys"]:
        count, first = len(missing), min(missing)
        raise RequestError(f"{name} lacks {count} weights that its configuration asks for, {first} among them.")
    if (Path(source) / "adapter_config.json").is_file():
        load_generation_config(model, Path(source))
    keep_differentiable(model)
    return model.eval()


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. A missing padding token becomes EOS if there is one; ids never tell padding."""
    source = resolve_model(name)
    with clear_load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **settings)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generation_config_of(name: str | Path, *, trust_remote_code: bool = False) -> GenerationConfig:
    """How a model decodes by its own files, without its weights: its generation configuration, or its configuration."""
    source = resolve_model(name)
    base = adapter_base(Path(source))
    if base is not None and not (Path(source) / GENERATION_CONFIG).is_file():
        return generation_config_of(base, trust_remote_code=trust_remote_code)
    with clear_load_errors(name):
        try:
            return GenerationConfig.from_pretrained(source)
        except OSError:  # there is none
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            return GenerationConfig.from_model_config(config)


def resolve_model(name: str | Path) -> str:
    """Where transformers finds it: a folder (converted from GGUF if necessary) or a hub name, else `RequestError`."""
    text, path = str(name), Path(name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise RequestError(f"No such model: {text:.200}: {error.strerror}.") from error
    if is_folder:
        return str(_model_folder(path))
    if path.is_file():
        if is_gguf:
            return str(converted_gguf(path))
        raise RequestError(f"{_EXPECTED} Got the file {path}.")
    if kind := not_regular(path):
        raise RequestError(f"{_EXPECTED} {path} is {kind}.")
    if text.startswith((".", "/", "~")) or is_gguf or not _HUB_NAME.fullmatch(text):
        advice = "Give a folder, a GGUF file or a hub name (owner/name)."
        raise RequestError(f"No such model: {text} does not exist. {advice}")
    return text


def _model_folder(folder: Path) -> Path:
    for inside in ("", "student", "model"):  # the latter two are what `distill` and `sft` leave in a run's folder
        candidate = folder / inside
        if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
            check_model_folder(candidate)
            if base := adapter_base(candidate):  # PEFT and transformers look for it in the same way
                belongs = f"The adapter in {candidate} belongs to"
                if (Path(base).expanduser() / "adapter_config.json").is_file():
                    raise RequestError(f"{belongs} {base}, which is an adapter itself. Merge that first.")
                with at(f"{belongs} the model {base}"):
                    resolve_model(base)
            return candidate
    found = sorted(entry.name for entry in folder.iterdir())
    expected = "config.json (or adapter_config.json) in it, or a run's student/ folder"
    raise RequestError(f"{folder} is no model: expected {expected}. It holds {', '.join(found[:8]) or 'nothing'}.")


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


def model_record(name: str | Path, model: nn.Module, *, about: str = "") -> ModelRecord:
    """Provenance of a model: path, size, hash over configuration and weights ("" for a hub name), bytes on disk."""
    folder = Path(resolve_model(name))
    files = sorted(each for each in folder.glob("*") if each.name == "config.json" or each.suffix == ".safetensors")
    return ModelRecord(
        path=str(name),
        parameters=count_parameters(model),
        sha256=file_sha256(*files) if files else "",
        bytes_on_disk=bytes_on_disk(name),
        about=about,
    )


def bytes_on_disk(name: str | Path) -> int | None:
    """Of a model's weight files, an adapter's base included; None for a hub name that this machine holds no copy of."""
    if (file := Path(name).expanduser()).is_file():
        return file.stat().st_size
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), local_files_only=True, allow_patterns="*.safetensors"))
        except LocalEntryNotFoundError:
            return None
    own = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    if (base := adapter_base(folder)) is None:
        return own
    of_base = bytes_on_disk(base)
    return None if of_base is None else own + of_base
