"""A byte-level BPE tokenizer as the metadata of a GGUF file, and how such a file says where text is split."""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError

__all__ = ["PRE_TOKENIZERS", "add_vocabulary", "why_not_vocabulary"]

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
"""By llama.cpp's name of it: how a text is split before merging, as `tokenizers` writes it down."""


def why_not_vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What keeps the tokenizer out of a GGUF file; [] if nothing does."""
    if not tokenizer.is_fast:
        return [f"the tokenizer is a {type(tokenizer).__name__}, and only those of the tokenizers library are known"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("byte_fallback"):
        return ["the tokenizer is no byte-level BPE"]
    problems = []
    if _pre_tokenizer(state) is None:
        problems.append(f"the tokenizer splits text in none of the known ways ({', '.join(PRE_TOKENIZERS)})")
    if state["normalizer"] not in (None, {"type": "NFC"}):  # llama.cpp leaves NFC out for Qwen, too
        problems.append(f"the tokenizer normalises text ({state['normalizer']['type']})")
    return problems


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens, merges, roles and chat template.

    Args:
        size: rows of the embedding; ids below it that no token has are marked as unused.

    Raises:
        RequestError: if the tokenizer has an id that the embedding has no row for.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = _pre_tokenizer(state)
    assert pre_tokenizer is not None, "why_not_vocabulary is asked first"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    tokens, types = _tokens(tokenizer, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = state["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    _add_roles(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[gguf.TokenType]]:
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise RequestError(
            f"The model's embedding must have a row for each of the tokenizer's ids, up to {max(by_id)}. It has {size}."
        )
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    types = []
    for index in range(size):
        if index not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif index in special:
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL)
    return [by_id.get(index, f"[PAD{index}]") for index in range(size)], types


def _add_roles(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    roles = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    end = resolve_template("auto", tokenizer).end_token_id
    if end != tokenizer.eos_token_id:  # the chat template ends an answer by a token of its own
        roles[writer.add_eot_token_id] = end
    for add, index in roles.items():
        if index is not None:
            add(index)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and framed[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)


def _pre_tokenizer(state: dict[str, Any]) -> str | None:
    found = _comparable(state["pre_tokenizer"])
    return next((name for name, known in PRE_TOKENIZERS.items() if _comparable(known) == found), None)


def _comparable(part: Any) -> Any:
    """Without what decides only where a token's offsets lie."""
    if isinstance(part, dict):
        return {key: _comparable(value) for key, value in part.items() if key != "trim_offsets"}
    return [_comparable(each) for each in part] if isinstance(part, list) else part
