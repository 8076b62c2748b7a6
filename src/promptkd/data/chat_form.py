"""A saved model's chat template: what the model was trained on, for whoever serves it by its own files alone.

A model that was trained on the Alpaca template, or on a Jinja text, is saved with a chat template that writes the same:
the tokenizer's own if it does (it may take more than the text does), else one that is made here. The template's name or
text stands beside it in the tokenizer's files, and "auto" takes that one: a row may have an `input` of its own, and a
message has none.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from promptkd.data.chat import ERRORS, as_messages
from promptkd.data.encode import EncodedData
from promptkd.data.prompt_tokens import spelling_of
from promptkd.data.rows import Example, Instruction, Request
from promptkd.data.templates import ALPACA, TRAINED_ON, Template, resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED = Instruction("Alpha <é> & 'b'\n", "")
_WITH_SYSTEM = Instruction("Alpha", "", system="Bravo")
_WITH_HISTORY = Instruction("Alpha", "", history=(("Bravo", "Charlie"),))
_SAID = [{"role": "user", "content": _ASKED.instruction}, {"role": "assistant", "content": "Bravo"}]
_OF_SEVERAL_TURNS = ({"role": "system", "content": "Delta"}, *_SAID, {"role": "user", "content": "Charlie"})
_ANSWER = "Echo"

# Around the text of one prompt, as a macro. Nothing stands between the tags: chat templates are read by other rules for
# white space than Jinja texts.
_TEXT = """\
{%- macro text(content) -%}
{{- content if content is string else content | map(attribute="text") | join("") -}}
{%- endmacro -%}
"""
_OF_MESSAGES = (
    _TEXT
    + """\
{%- macro prompt(messages TOOLS) -%}
BODY
{%- endmacro -%}
{{- FRONT -}}
{%- if messages[-1].role == "assistant" -%}
{{- prompt(messages[:-1] GIVEN) ~ text(messages[-1].content) ~ END -}}
{%- else -%}
{{- prompt(messages GIVEN) -}}
{%- endif -%}
"""
)
_OF_INSTRUCTIONS = (
    _TEXT
    + """\
{%- macro prompt(instruction, input, system, history TOOLS) -%}
BODY
{%- endmacro -%}
{%- set said = namespace(system="", asked="", earlier=[]) -%}
{{- FRONT -}}
{%- for message in messages -%}
{%- if message.role in ["system", "developer"] -%}{%- set said.system = text(message.content) -%}
{%- elif message.role not in ["user", "assistant"] -%}
{{- raise_exception("This model was trained on instructions, and knows no message of the role " ~ message.role) -}}
TURNS
{%- endfor -%}
"""
)
_ONE_BY_ONE = """\
{%- elif message.role == "user" -%}{{- prompt(text(message.content), "", said.system, [] GIVEN) -}}
{%- else -%}{{- text(message.content) ~ END -}}
{%- endif -%}"""
_TURNS_AS_HISTORY = """\
{%- elif message.role == "user" -%}{%- set said.asked = text(message.content) -%}
{%- elif not loop.last -%}{%- set said.earlier = said.earlier + [[said.asked, text(message.content)]] -%}
{%- endif -%}
{%- if loop.last -%}{{- prompt(said.asked, "", said.system, said.earlier GIVEN) -}}
{%- if message.role == "assistant" -%}{{- text(message.content) ~ END -}}{%- endif -%}
{%- endif -%}"""


def template_of_training(
    data: EncodedData, name: str, tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any] | None = None
) -> Template | None:
    """The template of the prompts that a model is trained on; None where they are texts of an unknown one.

    Where all prompts are texts, it is the template `name` if some of them end as it does.
    """
    if data.template is not None:
        return data.template
    named = resolve_template(name, tokenizer, kwargs)
    ends = prompt_end(named)
    return named if ends and any(row.prompt.endswith(ends) for row in data.examples) else None


def prompt_end(template: Template) -> str:
    """What a template writes after the last request: the header of the answer, as a rule."""
    requests: list[Any] = [Instruction(text, "") for text in ("Alpha.", "Bravo?")]
    if template.chat is not None or "messages" in template.names:
        requests = [tuple(as_messages(request)) for request in requests]
    try:
        one, other = (template.render_request(Example(request, (), "", 0)) for request in requests)
    except ERRORS:
        return ""
    while not other.endswith(one):
        one = one[1:]
    return one


def tokenizer_as_trained(tokenizer: "PreTrainedTokenizerBase", template: Template | None) -> "PreTrainedTokenizerBase":
    """The tokenizer to save with a model that was trained on prompts by `template`: itself, or a copy that says so."""
    if template is None:
        return tokenizer
    written = saved_chat_template(tokenizer, template)
    trained_on = None if template.name == "chat" else template.text or template.name
    if (written, trained_on) == (tokenizer.chat_template, tokenizer.init_kwargs.get(TRAINED_ON)):
        return tokenizer
    saved = copy.copy(tokenizer)
    saved.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name != TRAINED_ON}
    if trained_on is not None:
        saved.init_kwargs[TRAINED_ON] = trained_on
    saved.chat_template = written
    return saved


def saved_chat_template(tokenizer: "PreTrainedTokenizerBase", template: Template) -> Any:
    """The chat template that is saved with a model that was trained on `template`; None if none was found to write it.

    Variables that a chat template was given become defaults in it, unless it is then another.
    """
    own = tokenizer.chat_template
    if template.chat is None:
        return own if _writes_alike(tokenizer, template) else _chat_form(template, tokenizer)
    if not template.chat.kwargs:
        return own
    if isinstance(own, dict):
        return {name: _with_defaults(tokenizer, text, template.chat.kwargs) for name, text in own.items()}
    return _with_defaults(tokenizer, own, template.chat.kwargs)


def _chat_form(template: Template, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A chat template that writes conversations as `template` writes requests; None if none was found to."""
    try:
        parts = {
            "TURNS": _TURNS_AS_HISTORY if "history" in template.names else _ONE_BY_ONE,
            " TOOLS": ", tools" if "tools" in template.names else "",
            " GIVEN": ", tools or []" if "tools" in template.names else "",
            "FRONT": json.dumps(_front(template, tokenizer), ensure_ascii=False),
            "END": json.dumps(tokenizer.eos_token or "", ensure_ascii=False),
            "BODY": _without_plain_text(template.text or ALPACA),  # last, for it may spell the other names
        }
        written = _OF_MESSAGES if "messages" in template.names else _OF_INSTRUCTIONS
        for name, part in parts.items():
            written = written.replace(name, part)
        render = copy.copy(tokenizer)
        render.chat_template = written
        return written if all(_writes(render, each, template) for each in _tried(template, system=True)) else None
    except ERRORS:
        return None


def _writes_alike(tokenizer: "PreTrainedTokenizerBase", template: Template) -> bool:
    """Whether the tokenizer's own chat template writes as `template` does what that reads of a conversation."""
    try:
        return all(_writes(tokenizer, each, template) for each in _tried(template, system="system" in template.names))
    except ERRORS:
        return False


def _tried(template: Template, *, system: bool) -> Sequence[Any]:
    """Requests that a chat template must write as `template` does."""
    if "messages" in template.names:
        return [tuple(_SAID[:1]), _OF_SEVERAL_TURNS]
    history = [_WITH_HISTORY] if "history" in template.names else []
    return [_ASKED, *([_WITH_SYSTEM] if system else []), *history]


def _writes(tokenizer: "PreTrainedTokenizerBase", request: Request, template: Template) -> bool:
    """Whether the tokenizer's chat template writes a request, and then its answer, as `template` and training do."""
    assert not isinstance(request, str)
    prompt = _front(template, tokenizer) + template.render_request(Example(request, (), "", 0))
    messages = as_messages(request)
    answered = [*messages, {"role": "assistant", "content": _ANSWER}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    return asked == prompt and whole.startswith(f"{prompt}{_ANSWER}{tokenizer.eos_token or ''}")


def _front(template: Template, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the tokenizer puts before the prompts of a template that is no chat template, as text."""
    first = _tried(template, system=False)[0]
    prompt = template.render_request(Example(first, (), "", 0))
    front = tokenizer.decode(spelling_of(tokenizer, template).front(prompt))
    return "" if prompt.startswith(front) else str(front)


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


def _with_defaults(tokenizer: "PreTrainedTokenizerBase", chat_template: str, kwargs: Mapping[str, Any]) -> str:
    """A chat template in which variables have these values where whoever renders it gives no others."""
    given = kwargs.items()
    head = "".join(f"{{% set {name} = {value!r} if {name} is not defined else {name} %}}\n" for name, value in given)
    if chat_template.startswith(head):
        return chat_template
    render = copy.copy(tokenizer)
    for messages in (_SAID[:1], _SAID):
        asks: dict[str, Any] = {"tokenize": False, "add_generation_prompt": messages is not _SAID}
        try:
            render.chat_template = chat_template
            expected = render.apply_chat_template(messages, **asks, **kwargs)
            render.chat_template = head + chat_template
            if render.apply_chat_template(messages, **asks) != expected:
                return chat_template
        except ERRORS:
            return chat_template
    return head + chat_template
