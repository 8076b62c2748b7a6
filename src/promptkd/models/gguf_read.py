"""Reads GGUF files: checked, then converted once into safetensors in the cache, which load many times faster.

The cache is $PROMPTKD_CACHE, else promptkd in $XDG_CACHE_HOME or ~/.cache.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from promptkd.errors import RequestError
from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models.folder import clear_load_errors
from promptkd.results import file_sha256

GGUF_CONVERSION = 2
"""Raised whenever a file would be converted differently, so that what older versions left in the cache is not used."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]},
    "qwen2": _split(QWEN2_SPLIT),
    "llama-bpe": _split(QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
}
"""By llama.cpp's name: how a text is split before merging, as the `tokenizers` library writes it."""


def cache_folder() -> Path:
    """Where converted models and the demo's stages are kept."""
    if os.environ.get("PROMPTKD_CACHE"):
        return Path(os.environ["PROMPTKD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptkd"


def converted_gguf(file: Path) -> Path:
    """The folder of a GGUF file's model in the cache, converted if it is not there yet."""
    target = cache_folder() / "gguf" / f"{file.stem[:100]}-{file_sha256(file)[:16]}-{GGUF_CONVERSION}"
    if not (target / "config.json").is_file():
        with locked(target, waits=True):
            if not (target / "config.json").is_file():  # else another process was faster: its folder is as good
                with atomic(target) as partial:
                    convert_gguf(file, partial)
    return target


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32, and its tokenizer, into `folder`. `RequestError` if it is unreadable."""
    field = open_gguf(file).get_field("tokenizer.ggml.pre")
    pre_tokenizer = "" if field is None else str(field.contents())
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
    # transformers adds GPT-2's <|endoftext|> to byte-level tokenizers that lack it, behind the last column, and splits
    # SmolLM's text as GPT-2's: "\n\n1" became three tokens where SmolLM was trained on two.
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < model.config.vocab_size]
    state["pre_tokenizer"] = PRE_TOKENIZERS.get(pre_tokenizer, state["pre_tokenizer"])
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of a GGUF file. `RequestError` if it is none, is truncated, or states sizes that it does not have."""
    try:
        with path.open("rb") as file:
            magic, version, tensors, fields = struct.unpack("<4sIQQ", file.read(24).ljust(24, b"\0"))
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, and 2 and 3 are known")
        if 24 + 24 * tensors + 13 * fields > (size := path.stat().st_size):
            raise ValueError(f"at byte 24 it states {tensors} tensors and {fields} fields, and it ends at byte {size}")
        return _Reader(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"{path} is not a complete GGUF file: {error}. Download or export it again.") from error


class _Reader(gguf.GGUFReader):
    """Stops at the end of the file, past which the library would count to a stated length of 2^60."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        size = np.dtype(dtype).itemsize * int(count)
        if int(offset) + size > len(self.data):
            raise ValueError(f"at byte {offset} it states {size} bytes, and it ends at byte {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)
