"""A row of data: the three forms in which it may come, and `Example`, the one form in which it is used.

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

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMS = (
    '{"instruction", "input", "output"} (input and output may be missing), {"prompt", "completion"} (completion may be '
    'missing) or {"messages": [...]}'
)
_ENDED = "ended"

Message = dict[str, Any]
"""{"role": str, "content": str}, and whatever else the chat template reads."""


@dataclass(frozen=True)
class Instruction:
    """A request that a template renders."""

    instruction: str
    input: str  # what the instruction is about; "" if there is nothing


Request = Instruction | str | tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One request and its reference answers."""

    request: Request  # an instruction (a template renders it), a prompt's text used as it is, or messages
    references: tuple[str, ...]  # training uses the first, evaluation all of them; empty if the row has none
    location: str  # for error messages: "train.jsonl, line 12" (from 1) or "train.parquet, row 11" (from 0)
    row: int  # index of the row in its source, from 0


def examples_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    """Read `rows` in any of the three forms.

    Raises:
        RequestError: naming the first row that fits no form or has a field of the wrong type, or if there are no rows.
    """
    examples = [example_from_row(row, location=f"row {index}", row=index) for index, row in enumerate(rows)]
    if not examples:
        raise RequestError(f"Expected at least one row of data: {_FORMS}. Got none.")
    return examples


def example_from_row(fields: Mapping[str, Any], *, location: str, row: int) -> Example:
    """Read one row. Raises `RequestError`, with `location`, if it fits none of the forms."""
    try:
        return Example(*_request_and_references(fields), location, row)
    except RequestError as error:
        raise RequestError(f"{location}: {error}") from error


def text_field(value: Any, field: str, location: str) -> str:
    """`value` if it is a string that UTF-8 can encode. Raises `RequestError`, with `location`, if not."""
    try:
        return _text(value, field)
    except RequestError as error:
        raise RequestError(f"{location}: {error}") from error


def _request_and_references(fields: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    if not isinstance(fields, Mapping):
        raise RequestError(f"expected an object with the fields of a row, got {_kind(fields)}.")
    present = {key: value for key, value in fields.items() if value is not None}
    for form, read in (("instruction", _from_instruction), ("messages", _from_messages), ("prompt", _from_prompt)):
        if form in present:
            request, references = read(present)
            break
    else:
        keys = ", ".join(f"{key!r:.60}" for key in islice(present, 8)) or "no field that is not null"
        raise RequestError(f"expected {_FORMS}. Got {keys}.")
    if references and fields.get(_ENDED) is False:
        # `promptkd generate` marks a response that the length limit cut; an end token behind it would be untrue.
        raise RequestError(
            f"the response was cut at the length limit ({_ENDED!r} is false), so it cannot be used as a complete one. "
            "Regenerate the file with `promptkd generate --ended-only`, or drop such rows."
        )
    return request, references


def _from_instruction(fields: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    request = Instruction(
        _text(fields["instruction"], "instruction", may_be_empty=False), _text(fields.get("input", ""), "input")
    )
    output = fields.get("output")
    if output is None:
        return request, ()
    if isinstance(output, str):
        return request, (_text(output, "output"),)
    if not isinstance(output, list | tuple):
        raise RequestError(f"'output' must be a string or a list of strings, got {_kind(output)}.")
    if not output:
        raise RequestError("'output' is an empty list. Leave it out if the row has no reference.")
    return request, tuple(_text(each, f"output[{index}]") for index, each in enumerate(output))


def _from_messages(fields: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    messages = _messages(fields["messages"], "messages")
    references: tuple[str, ...] = ()
    if messages[-1]["role"] == "assistant":
        *messages, answer = messages
        references = (answer["content"],)
    return _request_messages(messages, "messages"), references


def _from_prompt(fields: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    prompt: Request
    if isinstance(fields["prompt"], str):
        prompt = _text(fields["prompt"], "prompt", may_be_empty=False)
    else:
        prompt = _request_messages(_messages(fields["prompt"], "prompt"), "prompt")
    completion = fields.get("completion")
    if completion is None:
        return prompt, ()
    if isinstance(completion, str):
        return prompt, (_text(completion, "completion"),)
    answer = _messages(completion, "completion")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer)
        raise RequestError(f"'completion' must hold one assistant message. Got messages from: {roles}.")
    return prompt, (answer[0]["content"],)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        expected = "a list of messages" if field == "messages" else "a string or a list of messages"
        raise RequestError(f"{field!r} must be {expected}, got {_kind(value)}.")
    if not value:
        raise RequestError(f"{field!r} must hold at least one message, got an empty list.")
    return [_message(each, f"{field}[{index}]") for index, each in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name!r} must be {{'role', 'content'}}, got {_kind(value)}.")
    message = {key: part for key, part in value.items() if part is not None}
    if message.get("role") not in _ROLES:
        got = f"{message['role']!r:.60}" if "role" in message else "none"
        raise RequestError(f"the role of {name!r} must be one of {', '.join(_ROLES)}. Got {got}.")
    if "content" not in message:
        raise RequestError(f"{name!r} has no content. Expected a string.")
    _text(message["content"], f"{name}.content")
    _check_characters(message, name)
    return message


def _request_messages(messages: list[Message], field: str) -> tuple[Message, ...]:
    last = messages[-1]["role"] if messages else "nobody"
    if last not in ("user", "tool"):
        raise RequestError(
            f"the request in {field!r} must end with a user (or tool) message, for the model answers it. Got {last}."
        )
    return tuple(messages)


def _text(value: Any, field: str, *, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{field!r} must be a string, got {_kind(value)}.")
    if not may_be_empty and not value.strip():
        raise RequestError(f"{field!r} is empty. Expected some text.")
    _check_characters(value, field)
    return value


def _check_characters(value: Any, field: str) -> None:
    """Refuse half of a surrogate pair in a text, or anywhere in what a chat template may read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{field!r} holds half of a surrogate pair ({value[error.start]!r}), which is no character. Save the "
                "file as valid UTF-8."
            ) from error
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_characters(key, field)
            _check_characters(part, field)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_characters(part, field)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or f"a value of type {type(value).__name__}"
