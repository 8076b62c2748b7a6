"""An Ollama Modelfile for a GGUF file: the prompt's template in Ollama's language, what ends an answer, temperature.

A chat template is a program, so it is not translated but tried: conversations are rendered by it, and what it puts
around each message is read off. The result stands in the file only if it then renders other conversations alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.rows import Example, Instruction
from promptkd.data.templates import Template, resolve_template
from promptkd.errors import RequestError
from promptkd.models.end_tokens import known_end_tokens

_ROLES = ("system", "user", "assistant")
_WORDS = ("Alpha", "Bravo", "Charlie", "Delta")
_TRIED = ("u", "su", "uau", "suau", "uauau")  # conversations by the first letters of their roles
Render = Callable[..., str]  # of messages, by a chat template
Around = dict[str, tuple[str, str]]  # by role: what stands before and behind a message


@dataclass(frozen=True)
class OllamaTemplate:
    text: str  # in Ollama's language
    system: str = ""  # the system message of a conversation that has none


def modelfile(
    gguf: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The Modelfile for the file of the name `gguf` beside it.

    The model was trained with `template` and `kwargs`, the variables of its chat template.
    """
    resolved = resolve_template(template, tokenizer, kwargs)
    translated = _chat(tokenizer, kwargs or {}) if resolved.name == "chat" else _single(resolved)
    lines = [f"# ollama create NAME -f THIS_FILE\nFROM ./{gguf}\n"]
    if translated is None:
        lines.append(
            "# No TEMPLATE: this model's prompt could not be put into Ollama's language with certainty. Ollama may"
        )
        lines.append("# know one for it; else send it, with raw: true, prompts that are rendered by the following.")
        source = tokenizer.chat_template if resolved.name == "chat" else resolved.text or resolved.name
        lines += [f"#   {line}" for line in str(source).splitlines()]
    else:
        if resolved.name == "chat" and _renders_tools(tokenizer, kwargs or {}):
            lines.append("# The model's chat template renders tools and their calls too. This TEMPLATE does not: it is")
            lines.append(
                "# for conversations without tools. For others, render the prompt by the chat template itself."
            )
        lines.append(f'TEMPLATE """{translated.text}"""')
        lines += [f'SYSTEM """{translated.system}"""'] if translated.system else []
    lines.append("")
    ends = [tokenizer.decode([index]) for index in known_end_tokens(model, tokenizer)]
    lines += [f'PARAMETER stop "{end}"' for end in ends if end.strip() == end != "" and '"' not in end]
    settings = model.generation_config
    sampled = 1.0 if settings.temperature is None else settings.temperature  # transformers' default
    lines.append(f"PARAMETER temperature {sampled if settings.do_sample else 0}")
    return "\n".join(lines) + "\n"


def _chat(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> OllamaTemplate | None:
    """The tokenizer's chat template; None if it is no fixed text around each message."""
    source, bos = tokenizer.chat_template, tokenizer.bos_token or ""
    if not isinstance(source, str) or "strftime" in source:  # a date is no fixed text
        return None
    render = partial(tokenizer.apply_chat_template, tokenize=False, **kwargs)
    for start in dict.fromkeys(("", bos)):
        try:
            around, generation = _read_off(render, start)
            default = _default_system(render, around, start)
            holds = all(_holds(render, roles, around, generation, start, default) for roles in _TRIED)
        except (RequestError, ValueError):
            continue
        if holds:
            break
    else:
        return None
    if any(mark in text for text in (generation, start, default, *sum(around.values(), ())) for mark in ("{{", '"""')):
        return None
    written = ""
    for place, (role, (before, behind)) in enumerate(around.items()):
        written += f'{{{{ {"else " if place else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
    if start and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        start = ""  # llama.cpp puts it there, as the tokenizer does
    return OllamaTemplate(f"{start}{{{{ range .Messages }}}}{written}{{{{ end }}}}{{{{ end }}}}{generation}", default)


def _renders_tools(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether the chat template writes the functions that a model may call, or their calls."""
    if "tool_calls" in tokenizer.chat_template:
        return True
    render = partial(tokenizer.apply_chat_template, _messages("u"), tokenize=False, **kwargs)
    schema = {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
    try:
        return bool(render(tools=[{"type": "function", "function": schema}]) != render())
    except Exception:  # a template may raise nearly anything
        return "tools" in tokenizer.chat_template


def _read_off(render: Render, start: str) -> tuple[Around, str]:
    """What stands around the messages of each role, and behind the conversation, which begins with `start`.

    `ValueError` if the parts cannot be told apart.
    """
    asked, whole = (_rendered(render, "uau", asks=asks) for asks in (False, True))
    answered, again = (_rendered(render, roles, asks=False) for roles in ("ua", "uaua"))
    parts = [text[len(before) :] for text, before in ((asked, answered), (again, asked), (whole, asked))]
    if not (asked.startswith(answered) and again.startswith(asked) and whole.startswith(asked)):
        raise ValueError("the messages are not written one behind the other")
    around = {"user": _split(parts[0], _WORDS[2]), "assistant": _split(parts[1], _WORDS[3])}
    try:
        with_system = _rendered(render, "su", asks=False).removeprefix(start)
    except RequestError:  # some templates refuse that role
        return around, parts[2]
    behind_system = _WORDS[1].join(around["user"])
    if not with_system.endswith(behind_system):
        raise ValueError("the system message is not written before the request")
    return {"system": _split(with_system.removesuffix(behind_system), _WORDS[0]), **around}, parts[2]


def _split(text: str, word: str) -> tuple[str, str]:
    before, found, behind = text.partition(word)
    if not found:
        raise ValueError(f"{word} is not written")
    return before, behind


def _default_system(render: Render, around: Around, start: str) -> str:
    """The system message of a conversation that has none; "" if there is none."""
    before, behind = around.get("system", ("", ""))
    head = _rendered(render, "u").removeprefix(start).partition(around["user"][0] + _WORDS[0])[0]
    is_framed = head.startswith(before) and head.endswith(behind) and len(head) > len(before) + len(behind)
    return head[len(before) : len(head) - len(behind)] if before and is_framed else ""


def _holds(render: Render, roles: str, around: Around, generation: str, start: str, default: str) -> bool:
    """Whether the chat template writes this conversation as the parts say; True if it has a role that is refused."""
    if "s" in roles and "system" not in around:
        return True
    messages = _messages(roles)
    if default and roles[0] != "s":
        messages.insert(0, {"role": "system", "content": default})
    written = "".join(each["content"].join(around[each["role"]]) for each in messages)
    return start + written + generation == _rendered(render, roles)


def _messages(roles: str) -> list[dict[str, str]]:
    by_letter = {role[0]: role for role in _ROLES}
    words = (*_WORDS, "Echo", "Foxtrot")
    return [{"role": by_letter[letter], "content": words[place]} for place, letter in enumerate(roles)]


def _rendered(render: Render, roles: str, *, asks: bool = True) -> str:
    messages = _messages(roles)
    try:
        return render(messages, add_generation_prompt=asks)
    except Exception as error:  # a template may raise nearly anything
        raise RequestError(f"The chat template cannot render {roles}: {error}") from error


def _single(template: Template) -> OllamaTemplate | None:
    """A template of single requests; None if it is no fixed text around the instruction."""
    try:
        texts = [template.render(Example(Instruction(word, ""), (), word, 0)) for word in _WORDS[:2]]
    except RequestError:
        return None
    parts = [text.split(word) for text, word in zip(texts, _WORDS[:2], strict=True)]
    if len(parts[0]) != 2 or parts[0] != parts[1] or any(mark in texts[0] for mark in ("{{", '"""')):
        return None
    return OllamaTemplate("{{ .Prompt }}".join(parts[0]))
