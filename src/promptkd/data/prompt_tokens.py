"""The tokens of prompts: of rendered requests, of texts, and those that a row keeps of its text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from promptkd.data.rows import Example
from promptkd.data.templates import Template, resolve_template
from promptkd.data.tokens import KEPT, Spelling, unmarked
from promptkd.errors import RequestError, at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_tokens(
    examples: Sequence[Example], texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[list[int]]:
    """The tokens of every prompt, of which `texts` are the renderings by `template`.

    A chat template writes its own BOS. Every other prompt begins with what the tokenizer puts before a text, unless the
    text itself does. `RequestError` if a request spells a control token and the template takes it apart.
    """
    spelling = spelling_of(tokenizer, template)
    encoded = spelling.tokens(texts, spell=False)
    for index, example in enumerate(examples):
        if (marked := marked_text(example, spelling, template.render)) is not None:
            encoded[index] = spelling.tokens_of_marked(marked)
    kept = {index: ids for index, each in enumerate(examples) if (ids := _kept_prompt(each, spelling)) is not None}
    framed = [index for index, each in enumerate(examples) if isinstance(each.request, str) or template.name != "chat"]
    probe = next((texts[index] for index in framed if encoded[index]), None)
    front = [] if probe is None else spelling.front(probe)
    for index in framed:
        if encoded[index][: len(front)] != front:
            encoded[index] = front + encoded[index]
    for index, ids in kept.items():
        before = f"{own}\n\n" if (own := examples[index].context) else ""
        (context,) = spelling.tokens([before], spell=True)
        start = len(front) if ids[: len(front)] == front else 0
        encoded[index] = [*ids[:start], *context, *ids[start:]]
    return encoded


def tokens_as_read(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of prompts that are text, as they are read from a file."""
    examples = [Example(text, (), "", index) for index, text in enumerate(texts)]
    return prompt_tokens(examples, texts, tokenizer, resolve_template("alpaca", tokenizer))


def spelling_of(tokenizer: "PreTrainedTokenizerBase", template: Template) -> Spelling:
    """The tokenizer's spelling, by which no data writes the template's end token."""
    end = template.end_token_id
    return Spelling(tokenizer, frozenset() if end is None else frozenset([tokenizer.convert_ids_to_tokens(end)]))


def marked_text(example: Example, spelling: Spelling, render: Callable[[Example], str]) -> str | None:
    """What `render` makes of `example` with marks around the control tokens that its data spells; None without any.

    `RequestError` if the template takes such a token apart.
    """
    if (marked := spelling.marked(example)) == example:
        return None
    text = render(marked)
    if unmarked(text) != render(example):
        problem = "the row spells a control token, and the template cuts or measures the text around it"
        advice = "Take the token out of the row, or choose a template that leaves the text as it is."
        raise RequestError(f"{example.location}: {problem}. {advice}")
    return text


def _kept_prompt(example: Example, spelling: Spelling) -> list[int] | None:
    """The tokens that the row keeps of a prompt that is text, as `promptkd generate` writes them; None without."""
    if not isinstance(example.request, str) or (held := example.fields.get(KEPT)) is None:
        return None
    with at(example.location):
        return spelling.kept_ids(example.request, held)
