"""Examples become token ids, and plain text becomes pieces of token ids.

Prompt and response are tokenized separately (`tokens.py`) and joined as tokens, so that no token at their boundary
depends on the other side. A row whose prompt has more than `max_prompt_length` tokens, or whose response with its end
token has more than `max_response_length`, is dropped and counted, or refused. Nothing is ever cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from promptkd.data.rows import Example, text_field
from promptkd.data.sources import read_objects
from promptkd.data.templates import Template, resolve_template
from promptkd.data.tokens import prompt_tokens, response_tokens
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


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

    Args:
        template: a template, or the name of one, see `resolve_template`.
        max_prompt_length: tokens of a prompt, BOS included.
        max_response_length: tokens of a response, end token included; ignored without `need_response`.
        overlong: what happens to a row over a limit: "drop" and count it, or "error".
        need_response: whether every row must have a reference.

    Raises:
        RequestError: for limits below 1, a row that the template cannot render, a prompt or response of no tokens, a
            missing reference, a row over a limit with overlong="error", or if no row is left.
    """
    if not examples:
        raise RequestError("Expected at least one row to encode. Got none.")
    if max_prompt_length < 1 or max_response_length < 1:
        raise RequestError(
            "The limits on prompt and response must be at least 1 token. "
            f"Got {max_prompt_length} and {max_response_length}."
        )
    if overlong not in ("drop", "error"):
        raise RequestError(f'Rows over the limit are met with "drop" or "error". Got {overlong!r}.')
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    prompts = [template.render(example) for example in examples]
    prompt_ids = prompt_tokens(examples, prompts, tokenizer, template)
    response_ids = response_tokens(examples, tokenizer, template.end_token_id)
    kept = []
    for example, text, prompt, response in zip(examples, prompts, prompt_ids, response_ids, strict=True):
        _check_row(example, prompt, response, need_response)
        excess = None
        if len(prompt) > max_prompt_length:
            excess = f"the prompt has {len(prompt)} tokens, and the limit is {max_prompt_length}"
        elif need_response and len(response) > max_response_length:
            excess = f"the response has {len(response)} tokens with its end, and the limit is {max_response_length}"
        if excess and overlong == "error":
            raise RequestError(f"{example.location}: {excess}. Raise the limit, shorten the row, or drop such rows.")
        if not excess:
            kept.append(EncodedExample(prompt, response, example.references, text, example.row))
    if not kept:
        shortest = min(map(len, response_ids))
        raise RequestError(
            f"None of the {len(examples)} rows is within the limits. The shortest prompt has "
            f"{min(map(len, prompt_ids))} tokens, template included, and the limit is {max_prompt_length}"
            + (f"; the shortest response has {shortest}, and the limit is {max_response_length}" * need_response)
            + ". Raise the limits."
        )
    return EncodedData(kept, len(examples) - len(kept))


def _check_row(example: Example, prompt: list[int], response: list[int], need_response: bool) -> None:
    problem = ""
    if not prompt:
        problem = "the prompt has no tokens. Expected at least one."
    elif need_response and not example.references:
        problem = "the row has no reference ('output' or 'completion'), and one is needed."
    elif need_response and not response:
        problem = "the reference has no tokens, for it is empty and the tokenizer has no EOS."
    if problem:
        raise RequestError(f"{example.location}: {problem}")


def stop_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None" = None,
    template: Template | str | None = None,
) -> tuple[int, ...]:
    """Every id that ends a response, in ascending order; empty if there are none.

    They are the EOS ids of the model's generation configuration, the tokenizer's EOS, and the end token of the
    template (or of the one so named).
    """
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids = set(configured) if isinstance(configured, list | tuple) else {configured}
    template = resolve_template(template, tokenizer) if isinstance(template, str) else template
    ids |= {tokenizer.eos_token_id, template.end_token_id if template is not None else None}
    return tuple(sorted(index for index in ids if index is not None))


def encode_texts(source: str | Path, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> list[list[int]]:
    """Rows of `source` ({"text": ...}) one after another, with an EOS after each, in pieces of `length` tokens.

    For a language-modeling loss. The last piece may be shorter; a piece of one token, which predicts nothing, is left
    out.

    Raises:
        RequestError: for a row without text, or too little text for one prediction.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for location, row in read_objects(source):
        if not isinstance(row, dict) or "text" not in row:
            got = f"the keys {', '.join(map(repr, row)):.200}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise RequestError(f'{location}: expected an object with a "text" field. Got {got}.')
        text = text_field(row["text"], "text", location)
        stream += tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] + end
    pieces = [stream[first : first + length] for first in range(0, len(stream), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise RequestError(f"{source} holds too little text: at least two tokens are needed.")
    return pieces
