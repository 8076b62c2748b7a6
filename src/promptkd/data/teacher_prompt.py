"""The context that only the teacher reads: one text for all rows (Jinja, of the row's fields), or the row's own column.

    "a text"                                  goes before the request, as a system message where the template has those
    [..., {"role": "user", ...}]              messages that end with a user's turn are the whole conversation
    [{"role": "user"}, {"role": "assistant"}] others stand before the row's conversation

The student never reads any of it. An empty context leaves the teacher the student's own prompt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from promptkd.data.chat import ERRORS, ChatTemplate, as_messages
from promptkd.data.messages import Message, content_text
from promptkd.data.rows import Context, Example, asked_text
from promptkd.errors import RequestError
from promptkd.io.files import MIB, read_regular

_MOST_CHARACTERS = MIB  # of a context, rendered or not
_NAMED = 12  # fields that a message lists
_ANSWERS = frozenset({"output", "response", "answer", "answers", "completion", "chosen", "reference", "references"})
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def context_text(given: str) -> tuple[str, Path | None]:
    """What `--teacher_prompt TEXT|FILE` says: the text of the file of that name, and the file; else itself and None."""
    try:
        path = Path(given).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or a NUL byte, or no such user
        return given, None
    if not is_file:
        return given, None
    try:
        return read_regular(path, most=4 * _MOST_CHARACTERS).decode(), path
    except OSError as error:
        raise RequestError(f"--teacher_prompt: {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--teacher_prompt: {path} is not valid UTF-8. Expected a text.") from error


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads beside the student's prompt. `RequestError` for a text that is no Jinja template."""

    text: str | None = None  # Jinja, for the rows without a column of their own
    most: int = 1024  # tokens of a prompt with its context

    def __post_init__(self) -> None:
        if self.text is not None and len(self.text) > _MOST_CHARACTERS:
            got = f"Got {len(self.text):,} characters; at most {_MOST_CHARACTERS:,} are read."
            raise RequestError(f"--teacher_prompt is a text that the teacher reads before each request. {got}")
        assert self.names is not None

    @cached_property
    def names(self) -> frozenset[str]:
        """The fields that the text names."""
        try:
            return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(self.text or "")))
        except (*ERRORS, SyntaxError, MemoryError) as error:
            reason = str(error).rstrip(".")
            advice = "Write braces that are text as {{ '{{' }}."
            raise RequestError(f"--teacher_prompt does not compile as a Jinja template: {reason}. {advice}") from error

    @property
    def names_of_answers(self) -> list[str]:
        """The fields that hold a row's answer, as far as the text names them."""
        return sorted(self.names & _ANSWERS)

    @cached_property
    def _template(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.text or "")

    def context(self, example: Example) -> Context:
        """The context of a row, "" for none. A row's own stands, unless the text names it."""
        own = example.teacher_prompt
        if self.text is None or (own is not None and "teacher_prompt" not in self.names):
            context: Context = "" if own is None else own
        else:
            context = self._rendered(_fields(example))
        return "" if isinstance(context, str) and not context.strip() else context

    def _rendered(self, fields: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(fields):
                pieces.append(piece)
                if (length := length + len(piece)) > _MOST_CHARACTERS:
                    raise RequestError(f"--teacher_prompt gives more than {_MOST_CHARACTERS:,} characters. Shorten it.")
        except RequestError:
            raise
        except ERRORS as error:
            more = ", …" if len(fields) > _NAMED else ""
            told = f"--teacher_prompt cannot be rendered: {str(error).rstrip('.')}"
            raise RequestError(f"{told}. The row has: {', '.join(list(fields)[:_NAMED])}{more}.") from error
        return "".join(pieces)


def _fields(example: Example) -> dict[str, Any]:
    """What a text may name: the row's columns, `instruction` and `input`, `prompt`, `reference` and `references`."""
    request, references = example.request, list(example.references)
    form = {} if isinstance(request, str | tuple) else {"instruction": request.instruction, "input": request.input}
    answer = {"reference": references[0], "references": references} if references else {}
    return {**form, **answer, **example.fields, "prompt": asked_text(request)}


def for_teacher(example: Example, context: Context, chat: ChatTemplate | None, *, reads_messages: bool) -> Example:
    """The example as the teacher reads it, without its answer.

    Args:
        context: what it reads beside the request, not empty.
        chat: the chat template that renders the example; None for a plain template.
        reads_messages: whether the template renders conversations.
    """
    plain = replace(example, answer=None, references=(), teacher_prompt=None)
    request = example.request
    if isinstance(context, str):
        if chat is None or isinstance(request, str):
            return replace(plain, context=context)
        return replace(plain, request=tuple(_with_text(as_messages(request), context, chat)))
    if not reads_messages:
        advice = "Give it as a text, or choose a chat template."
        raise RequestError(f"'teacher_prompt' holds messages, which the template does not render. {advice}")
    if context[-1]["role"] in ("user", "tool"):
        return replace(plain, request=context)
    if isinstance(request, str):
        problem = "'teacher_prompt' holds messages to stand before a conversation, and the row's prompt is a text"
        raise RequestError(f"{problem}. End them with a user's turn, or give the prompt as messages.")
    return replace(plain, request=tuple(_joined(list(context), as_messages(request))))


def _with_text(messages: list[Message], context: str, chat: ChatTemplate) -> list[Message]:
    """The conversation with a text in its system message, or before its first turn where the template has none."""
    if messages[0]["role"] in ("system", "developer"):
        return [_added(messages[0], context, before=False), *messages[1:]]
    if chat.writes_system:
        return [{"role": "system", "content": context}, *messages]
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    return [*messages[:first], _added(messages[first], context, before=True), *messages[first + 1 :]]


def _joined(before: list[Message], messages: list[Message]) -> list[Message]:
    """Two conversations as one, with one system message."""
    own = messages[0]["role"] in ("system", "developer")
    if own and before[0]["role"] in ("system", "developer"):
        first = _added(messages[0], content_text(before[0]), before=False)
        return [first, *before[1:], *messages[1:]]
    return [messages[0], *before, *messages[1:]] if own else [*before, *messages]


def _added(message: Message, text: str, *, before: bool) -> Message:
    """The message with a paragraph more."""
    content = message.get("content", "")
    if not isinstance(content, str):
        part = {"type": "text", "text": text}
        return {**message, "content": [part, *content] if before else [*content, part]}
    parts = [text, content] if before else [content, text]
    return {**message, "content": "\n\n".join(part for part in parts if part)}


def holds_reference(context: Context, references: tuple[str, ...]) -> bool:
    """Whether a context spells one of the references, as whole words and whatever the white space."""
    text = context if isinstance(context, str) else "\n".join(map(content_text, context))
    written = " ".join(text.split())
    wanted = [" ".join(each.split()) for each in references if each.strip()]
    return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", written) for each in wanted if each in written)
