"""Examples become token ids, and plain text becomes pieces of token ids. Nothing is ever cut.

Prompt and response are tokenized separately, so that no token at their boundary depends on the other side. Text from
the data never becomes a control token: "<|im_end|>" in an answer or an instruction is spelled in ordinary tokens.
Control tokens come from the template, the tokenizer's BOS, and prompts that are text already.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from promptkd.data.rows import Example, Instruction, text_field
from promptkd.data.sources import read_objects
from promptkd.data.templates import Template, resolve_template
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Two code points that Unicode reserves for use within a program: they enclose control tokens that the data spells.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class EncodedExample:
    """One row as tokens."""

    prompt_ids: list[int]
    response_ids: list[int]  # the first reference and the end token; [] if the row has no reference
    references: tuple[str, ...]
    prompt: str  # the text of `prompt_ids`, without the BOS that the tokenizer adds
    row: int  # index of the row in its source, from 0


@dataclass(frozen=True)
class EncodedData:
    """The rows within the limits, in their order, and the number of those that were not."""

    examples: list[EncodedExample]
    dropped: int


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template | str = "auto",
    *,
    max_prompt_length: int = 256,
    max_response_length: int = 256,
    overlong: Literal["drop", "error"] = "drop",
    need_response: bool = True,
) -> EncodedData:
    """Render, tokenize and measure every example.

    A row over a limit, in tokens with BOS and end token, is dropped and counted, or an "error". Without
    `need_response`, rows need no reference and responses have no limit. `RequestError` for wrong arguments, no row
    left, or a row without tokens or reference, with its location.
    """
    if not examples:
        raise RequestError("Expected at least one row to encode. Got none.")
    if max_prompt_length < 1 or max_response_length < 1:
        got = f"{max_prompt_length} and {max_response_length}"
        raise RequestError(f"The limits on prompt and response must be at least 1 token. Got {got}.")
    if overlong not in ("drop", "error"):
        raise RequestError(f'Rows over the limit are met with "drop" or "error". Got {overlong!r}.')
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    texts = [template.render(example) for example in examples]
    prompts = prompt_tokens(examples, texts, tokenizer, template)
    responses = _response_tokens(examples, tokenizer, template.end_token_id)
    kept = []
    for example, text, prompt, response in zip(examples, texts, prompts, responses, strict=True):
        problem = excess = ""
        if not prompt:
            problem = "the prompt has no tokens. Expected at least one."
        elif need_response and not example.references:
            problem = "the row has no reference ('output' or 'completion'), and one is needed."
        elif need_response and not response:
            problem = "the reference has no tokens, for it is empty and the tokenizer has no EOS."
        elif len(prompt) > max_prompt_length:
            excess = f"the prompt has {len(prompt)} tokens, and the limit is {max_prompt_length}"
        elif need_response and len(response) > max_response_length:
            excess = f"the response has {len(response)} tokens with its end, and the limit is {max_response_length}"
        if excess and overlong == "error":
            problem = f"{excess}. Raise the limit, shorten the row, or drop such rows."
        if problem:
            raise RequestError(f"{example.location}: {problem}")
        if not excess:
            kept.append(EncodedExample(prompt, response, example.references, text, example.row))
    if not kept:
        and_response = f"; the shortest response has {min(map(len, responses))}, and the limit is {max_response_length}"
        limit = f"{max_prompt_length}{and_response if need_response else ''}"
        prompt_length = f"{min(map(len, prompts))} tokens, template included, and the limit is {limit}"
        none = f"None of the {len(examples)} rows is within the limits."
        raise RequestError(f"{none} The shortest prompt has {prompt_length}. Raise the limits.")
    return EncodedData(kept, len(examples) - len(kept))


def stop_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None" = None,
    template: Template | str | None = None,
) -> tuple[int, ...]:
    """The ids that end a response, in ascending order: the EOS ids of tokenizer and model, the template's end."""
    configured = None if generation_config is None else generation_config.eos_token_id
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    ids += [] if template is None else [template.end_token_id]
    return tuple(sorted({index for index in ids if index is not None}))


def encode_texts(source: str | Path, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> list[list[int]]:
    """Rows of `source` ({"text": ...}), an EOS after each, in pieces of `length` tokens for a language-model loss."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for location, row in read_objects(source):
        if not isinstance(row, dict) or "text" not in row:
            got = f"the keys {', '.join(map(repr, row)):.200}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise RequestError(f'{location}: expected an object with a "text" field. Got {got}.')
        with at(location):
            text = text_field(row["text"], "text")
        stream += _tokenize(tokenizer, [text], spell=True)[0] + end
    starts = range(0, len(stream), length)  # the last piece may be shorter; one token predicts nothing
    pieces = [piece for start in starts if len(piece := stream[start : start + length]) > 1]
    if not pieces:
        raise RequestError(f"{source} holds too little text: at least two tokens are needed.")
    return pieces


def prompt_tokens(
    examples: Sequence[Example], texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[list[int]]:
    """The tokens of every prompt, of which `texts` are the renderings by `template`.

    A chat template writes its own BOS. Every other prompt begins with what the tokenizer puts before a text, unless the
    text itself does. `RequestError` if a request spells a control token and the template takes it apart.
    """
    encoded = _tokenize(tokenizer, texts, spell=False)
    pattern = _control_tokens(tokenizer)
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        if (marked := _marked(example, pattern)) == example:
            continue
        marked_text = template.render(marked)
        if _unmarked(marked_text) != text:
            problem = "the request spells a control token, and the template cuts or measures the text around it"
            advice = "Take the token out of the row, or choose a template that leaves the text as it is."
            raise RequestError(f"{example.location}: {problem}. {advice}")
        encoded[index] = _tokenize_marked(tokenizer, marked_text)
    framed = [index for index, each in enumerate(examples) if isinstance(each.request, str) or template.name != "chat"]
    probe = next((texts[index] for index in framed if encoded[index]), None)
    front = [] if probe is None else _front(tokenizer, probe)
    for index in framed:
        if encoded[index][: len(front)] != front:
            encoded[index] = front + encoded[index]
    return encoded


def _response_tokens(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", end_token_id: int | None
) -> list[list[int]]:
    """The tokens of every first reference and the end token; [] for a row without a reference."""
    texts = [example.references[0] if example.references else "" for example in examples]
    end = [] if end_token_id is None else [end_token_id]
    pattern = _control_tokens(tokenizer)
    encoded = _tokenize(tokenizer, texts, spell=True)
    for example, text, ids in zip(examples, texts, encoded, strict=True):
        # The unknown token is excepted: a text gets it for other reasons than spelling its name.
        control = {tokenizer.convert_tokens_to_ids(token) for token in pattern.findall(text)} - {tokenizer.unk_token_id}
        if found := control.union(end).intersection(ids):
            problem = f"the response spells the control token {tokenizer.convert_ids_to_tokens(min(found))!r}"
            reason = "which this tokenizer cannot write in ordinary tokens. Take it out of the row."
            raise RequestError(f"{example.location}: {problem}, {reason}")
    return [ids + end if example.references else [] for example, ids in zip(examples, encoded, strict=True)]


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, spell: bool) -> list[list[int]]:
    """Tokens of the texts alone. With `spell`, control tokens are text, spelled in ordinary tokens."""
    options = {"split_special_tokens": spell, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]


def _front(tokenizer: "PreTrainedTokenizerBase", probe: str) -> list[int]:
    """What the tokenizer puts before a text. What it appends (EOS) would end the prompt, and is left out."""
    plain = _tokenize(tokenizer, [probe], spell=True)[0]
    framed = tokenizer(probe, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
    for start in range(len(framed)):
        if framed[start : start + len(plain)] == plain:
            return framed[:start]
    problem = f"It splits {probe[:40]!r} into other tokens then. Choose another tokenizer."
    raise RequestError(f"The tokenizer must keep the tokens of a text when it adds its BOS and EOS. {problem}")


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the control tokens of the tokenizer, longer ones before their prefixes."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ranked = sorted(special.union(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ranked)) or "(?!)")


def _marked(example: Example, control_tokens: re.Pattern[str]) -> Example:
    """`example` with marks around every control token that its data spells. Most examples have none."""

    def mark(value: Any) -> Any:
        if isinstance(value, str) and control_tokens.search(value):
            return control_tokens.sub(f"{_OPEN}\\g<0>{_CLOSE}", _unmarked(value))
        if isinstance(value, Instruction):
            return Instruction(mark(value.instruction), mark(value.input))
        if isinstance(value, dict):
            return {key: part if key == "role" else mark(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(mark(part) for part in value)
        return value

    return example if isinstance(example.request, str) else replace(example, request=mark(example.request))


def _unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _tokenize_marked(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokenize piece by piece: text between marks is data, the rest is the template's."""
    ids: list[int] = []
    for index, piece in enumerate(map(_unmarked, re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", text))):
        # SentencePiece puts a space before a text, but not after a line break.
        lead, led, plain = _tokenize(tokenizer, ["\n", "\n" + piece, piece], spell=index % 2 == 1)
        ids += led[len(lead) :] if index > 0 and led[: len(lead)] == lead else plain
    return ids
