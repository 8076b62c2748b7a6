"""Writes a transformers model as a GGUF file, in the conventions of llama.cpp's converter."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import TokenType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError
from promptkd.models.gguf_read import PRE_TOKENIZERS

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")  # GGUF's names, too
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What prevents `write_gguf` from writing the model; [] if nothing does."""
    config = model.config
    if config.model_type not in _ARCHITECTURES:
        return [f"{config.model_type} is none of the architectures {', '.join(_ARCHITECTURES)}"]
    settings = config.to_dict()
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
        checks = [
            (config.rope_parameters["rope_type"] != "default", "its rotary positions are scaled"),
            (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
            (settings.get("attention_bias") or settings.get("mlp_bias"), "its attention or MLP has biases"),
            (settings.get("use_sliding_window"), "its attention has a sliding window"),
        ]
    return [problem for wrong, problem in [*checks, *_tokenizer_checks(tokenizer)] if wrong]


def _tokenizer_checks(tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        return [(True, f"the tokenizer is a {kind}, and only those of the tokenizers library are known")]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        return [(True, "the tokenizer is no byte-level BPE")]
    known, normalizer = ", ".join(PRE_TOKENIZERS), state["normalizer"] or {"type": "NFC"}
    return [
        (_pre_tokenizer(state) is None, f"the tokenizer splits text in none of the known ways ({known})"),
        # llama.cpp leaves NFC out for Qwen, too
        (normalizer != {"type": "NFC"}, f"the tokenizer normalizes text ({normalizer['type']})"),
    ]


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, title: str
) -> None:
    """Write a model in which `gguf_problems` finds none, with weights as `stored_type` says.

    `RequestError` if the tokenizer has an id that the embedding has no row for.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == torch.float32 else f"MOSTLY_{_TYPES[dtype]}"])
        _add_sizes(writer, config)
        size = model.get_input_embeddings().weight.shape[0]
        writer.add_vocab_size(size)
        _add_tokenizer(writer, tokenizer, size)
        for name, weight in _tensors(model, dtype):
            bits = weight.view(torch.uint8).numpy()  # NumPy knows no bfloat16
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType[_TYPES[weight.dtype]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    is_gpt2 = config.model_type == "gpt2"
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size if is_gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if is_gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def stored_type(name: str, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 for vectors and GPT-2's position table, as llama.cpp adds and multiplies them."""
    return torch.float32 if weight.ndim < 2 or name.endswith("wpe.weight") else dtype


def _tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and values as in the file."""
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


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens, merges, roles and chat template, for an embedding of `size` rows."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise RequestError(
            f"The model's embedding must have a row for each of the tokenizer's ids, up to {max(by_id)}. It has {size}."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(state))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    added = tokenizer.added_tokens_decoder
    control = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    types = dict.fromkeys(by_id, TokenType.NORMAL) | dict.fromkeys(added, TokenType.USER_DEFINED)
    types |= dict.fromkeys(control, TokenType.CONTROL)
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(size)])
    merges = state["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = resolve_template("auto", tokenizer).end_token_id
    roles = {
        writer.add_bos_token_id: bos,
        writer.add_eos_token_id: eos,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: None if end == eos else end,  # a chat template may end an answer with another token
    }
    for add, index in roles.items():
        if index is not None:
            add(index)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and framed[0] == bos)
    writer.add_add_eos_token(eos is not None and framed[-1] == eos)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(state: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way a tokenizer splits text before merging; None for an unknown one."""
    found = _comparable(state["pre_tokenizer"])
    return next((name for name, known in PRE_TOKENIZERS.items() if _comparable(known) == found), None)


def _comparable(part: Any) -> Any:
    """Without the settings that only affect the offsets of tokens."""
    return json.loads(json.dumps(part), object_hook=lambda each: {**each, "trim_offsets": None})
