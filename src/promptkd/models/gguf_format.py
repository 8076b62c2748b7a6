"""GGUF files: converted once into safetensors, which load many times faster; written as llama.cpp's converter does."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import TokenType
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.errors import RequestError
from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models.end_tokens import keep_end_tokens, known_end_tokens
from promptkd.models.folder import clear_load_errors, save_tokenizer
from promptkd.models.gguf_vocabulary import PRE_TOKENIZERS, add_tokenizer, drop_tokens, pre_tokenizer_name
from promptkd.results import file_sha256

GGUF_CONVERSION = 3  # raised whenever a file would be converted differently, so that older conversions are not used
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")  # GGUF's names, too
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def cache_folder() -> Path:
    """Of converted models and the demo's stages: $PROMPTKD_CACHE, else promptkd in $XDG_CACHE_HOME or ~/.cache."""
    if cache := os.environ.get("PROMPTKD_CACHE"):
        return Path(cache).expanduser()
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
    reader = open_gguf(file)
    field = reader.get_field("tokenizer.ggml.pre")
    ends = [reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    kinds = reader.get_field("tokenizer.ggml.token_type")
    with clear_load_errors(file):
        where = str(file.parent)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name)
    # The weights are plain float32 by now; the leftover setting would make transformers refuse to save them.
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    keep_end_tokens(model, [int(end.contents()) for end in ends if end is not None])  # transformers reads the first
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    # transformers adds GPT-2's <|endoftext|> to byte-level tokenizers that lack it, behind the last column, and splits
    # SmolLM's text as GPT-2's: "\n\n1" became three tokens where SmolLM was trained on two.
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < model.config.vocab_size]
    if kinds is not None:  # rows of the embedding that stand for no token, as a padded one has, are not to be named
        unused = {index for index, kind in enumerate(kinds.contents()) if kind == TokenType.UNUSED}
        drop_tokens(state, unused)
    if field is not None:
        state["pre_tokenizer"] = PRE_TOKENIZERS.get(str(field.contents()), state["pre_tokenizer"])
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


def gguf_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What prevents `write_gguf` from writing the model."""
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        return [f"{config.model_type} is none of the architectures {', '.join(_ARCHITECTURES)}"]
    if config.model_type == "gpt2":
        mlp, positions = config.n_inner, config.n_positions
        scaled = not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx
        checks = [
            (config.activation_function != "gelu_new", f"its activation is {config.activation_function}"),
            (scaled, "its attention is scaled otherwise"),
            (mlp not in (None, 4 * config.n_embd), f"its MLP is {mlp} wide, not 4 x {config.n_embd}"),
            (positions != 1024, f"it has {positions} positions, and transformers reads GPT-2's GGUF files with 1024"),
        ]
    else:
        settings = config.to_dict()
        checks = [
            (config.rope_parameters["rope_type"] != "default", "its rotary positions are scaled"),
            (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
            (settings.get("attention_bias") or settings.get("mlp_bias"), "its attention or MLP has biases"),
            (settings.get("use_sliding_window"), "its attention has a sliding window"),
        ]
    no_end = "neither it nor its tokenizer knows an end token, and llama.cpp would end answers at token 11"
    checks += [(not known_end_tokens(model, tokenizer), no_end)]
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    if state is None:
        kind = type(tokenizer).__name__
        checks += [(True, f"the tokenizer is a {kind}, and only those of the tokenizers library are known")]
    elif state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        checks += [(True, "the tokenizer is no byte-level BPE")]
    else:
        known, normalizer = ", ".join(PRE_TOKENIZERS), state["normalizer"] or {"type": "NFC"}
        checks += [
            (pre_tokenizer_name(state) is None, f"the tokenizer splits text in none of the known ways ({known})"),
            (
                not state["model"]["merges"],
                "the tokenizer has no merges, and what reads GGUF's byte-level BPE needs them",
            ),
            # llama.cpp leaves NFC out for Qwen, too
            (normalizer != {"type": "NFC"}, f"the tokenizer normalizes text ({normalizer['type']})"),
        ]
    return [problem for wrong, problem in checks if wrong]


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, title: str
) -> None:
    """Write a model without `gguf_problems`. `RequestError` if the embedding has no row for some token."""
    config, is_gpt2 = model.config, model.config.model_type == "gpt2"
    writer = gguf.GGUFWriter(file, config.model_type)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == torch.float32 else f"MOSTLY_{_TYPES[dtype]}"])
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(4 * config.hidden_size if is_gpt2 else config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        if is_gpt2:
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        else:
            head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_key_length(head_size)
            writer.add_value_length(head_size)
            writer.add_rope_dimension_count(head_size)
            writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        size = model.get_input_embeddings().weight.shape[0]
        writer.add_vocab_size(size)
        add_tokenizer(writer, model, tokenizer, size)
        for name, weight in _tensors(model, dtype):
            bits = weight.view(torch.uint8).numpy()  # NumPy knows no bfloat16
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType[_TYPES[weight.dtype]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def stored_type(name: str, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 for vectors and GPT-2's position table, as llama.cpp adds and multiplies them."""
    return torch.float32 if weight.ndim < 2 or name.endswith("wpe.weight") else dtype


def _tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.to_dict().get("num_key_value_heads")}
    for source, weight in model.state_dict().items():
        base, _, kind = source.rpartition(".")
        if tied and base == "lm_head":
            continue
        target = names.get_name(base)
        assert target is not None, f"{source} has no name in a GGUF file"
        part = base.rpartition(".")[2]
        if config.model_type == "llama" and part in heads:
            weight = _interleaved(weight, heads[part])
        elif config.model_type == "gpt2" and kind == "weight" and part in ("c_attn", "c_proj", "c_fc"):
            weight = weight.T  # transformers keeps these as (in, out)
        yield f"{target}.{kind}", weight.detach().cpu().to(stored_type(source, weight, dtype)).contiguous()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered: transformers rotates dimension i with i + d/2, llama.cpp neighbors."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
