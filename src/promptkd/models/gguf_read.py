"""Reads GGUF files: checked, then converted once into safetensors in the cache, which load many times faster.

The cache is $PROMPTKD_CACHE, else promptkd in $XDG_CACHE_HOME or ~/.cache.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from promptkd.errors import RequestError
from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models.folder import clear_load_errors
from promptkd.results import file_sha256

GGUF_CONVERSION = 2
"""Raised whenever a file would be converted differently, so that what older versions left in the cache is not used."""


def cache_folder() -> Path:
    """Where converted models and the demo's stages are kept."""
    if os.environ.get("PROMPTKD_CACHE"):
        return Path(os.environ["PROMPTKD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptkd"


def converted_gguf(file: Path) -> Path:
    """The folder of a GGUF file's model in the cache, converted if it is not there yet."""
    target = cache_folder() / "gguf" / f"{file.stem[:100]}-{file_sha256(file)[:16]}-{GGUF_CONVERSION}"
    if not (target / "config.json").is_file():
        _convert_into_cache(file, target)
    return target


def _convert_into_cache(file: Path, target: Path) -> None:
    with locked(target, waits=True):
        if not (target / "config.json").is_file():  # else another process was faster: its folder is as good
            with atomic(target) as partial:
                convert_gguf(file, partial)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32, and its tokenizer, into `folder`. `RequestError` if it is unreadable."""
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
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    _repair_tokenizer(
        folder / "tokenizer.json", model.config.vocab_size, None if field is None else str(field.contents())
    )


def _repair_tokenizer(file: Path, size: int, pre_tokenizer: str | None) -> None:
    """Undo what transformers does to byte-level tokenizers.

    It adds GPT-2's <|endoftext|> to those that lack it, behind the last column, and splits SmolLM's text as GPT-2's:
    "\\n\\n1" became three tokens where SmolLM was trained on two.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    if pre_tokenizer in PRE_TOKENIZERS:
        state["pre_tokenizer"] = PRE_TOKENIZERS[pre_tokenizer]
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


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

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number; 8 is a text, 9 an array."""
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS, _MOST_NAME_BYTES = 8, 65_535


class _TornError(Exception):
    """The file is not a complete GGUF file, and why."""


def check_gguf(path: Path) -> None:
    """Check that every size that a GGUF file states fits into the file.

    The `gguf` library trusts them, and would count to 2^60 past the end of a truncated file.

    Raises:
        RequestError: if `path` is not a GGUF file, is truncated, or states sizes that it does not have.
    """
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).check()
    except _TornError as error:
        raise RequestError(f"{path} is not a complete GGUF file: {error}. Download or export it again.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error


class _Walk:
    """One pass over a file, from its header to the ends of its tensors."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise _TornError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _TornError(f"it is of version {version}, and 2 and 3 are known")
        tensors, fields = self._number("<Q"), self._number("<Q")
        self._need(24 * tensors + 13 * fields, f"{tensors} tensors and {fields} fields")
        alignment = 32
        for _ in range(fields):
            key = self._name()
            kind = self._number("<I")
            if key == b"general.alignment" and kind == 4:
                alignment = self._number("<I")
            else:
                self._skip_value(kind, nested=False)
        if alignment < 8 or alignment & (alignment - 1):
            raise _TornError(f"its alignment is {alignment}")
        ends = [self._tensor_end() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        end = start + max(ends, default=0)
        if end > self.size:
            raise _TornError(f"its tensors end at byte {end}, and it has {self.size}")

    def _tensor_end(self) -> int:
        self._name()
        dimensions = self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _TornError(f"a tensor has {dimensions} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= self._number("<Q")
        kind, offset = self._number("<I"), self._number("<Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _TornError(f"a tensor is of type {kind}, which is unknown") from None
        return offset + -(-count // block) * size

    def _skip_value(self, kind: int, *, nested: bool) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY and not nested:
            item, length = self._number("<I"), self._number("<Q")
            self._need(length * _SIZES.get(item, 8), f"an array of {length}")
            if item in _SIZES:
                self._skip(length * _SIZES[item])
            else:
                for _ in range(length):
                    self._skip_value(item, nested=True)
        else:
            raise _TornError(f"a field is of type {kind}, which is unknown")

    def _name(self) -> bytes:
        length = self._number("<Q")
        if length > _MOST_NAME_BYTES:
            raise _TornError(f"a name has {length} bytes")
        return self._take(length)

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        self._need(count, f"{count} bytes")
        return self.file.read(count)

    def _skip(self, count: int) -> None:
        self._need(count, f"{count} bytes")
        self.file.seek(count, 1)

    def _need(self, count: int, what: str) -> None:
        at = self.file.tell()
        if at + count > self.size:
            raise _TornError(f"at byte {at} it states {what}, and it ends at byte {self.size}")
