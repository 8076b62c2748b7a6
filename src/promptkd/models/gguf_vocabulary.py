"""The tokenizer in a GGUF file: its tokens, how a text is split before merging, and what ends an answer."""

import json
import logging
from collections.abc import Callable
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError
from promptkd.models.end_tokens import known_end_tokens

_LOGGER = logging.getLogger(__name__)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


# By llama.cpp's name: how a text is split before merging, as the `tokenizers` library writes it.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]},
    "qwen2": _split(QWEN2_SPLIT),
    "llama-bpe": _split(QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
}


def drop_tokens(state: dict[str, Any], unused: set[int]) -> None:
    """Take tokens out of a serialized tokenizer; the others keep their ids."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):  # the ids of a unigram model are places in a list
        state["model"]["vocab"] = {token: index for token, index in vocabulary.items() if index not in unused}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in unused]


def add_tokenizer(
    writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int
) -> None:
    """Tokens, merges, roles and chat template, for an embedding of `size` rows."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if (last := max(by_id)) >= size:
        needed = f"a row for each of the tokenizer's ids, up to {last}"
        raise RequestError(f"The model's embedding must have {needed}. It has {size}.")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(state))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    added = tokenizer.added_tokens_decoder
    control = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    types = dict.fromkeys(by_id, TokenType.NORMAL) | dict.fromkeys(added, TokenType.USER_DEFINED)
    types |= dict.fromkeys(control, TokenType.CONTROL)
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(size)])
    merges = state["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    roles = {
        writer.add_bos_token_id: bos,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        **_ends(writer, model, tokenizer),
    }
    for add, index in roles.items():
        if index is not None:
            add(index)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and framed[0] == bos)
    writer.add_add_eos_token(eos is not None and framed[-1] == eos)
    writer.add_add_space_prefix(False)
    if held := tokenizer.chat_template:  # several have names
        named = [{"name": name, "template": text} for name, text in held.items()] if isinstance(held, dict) else held
        writer.add_chat_template(named)


def _ends(
    writer: gguf.GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[Callable[[int], None], int | None]:
    """The end tokens in the three places that GGUF has for them: end of sequence, of a turn, of a message.

    llama.cpp ends an answer at each. The second also says how a conversation goes on, so the chat template's is there.
    """
    eos, turn = tokenizer.eos_token_id, resolve_template("auto", tokenizer).end_token_id
    rest = [index for index in known_end_tokens(model, tokenizer) if index not in (eos, turn)]
    if eos is None:
        eos = turn if turn is not None else rest.pop(0)
    message = rest.pop(0) if rest else None
    if turn == eos:
        turn = rest.pop(0) if rest else None
    if rest:
        left = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(rest)))
        _LOGGER.warning("A GGUF file names three end tokens. These are left out: %s.", left)
    return {writer.add_eos_token_id: eos, writer.add_eot_token_id: turn, writer.add_eom_token_id: message}


def pre_tokenizer_name(state: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way a tokenizer splits text before merging; None for an unknown one."""

    def comparable(part: Any) -> Any:  # without the setting that only affects the offsets of tokens
        return json.loads(json.dumps(part), object_hook=lambda each: {**each, "trim_offsets": None})

    found = comparable(state["pre_tokenizer"])
    return next((name for name, known in PRE_TOKENIZERS.items() if comparable(known) == found), None)
