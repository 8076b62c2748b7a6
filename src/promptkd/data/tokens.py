"""Text becomes tokens, and text from the data never becomes a control token.

"<|im_end|>" in an answer or an instruction is spelled in ordinary tokens. Control tokens come from the template, from
the tokenizer's own BOS, and from a prompt that is text already (its author wrote all of it, control tokens included).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from promptkd.data.rows import Example, Instruction
from promptkd.data.templates import Template
from promptkd.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two code points that Unicode reserves for use within a program: they enclose control tokens that the data spells.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def prompt_tokens(
    examples: Sequence[Example], texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[list[int]]:
    """The tokens of every prompt.

    A chat template writes its own BOS. Every other prompt begins with what the tokenizer puts before a text, unless the
    text itself does. What the tokenizer appends (EOS) would end the prompt, and is left out.

    Args:
        texts: the examples as `template` renders them.

    Raises:
        RequestError: if a request spells a control token and the template takes it apart.
    """
    encoded = _tokenize(tokenizer, texts, spell=False)
    pattern = _control_tokens(tokenizer)
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        marked = _marked(example, pattern)
        if marked == example:
            continue
        marked_text = template.render(marked)
        if _unmarked(marked_text) != text:
            raise RequestError(
                f"{example.location}: the request spells a control token, and the template cuts or measures the text "
                "around it. Take the token out of the row, or choose a template that leaves the text as it is."
            )
        encoded[index] = _tokenize_marked(tokenizer, marked_text)
    framed = [isinstance(example.request, str) or template.adds_special_tokens for example in examples]
    probe = next((text for text, ids, frame in zip(texts, encoded, framed, strict=True) if ids and frame), None)
    if probe is None:
        return encoded
    front = _front(tokenizer, probe)
    return [
        front + ids if frame and ids[: len(front)] != front else ids for ids, frame in zip(encoded, framed, strict=True)
    ]


def response_tokens(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", end_token_id: int | None
) -> list[list[int]]:
    """The tokens of every first reference and the end token; [] for a row without a reference.

    Raises:
        RequestError: if a reference spells a control token that this tokenizer cannot write in ordinary tokens.
    """
    texts = [example.references[0] if example.references else "" for example in examples]
    end = [] if end_token_id is None else [end_token_id]
    pattern = _control_tokens(tokenizer)
    encoded = _tokenize(tokenizer, texts, spell=True)
    for example, text, ids in zip(examples, texts, encoded, strict=True):
        # The unknown token is excepted: a text gets it for other reasons than spelling its name.
        control = {tokenizer.convert_tokens_to_ids(token) for token in pattern.findall(text)} - {tokenizer.unk_token_id}
        if found := control.union(end).intersection(ids):
            raise RequestError(
                f"{example.location}: the response spells the control token "
                f"{tokenizer.convert_ids_to_tokens(min(found))!r}, which this tokenizer cannot write in ordinary "
                "tokens. Take it out of the row."
            )
    return [ids + end if example.references else [] for example, ids in zip(examples, encoded, strict=True)]


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, spell: bool) -> list[list[int]]:
    """Tokens of the texts alone. With `spell`, control tokens are text, spelled in ordinary tokens."""
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=spell, return_attention_mask=False, verbose=False
    )["input_ids"]


def _front(tokenizer: "PreTrainedTokenizerBase", probe: str) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    plain = _tokenize(tokenizer, [probe], spell=True)[0]
    framed = tokenizer(probe, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
    start = next((start for start in range(len(framed)) if framed[start : start + len(plain)] == plain), None)
    if start is None:
        raise RequestError(
            "The tokenizer must keep the tokens of a text when it adds its BOS and EOS. It splits "
            f"{probe[:40]!r} into other tokens then. Choose another tokenizer."
        )
    return framed[:start]


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the control tokens of the tokenizer, longer ones before their prefixes."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ranked = sorted(special.union(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ranked)) or "(?!)")


def _marked(example: Example, control_tokens: re.Pattern[str]) -> Example:
    """`example` with marks around every control token that its data spells. Most examples have none."""

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            if control_tokens.search(value) is None:
                return value
            return control_tokens.sub(f"{_OPEN}\\g<0>{_CLOSE}", _unmarked(value))
        if isinstance(value, dict):
            return {key: part if key == "role" else mark(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(mark(part) for part in value)
        return value

    request = example.request
    if isinstance(request, str):
        return example
    if isinstance(request, Instruction):
        request = Instruction(mark(request.instruction), mark(request.input))
    else:
        request = mark(request)
    return replace(example, request=request)


def _unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _tokenize_marked(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokenize a rendered prompt piece by piece: text between marks is data, the rest is the template's.

    At the marks, tokens can differ from those of the text without marks; the text that they spell does not.
    """
    ids: list[int] = []
    for index, piece in enumerate(map(_unmarked, re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", text))):
        # SentencePiece puts a space before a text, but not after a line break.
        lead, led, plain = _tokenize(tokenizer, ["\n", "\n" + piece, piece], spell=index % 2 == 1)
        ids += led[len(lead) :] if index > 0 and led[: len(lead)] == lead else plain
    return ids
