"""A row of data: the three forms in which it may come, and `Example`, the one form in which it is used.

    {"instruction", "input", "output"}   input may be missing; output a string, a list of references, or missing
    {"prompt", "completion"}             TRL's: strings, or lists of messages; completion may be missing
    {"messages": [...]}                  the last assistant message is the reference

A file may mix the forms. A null field counts as missing, other columns are ignored, and a row that fits several forms
(data sets that carry their rendered text along) is read as the first of: instruction, messages, prompt.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from promptkd.errors import RequestError, at

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMS = (
    '{"instruction", "input", "output"} (input and output may be missing), {"prompt", "completion"} (completion may be '
    'missing) or {"messages": [...]}'
)

Message = dict[str, Any]  # {"role": str, "content": str}, and whatever else the chat template reads


@dataclass(frozen=True)
class Instruction:
    """A request that a template renders."""

    instruction: str
    input: str  # what the instruction is about; "" if there is nothing


Unrendered = Instruction | tuple[Message, ...]  # what a template renders
Request = Unrendered | str


@dataclass(frozen=True)
class Example:
    """One request and its reference answers."""

    request: Request  # an instruction (a template renders it), a prompt's text used as it is, or messages
    references: tuple[str, ...]  # training uses the first, evaluation all of them; empty if the row has none
    location: str  # for error messages: "train.jsonl, line 12" (from 1) or "train.parquet, row 11" (from 0)
    row: int  # index of the row in its source, from 0


def examples_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    """Read `rows` in any of the three forms. `RequestError` if there are none, or naming the first that is wrong."""
    examples = [example_from_row(row, location=f"row {index}", row=index) for index, row in enumerate(rows)]
    if not examples:
        raise RequestError(f"Expected at least one row of data: {_FORMS}. Got none.")
    return examples


def example_from_row(fields: Mapping[str, Any], *, location: str, row: int) -> Example:
    """Read one row. `RequestError`, with `location`, if it fits none of the forms."""
    with at(location):
        request, references = _request_and_references(fields)
        # `promptkd generate` marks a response that the length limit cut; an end token behind it would be untrue.
        if references and fields.get("ended") is False:
            cut = "the response was cut at the length limit ('ended' is false)"
            advice = "Regenerate the file with `promptkd generate --ended-only`, or drop such rows."
            raise RequestError(f"{cut}, so it cannot be used as a complete one. {advice}")
        return Example(request, references, location, row)


def text_field(value: Any, field: str, *, may_be_empty: bool = True) -> str:
    """`value` if it is a string that UTF-8 can encode, else `RequestError`."""
    if not isinstance(value, str):
        raise RequestError(f"{field!r} must be a string, got {_kind(value)}.")
    if not may_be_empty and not value.strip():
        raise RequestError(f"{field!r} is empty. Expected some text.")
    _check_characters(value, field)
    return value


def _request_and_references(fields: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    if not isinstance(fields, Mapping):
        raise RequestError(f"expected an object with the fields of a row, got {_kind(fields)}.")
    present = {key: value for key, value in fields.items() if value is not None}
    if "instruction" in present:
        instruction = text_field(present["instruction"], "instruction", may_be_empty=False)
        return Instruction(instruction, text_field(present.get("input", ""), "input")), _references(present, "output")
    if "messages" in present:
        messages = _messages(present["messages"], "messages")
        answer = (messages.pop()["content"],) if messages[-1]["role"] == "assistant" else ()
        return _request(messages, "messages"), answer
    if "prompt" not in present:
        keys = ", ".join(f"{key!r:.60}" for key in islice(present, 8)) or "no field that is not null"
        raise RequestError(f"expected {_FORMS}. Got {keys}.")
    if isinstance(present["prompt"], str):
        return text_field(present["prompt"], "prompt", may_be_empty=False), _references(present, "completion")
    return _request(_messages(present["prompt"], "prompt"), "prompt"), _references(present, "completion")


def _references(fields: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """From "output", a text or a list of texts, or "completion", a text or an assistant message."""
    found = fields.get(field)
    if found is None or isinstance(found, str):
        return () if found is None else (text_field(found, field),)
    if field == "completion":
        answer = _messages(found, field)
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in answer)
            raise RequestError(f"'completion' must hold one assistant message. Got messages from: {roles}.")
        return (answer[0]["content"],)
    if not isinstance(found, list | tuple):
        raise RequestError(f"'output' must be a string or a list of strings, got {_kind(found)}.")
    if not found:
        raise RequestError("'output' is an empty list. Leave it out if the row has no reference.")
    return tuple(text_field(each, f"output[{index}]") for index, each in enumerate(found))


def _request(messages: list[Message], field: str) -> tuple[Message, ...]:
    if (last := messages[-1]["role"] if messages else "nobody") not in ("user", "tool"):
        expected = "must end with a user (or tool) message, for the model answers it"
        raise RequestError(f"the request in {field!r} {expected}. Got {last}.")
    return tuple(messages)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        expected = "a list of messages" if field == "messages" else "a string or a list of messages"
        raise RequestError(f"{field!r} must be {expected}, got {_kind(value)}.")
    if not value:
        raise RequestError(f"{field!r} must hold at least one message, got an empty list.")
    messages = []
    for index, each in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(each, Mapping):
            raise RequestError(f"{name!r} must be {{'role', 'content'}}, got {_kind(each)}.")
        messages.append(message := {key: part for key, part in each.items() if part is not None})
        if message.get("role") not in _ROLES:
            got = f"{message['role']!r:.60}" if "role" in message else "none"
            raise RequestError(f"the role of {name!r} must be one of {', '.join(_ROLES)}. Got {got}.")
        if "content" not in message:
            raise RequestError(f"{name!r} has no content. Expected a string.")
        text_field(message["content"], f"{name}.content")
        _check_characters(message, name)
    return messages


def _check_characters(value: Any, field: str) -> None:
    """Refuse half of a surrogate pair in a text, or anywhere in what a chat template may read."""
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        problem = f"holds half of a surrogate pair ({half!r}), which is no character"
        raise RequestError(f"{field!r} {problem}. Save the file as valid UTF-8.") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or f"a value of type {type(value).__name__}"
