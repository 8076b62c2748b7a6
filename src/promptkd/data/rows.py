"""A row of data: the three forms in which it may come, and the one in which everything behind reads it.

    {"instruction", "input", "output"}   input may be missing; output a string, a list of references, or missing
    {"prompt", "completion"}             TRL's: strings, or lists of messages; completion may be missing
    {"messages": [...]}                  the last assistant message is the reference

A file may mix the forms. A null field counts as missing, other columns are ignored, and a row that fits several forms
(data sets that carry their rendered text along) is read as the first of: instruction, messages, prompt.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from promptkd.errors import RequestError

__all__ = ["Example", "Instruction", "Message", "Request", "example_from_row", "examples_from_rows", "text_field"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMS = (
    '{"instruction", "input", "output"} (input and output may be missing), {"prompt", "completion"} (completion may be '
    'missing) or {"messages": [...]}'
)

Message = dict[str, Any]
"""{"role": str, "content": str}, and whatever else the chat template reads."""


@dataclass(frozen=True)
class Instruction:
    """A request that a template puts into words."""

    instruction: str
    input: str
    """What the instruction is about; "" if there is nothing."""


Request = Instruction | str | tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One request and the answers that count as right."""

    request: Request
    """An instruction (a template renders it), a prompt's text used as it stands, or messages."""
    references: tuple[str, ...]
    """The first trains, all are compared with; empty if the row has none."""
    location: str
    """Where the row stands, for messages: "train.jsonl, line 12" (lines from 1) or "train.parquet, row 11" (from 0)."""
    row: int
    """Index of the row in its source, from 0."""


_ENDED = "ended"


def examples_from_rows(rows: Iterable[Mapping[str, Any]], *, origin: str = "row") -> list[Example]:
    """Read `rows` in any of the three forms.

    Args:
        origin: what messages call a row; its index follows, from 0.

    Raises:
        RequestError: naming the first row that fits no form or has a field of the wrong type, or if there are no rows.
    """
    examples = [example_from_row(row, location=f"{origin} {index}", row=index) for index, row in enumerate(rows)]
    if not examples:
        raise RequestError(f"Expected at least one row of data: {_FORMS}. Got none.")
    return examples


def example_from_row(fields: Mapping[str, Any], *, location: str, row: int) -> Example:
    """Read one row. Raises `RequestError`, with `location`, if it fits none of the forms."""
    if not isinstance(fields, Mapping):
        raise RequestError(f"{location}: expected an object with the fields of a row, got {_kind(fields)}.")
    present = {key: value for key, value in fields.items() if value is not None}
    request: Request
    if "instruction" in present:
        request, references = _from_instruction(present, location)
    elif "messages" in present:
        request, references = _from_messages(present, location)
    elif "prompt" in present:
        request, references = _from_prompt(present, location)
    else:
        keys = ", ".join(f"{key!r:.60}" for key in islice(present, 8)) or "no field that is not null"
        raise RequestError(f"{location}: expected {_FORMS}. Got {keys}.")
    if references and fields.get(_ENDED) is False:
        # `promptkd generate` marks a response that the length limit cut; an end token behind it would be untrue.
        raise RequestError(
            f"{location}: the response was cut at the length limit ({_ENDED!r} is false), so it cannot be learned as "
            "a whole one. Write the file anew with `promptkd generate --ended-only`, or drop such rows."
        )
    return Example(request, references, location, row)


def _from_instruction(fields: Mapping[str, Any], location: str) -> tuple[Instruction, tuple[str, ...]]:
    instruction = text_field(fields["instruction"], "instruction", location, empty=False)
    context = text_field(fields.get("input", ""), "input", location)
    output = fields.get("output")
    if output is None:
        return Instruction(instruction, context), ()
    if isinstance(output, str):
        return Instruction(instruction, context), (text_field(output, "output", location),)
    if not isinstance(output, list | tuple):
        raise RequestError(f"{location}: 'output' must be a string or a list of strings, got {_kind(output)}.")
    if not output:
        raise RequestError(f"{location}: 'output' is an empty list. Leave it out if the row has no reference.")
    references = tuple(text_field(each, f"output[{index}]", location) for index, each in enumerate(output))
    return Instruction(instruction, context), references


def _from_messages(fields: Mapping[str, Any], location: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    messages = _messages(fields["messages"], "messages", location)
    references: tuple[str, ...] = ()
    if messages[-1]["role"] == "assistant":
        *messages, answer = messages
        references = (answer["content"],)
    return _request_messages(messages, "messages", location), references


def _from_prompt(fields: Mapping[str, Any], location: str) -> tuple[str | tuple[Message, ...], tuple[str, ...]]:
    prompt: str | tuple[Message, ...]
    if isinstance(fields["prompt"], str):
        prompt = text_field(fields["prompt"], "prompt", location, empty=False)
    else:
        prompt = _request_messages(_messages(fields["prompt"], "prompt", location), "prompt", location)
    completion = fields.get("completion")
    if completion is None:
        return prompt, ()
    if isinstance(completion, str):
        return prompt, (text_field(completion, "completion", location),)
    answer = _messages(completion, "completion", location)
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer)
        raise RequestError(f"{location}: 'completion' must hold one assistant message. Got messages from: {roles}.")
    return prompt, (answer[0]["content"],)


def _messages(value: Any, field: str, location: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        also = "a list of messages" if field == "messages" else "a string or a list of messages"
        raise RequestError(f"{location}: {field!r} must be {also}, got {_kind(value)}.")
    if not value:
        raise RequestError(f"{location}: {field!r} must hold at least one message, got an empty list.")
    messages = []
    for index, each in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(each, Mapping):
            raise RequestError(f"{location}: {name!r} must be {{'role', 'content'}}, got {_kind(each)}.")
        message = {key: part for key, part in each.items() if part is not None}
        if message.get("role") not in _ROLES:
            got = f"{message['role']!r:.60}" if "role" in message else "none"
            raise RequestError(f"{location}: the role of {name!r} must be one of {', '.join(_ROLES)}. Got {got}.")
        if "content" not in message:
            raise RequestError(f"{location}: {name!r} has no content. Expected a string.")
        text_field(message["content"], f"{name}.content", location)
        _check_characters(message, name, location)
        messages.append(message)
    return messages


def _request_messages(messages: list[Message], field: str, location: str) -> tuple[Message, ...]:
    last = messages[-1]["role"] if messages else "nobody"
    if last not in ("user", "tool"):
        raise RequestError(
            f"{location}: the request in {field!r} must end with a user (or tool) message, for the model answers it. "
            f"Got {last}."
        )
    return tuple(messages)


def text_field(value: Any, field: str, location: str, *, empty: bool = True) -> str:
    """`value` if it is text that can be written as UTF-8. Raises `RequestError` if not."""
    if not isinstance(value, str):
        raise RequestError(f"{location}: {field!r} must be a string, got {_kind(value)}.")
    if not empty and not value.strip():
        raise RequestError(f"{location}: {field!r} is empty. Expected some text.")
    _check_characters(value, field, location)
    return value


def _check_characters(value: Any, field: str, location: str) -> None:
    """Refuse half a surrogate pair in a text, or anywhere in what a chat template may read."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{location}: {field!r} holds half of a surrogate pair ({value[error.start]!r}), which is no "
                "character. Write the file anew as UTF-8."
            ) from error
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_characters(key, field, location)
            _check_characters(part, field, location)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_characters(part, field, location)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or f"a value of type {type(value).__name__}"
