"""A saved model's chat template: what the model was trained on, for whoever serves it by its own files alone.

A model that was trained on the Alpaca template, or on a Jinja text, is saved with a chat template that writes the same:
the tokenizer's own if it does (it may take more than the text does), else one that is made here.
The template's name or text stands beside it in the tokenizer's files, and "auto" takes that one: a row may have an
`input` of its own, and a message has none.
"""

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from promptkd.data.chat import ERRORS, as_messages
from promptkd.data.prompt_tokens import spelling_of
from promptkd.data.rows import Example, Instruction, Request
from promptkd.data.templates import ALPACA, TRAINED_ON, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED = Instruction("Alpha <é> & 'b'\n", "")
_WITH_INPUT = Instruction("Alpha", "Bravo")
_WITH_SYSTEM = Instruction("Alpha", "", system="Bravo")
_SAID = [{"role": "user", "content": _ASKED.instruction}, {"role": "assistant", "content": "Bravo"}]
_TRIED: dict[bool, list[Any]] = {  # whether a template reads messages: requests that it must write alike
    False: [_ASKED, _WITH_SYSTEM],
    True: [tuple(_SAID[:1]), ({"role": "system", "content": "Delta"}, *_SAID, {"role": "user", "content": "Charlie"})],
}
_LATER = Instruction("Alpha", "", history=(("Bravo", "Charlie"),))

# Around the text of one prompt, as a macro. Nothing stands between the tags: chat templates are read by other rules for
# white space than Jinja texts.
_OF_MESSAGES = """\
{%- macro prompt(messages, tools) -%}
BODY
{%- endmacro -%}
{{- FRONT -}}
{%- if messages[-1].role == "assistant" -%}
{{- prompt(messages[:-1], tools or []) ~ messages[-1].content ~ END -}}
{%- else -%}
{{- prompt(messages, tools or []) -}}
{%- endif -%}
"""
_OF_INSTRUCTIONS = """\
{%- macro prompt(instruction, input, system, history, tools) -%}
BODY
{%- endmacro -%}
{%- macro text(content) -%}
{{- content if content is string else content | map(attribute="text") | join("") -}}
{%- endmacro -%}
{%- set said = namespace(system="", asked="", earlier=[]) -%}
{{- FRONT -}}
{%- for message in messages -%}
{%- if message.role == "system" -%}{%- set said.system = text(message.content) -%}
TURNS
{%- endfor -%}
"""
_ONE_BY_ONE = """\
{%- elif message.role == "user" -%}{{- prompt(text(message.content), "", said.system, [], tools or []) -}}
{%- else -%}{{- text(message.content) ~ END -}}
{%- endif -%}"""
_WITH_HISTORY = """\
{%- elif message.role == "user" -%}{%- set said.asked = text(message.content) -%}
{%- elif not loop.last -%}{%- set said.earlier = said.earlier + [[said.asked, text(message.content)]] -%}
{%- endif -%}
{%- if loop.last -%}{{- prompt(said.asked, "", said.system, said.earlier, tools or []) -}}
{%- if message.role == "assistant" -%}{{- text(message.content) ~ END -}}{%- endif -%}
{%- endif -%}"""


def tokenizer_as_trained(
    tokenizer: "PreTrainedTokenizerBase", template: Template, kwargs: Mapping[str, Any] | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer to save with a model that was trained on rows by `template`: itself, or a copy that says so.

    Its chat template writes what `template` does, with `kwargs` as the defaults of a chat template's variables; there
    is none where no chat template can.
    """
    written, trained_on = tokenizer.chat_template, None
    if template.name == "chat":
        if kwargs and isinstance(written, str):
            written = _with_defaults(written, kwargs)
    elif not _writes_alike(tokenizer, template):
        written, trained_on = chat_form(template, tokenizer), template.text or template.name
    if (written, trained_on) == (tokenizer.chat_template, tokenizer.init_kwargs.get(TRAINED_ON)):
        return tokenizer
    saved = copy.copy(tokenizer)
    saved.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name != TRAINED_ON}
    if trained_on is not None:
        saved.init_kwargs[TRAINED_ON] = trained_on
    saved.chat_template = written
    return saved


def chat_form(template: Template, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A chat template that writes conversations as `template` writes requests; None if none was found to."""
    reads_messages, reads_history = "messages" in template.names, "history" in template.names
    end = tokenizer.eos_token or ""
    tried = [*_TRIED[reads_messages], *([_LATER] if reads_history else [])]
    try:
        prompts = [template.render_request(Example(request, (), "", 0)) for request in tried]
        front = tokenizer.decode(spelling_of(tokenizer, template).front(prompts[0]))
        parts = {
            "TURNS": _WITH_HISTORY if reads_history else _ONE_BY_ONE,
            "FRONT": json.dumps("" if prompts[0].startswith(front) else front, ensure_ascii=False),
            "END": json.dumps(end, ensure_ascii=False),
            "BODY": _without_plain_text(template.text or ALPACA),
        }
        written = _OF_MESSAGES if reads_messages else _OF_INSTRUCTIONS
        for name, part in parts.items():
            if name == "BODY" and "tools" not in template.names:
                written = written.replace(", tools or []", "").replace(", tools", "")
            written = written.replace(name, part)
        render = copy.copy(tokenizer)
        render.chat_template = written
        for request, prompt in zip(tried, prompts, strict=True):
            whole = prompt if prompt.startswith(front) else front + prompt
            if _rendered(render, request) != whole or _rendered(render, request, "Echo") != f"{whole}Echo{end}":
                return None
    except ERRORS:
        return None
    return written


def _writes_alike(tokenizer: "PreTrainedTokenizerBase", template: Template) -> bool:
    """Whether the tokenizer's own chat template writes requests, with an input and without, as `template` does."""
    reads_messages = "messages" in template.names
    try:
        for request in (*_TRIED[reads_messages][:1], *([] if reads_messages else [_WITH_INPUT])):
            prompt = template.render_request(Example(request, (), "", 0))
            whole = f"{prompt}Echo{tokenizer.eos_token or ''}"
            if _rendered(tokenizer, request) != prompt or not _rendered(tokenizer, request, "Echo").startswith(whole):
                return False
    except ERRORS:
        return False
    return True


def _rendered(tokenizer: "PreTrainedTokenizerBase", request: Request, answer: str = "") -> str:
    assert not isinstance(request, str)
    messages = as_messages(request) + ([{"role": "assistant", "content": answer}] if answer else [])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)
    assert isinstance(text, str)
    return text


def _without_plain_text(source: str) -> str:
    """A Jinja text whose plain text is string literals, which no rule for white space changes."""
    written, piece = [], ""
    tokens = jinja2.Environment(keep_trailing_newline=True).lexer.tokeniter(source, None)
    for _, kind, value in tokens:
        if kind == "data":
            written.append("{{- " + json.dumps(value, ensure_ascii=False) + " -}}")
        elif kind in ("block_begin", "variable_begin"):
            piece = value[:2] + "-"
        elif kind in ("block_end", "variable_end"):
            written.append(piece + "-" + value.strip()[-2:])
            piece = ""
        elif not kind.startswith(("comment", "raw")):
            piece += value
    return "\n".join(written)


def _with_defaults(chat_template: str, kwargs: Mapping[str, Any]) -> str:
    """A chat template in which variables have these values where whoever renders it gives no others."""
    lines = [
        f"{{%- set {name} = {value!r} if {name} is not defined else {name} -%}}\n" for name, value in kwargs.items()
    ]
    head = "".join(lines)
    return chat_template if chat_template.startswith(head) else head + chat_template
