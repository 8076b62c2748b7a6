"""Models and tokenizers from a hub name, a folder, a run of promptkd, or a GGUF file.

A GGUF file is converted once into safetensors under the cache folder ($PROMPTKD_CACHE, else promptkd below
$XDG_CACHE_HOME or ~/.cache): reading GGUF takes many times as long as reading safetensors.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.atomic import atomic
from promptkd.io.files import not_regular
from promptkd.io.lock import locked
from promptkd.models.folder import adapter_base, check_model_folder
from promptkd.models.gguf_check import check_gguf
from promptkd.models.gguf_vocabulary import PRE_TOKENIZERS
from promptkd.models.quantized import keep_backward
from promptkd.results import ModelRecord, file_sha256

__all__ = [
    "GGUF_CONVERSION",
    "cache_folder",
    "clear_load_errors",
    "convert_gguf",
    "count_parameters",
    "load_model",
    "load_tokenizer",
    "model_record",
    "resolve_model",
]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
_RUN_MODELS = ("student", "model")  # what `distill` and `sft` leave in a run's folder


def load_model(
    name: str | Path,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        name: hub name, folder, run folder (its student) or GGUF file.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the model's files.
        settings: further arguments of transformers' `from_pretrained`, a `quantization_config` for instance.

    Raises:
        RequestError: if there is no such model or it is no causal language model.
    """
    if dtype not in _DTYPES:
        raise RequestError(f"Expected a dtype of {', '.join(_DTYPES)}. Got {dtype!r}.")
    source = resolve_model(name)
    with clear_load_errors(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=_DTYPES[dtype],
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    if report["missing_keys"]:
        raise RequestError(
            f"{name} lacks {len(report['missing_keys'])} weights that its configuration asks for, "
            f"{min(report['missing_keys'])} among them."
        )
    keep_backward(model)
    return model.eval()


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. A missing padding token becomes EOS where there is one; ids never tell padding."""
    source = resolve_model(name)
    with clear_load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_model(name: str | Path) -> str:
    """Where transformers finds the model: a folder (converted from GGUF if need be) or a hub name.

    Raises:
        RequestError: for a path that does not exist, a folder that holds no model, a name that is neither.
    """
    text, path = str(name), Path(name).expanduser()
    try:
        path.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise RequestError(f"No such model: {text:.200}: {error.strerror}.") from error
    if path.is_dir():
        return str(_model_folder(path))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return str(_converted(path))
        raise RequestError(f"Expected a model folder, a GGUF file or a hub name. Got the file {path}.")
    if kind := not_regular(path):
        raise RequestError(f"Expected a model folder, a GGUF file or a hub name. {path} is {kind}.")
    if text.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(text):
        raise RequestError(
            f"No such model: {text} does not exist. Give a folder, a GGUF file or a hub name (owner/name)."
        )
    return text


def _model_folder(folder: Path) -> Path:
    for inside in ("", *_RUN_MODELS):
        candidate = folder / inside
        if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
            check_model_folder(candidate)
            if base := adapter_base(candidate):
                _check_base(base, candidate)
            return candidate
    found = sorted(entry.name for entry in folder.iterdir())
    raise RequestError(
        f"{folder} is no model: expected config.json (or adapter_config.json) in it, or a run's student/ folder. "
        f"It holds {', '.join(found[:8]) if found else 'nothing'}."
    )


def _check_base(base: str, adapter: Path) -> None:
    """Refuse an adapter whose base is no model; PEFT and transformers find the base as this does."""
    path = Path(base).expanduser()
    if (path / "adapter_config.json").is_file():
        raise RequestError(f"The adapter in {adapter} belongs to {base}, which is an adapter itself. Merge that first.")
    try:
        resolve_model(base)
    except RequestError as error:
        raise RequestError(f"The adapter in {adapter} belongs to the model {base}: {error}") from error


@contextmanager
def clear_load_errors(name: str | Path) -> Iterator[None]:
    """Whatever stops a model from being read is a wrong request that says which model and why."""
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


GGUF_CONVERSION = 2
"""Raised whenever a file would be converted otherwise, so that what older versions left in the cache is not taken."""


def cache_folder() -> Path:
    """Where converted models and the demo's stages are kept."""
    if os.environ.get("PROMPTKD_CACHE"):
        return Path(os.environ["PROMPTKD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptkd"


def _converted(file: Path) -> Path:
    target = cache_folder() / "gguf" / f"{file.stem[:100]}-{file_sha256(file)[:16]}-{GGUF_CONVERSION}"
    if not (target / "config.json").is_file():
        _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    with locked(target, waits=True):
        if not (target / "config.json").is_file():  # else another process was quicker: its folder is as good
            with atomic(target) as partial:
                convert_gguf(file, partial)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32, and its tokenizer, into `folder`.

    Raises:
        RequestError: if transformers cannot read the file.
    """
    check_gguf(file)
    with clear_load_errors(file):
        where = str(file.parent)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name)
    # The weights are plain float32 by now; the leftover setting would make transformers refuse to save them.
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _mend_tokenizer(folder / "tokenizer.json", model.config.vocab_size, _pre_tokenizer_name(file))


def _mend_tokenizer(file: Path, size: int, pre_tokenizer: str | None) -> None:
    """Undo what transformers does to byte-level tokenizers.

    It adds GPT-2's <|endoftext|> to those that lack it, behind the last column, and splits SmolLM's text as GPT-2's:
    of "\\n\\n1" that made three tokens where SmolLM was trained on two.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    state["added_tokens"] = [each for each in state["added_tokens"] if each["id"] < size]
    if pre_tokenizer in PRE_TOKENIZERS:
        state["pre_tokenizer"] = PRE_TOKENIZERS[pre_tokenizer]
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _pre_tokenizer_name(file: Path) -> str | None:
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of distinct parameters; tied weights count once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trainable)


def model_record(name: str | Path, model: nn.Module) -> ModelRecord:
    """Provenance of a model: its path, size, and hash over configuration and weights ("" for a hub name)."""
    folder = Path(resolve_model(name))
    files: list[Path] = []
    if folder.is_dir():
        files = sorted(each for each in folder.iterdir() if each.name == "config.json" or each.suffix == ".safetensors")
    return ModelRecord(path=str(name), parameters=count_parameters(model), sha256=file_sha256(*files) if files else "")
