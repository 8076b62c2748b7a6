"""Messages as data sets spell them, read into OpenAI's form, which chat templates know.

Roles may be ShareGPT's ("from", "value"; human, gpt, function_call, observation), text may come in parts, tool calls
flat or nested, their arguments as an object or as its JSON. A null field counts as missing.
"""

import json
from collections.abc import Mapping
from typing import Any

from promptkd.errors import RequestError
from promptkd.io.files import json_value

Message = dict[str, Any]  # {"role": str, "content": str or parts of text}, and whatever else the chat template reads

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of an answer's reasoning, as different APIs call it
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPELLED = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}
_MEDIA = ("image", "video", "audio")


def read_messages(value: Any, field: str) -> list[Message]:
    """`value`, a list of messages or its JSON. `RequestError` that names the message which is wrong."""
    if isinstance(value, str):
        value = from_json(value)
    if not isinstance(value, list | tuple):
        expected = "a string or a list of messages" if field == "prompt" else "a list of messages"
        raise RequestError(f"{field!r} must be {expected}, got {kind(value)}.")
    if not value:
        raise RequestError(f"{field!r} must hold at least one message, got an empty list.")
    return [_message(each, f"{field}[{index}]") for index, each in enumerate(value)]


def content_text(message: Message) -> str:
    """The text of a message, its parts a line each; "" for one that has calls or reasoning alone."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def read_tools(value: Any) -> tuple[Any, ...]:
    """Tools as JSON schemas {"type": "function", "function": {...}}: a list, its JSON, or bare functions."""
    value = from_json(value) if isinstance(value, str) and value.strip() else value
    if isinstance(value, Mapping):
        value = [value]
    if value is None or value == "":
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(f"'tools' must be a list of JSON schemas, or its JSON, got {kind(value)}.")
    tools: list[Any] = []
    for index, each in enumerate(value):
        each = from_json(each) if isinstance(each, str) else each
        if callable(each):  # transformers makes its schema
            tools.append(each)
        elif isinstance(each, Mapping) and ("function" in each or "name" in each):
            each = without_nulls(each)
            tools.append(each if "function" in each else {"type": "function", "function": each})
        else:
            expected = '{"type": "function", "function": {"name", "description", "parameters"}}'
            raise RequestError(f"'tools[{index}]' must be {expected}, got {kind(each)}.")
    check_characters([each for each in tools if not callable(each)], "tools")
    return tuple(tools)


def from_json(text: str) -> Any:
    """What the JSON `text` holds; `text` itself where it is no JSON."""
    try:
        return json_value(text)
    except ValueError:
        return text


def without_nulls(value: Any) -> Any:
    """`value` without the null fields of its objects: a table of structs gives each the fields of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def check_characters(value: Any, field: str) -> None:
    """Refuse half of a surrogate pair in a text, or anywhere in what a chat template may read."""
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        problem = f"holds half of a surrogate pair ({half!r}), which is no character"
        raise RequestError(f"{field!r} {problem}. Save the file as valid UTF-8.") from error


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or f"a value of type {type(value).__name__}"


def _message(each: Any, name: str) -> Message:
    if not isinstance(each, Mapping):
        raise RequestError(f"{name!r} must be {{'role', 'content'}}, got {kind(each)}.")
    given = {key: part for key, part in each.items() if part is not None and not (key in REASONING and part == "")}
    if "role" not in given and "from" in given:
        given = {{"from": "role", "value": "content"}.get(key, key): part for key, part in given.items()}
    spelled = given.get("role")
    role = _SPELLED.get(spelled, spelled) if isinstance(spelled, str) else spelled
    if role not in _ROLES:
        got = f"{spelled!r:.60}" if "role" in given else "none"
        raise RequestError(f"the role of {name!r} must be one of {', '.join(_ROLES)}. Got {got}.")
    message = {"role": role, **{key: part for key, part in given.items() if key != "role"}}
    if spelled == "function_call":
        message["tool_calls"] = from_json(message.pop("content", ""))
    if role == "assistant":
        _read_calls(message, name)
    if "content" in message:
        message["content"] = _content(message["content"], f"{name}.content")
    elif not (message.get("tool_calls") or any(message.get(field) for field in REASONING)):
        raise RequestError(f"{name!r} has no content. Expected a string.")
    for field in REASONING:
        if field in message and not isinstance(message[field], str):
            raise RequestError(f"'{name}.{field}' must be a string, got {kind(message[field])}.")
    check_characters(message, name)
    return message


def _content(value: Any, name: str) -> str | list[dict[str, str]]:
    """A text, or several parts of text."""
    if isinstance(value, str):
        check_characters(value, name)
        return value
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name!r} must be a string, or a list of text parts, got {kind(value)}.")
    parts = []
    for index, each in enumerate(value):
        each = {"type": "text", "text": each} if isinstance(each, str) else each
        found = str(each.get("type", "text")) if isinstance(each, Mapping) else kind(each)
        if any(medium in found for medium in _MEDIA):
            raise RequestError(f"'{name}[{index}]' is an {found}, and models are trained on text alone. Leave it out.")
        if found != "text" or not isinstance(each.get("text"), str):
            expected = 'must be {"type": "text", "text": a string}'
            raise RequestError(f"'{name}[{index}]' {expected}, got a part of type {found!r:.60}.")
        parts.append({"type": "text", "text": each["text"]})
    return parts if len(parts) > 1 else "".join(part["text"] for part in parts)


def _read_calls(message: Message, name: str) -> None:
    """Bring tool calls into the form {"type": "function", "function": {"name", "arguments": an object}}."""
    calls = message.pop("tool_calls", None)
    if "function_call" in message:  # OpenAI's older form, of one call
        calls = [message.pop("function_call")]
    calls = from_json(calls) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not calls:
        return
    expected = '{"function": {"name", "arguments"}}'
    if not isinstance(calls, list | tuple):
        raise RequestError(f"the tool calls of {name!r} must be a list of {expected}, got {kind(calls)}.")
    read = []
    for each in calls:
        each = from_json(each) if isinstance(each, str) else each
        nested = each.get("function") if isinstance(each, Mapping) else None
        function = nested if isinstance(nested, Mapping) else each
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"a tool call of {name!r} must be {expected}, got {each!r:.80}.")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = from_json(arguments) if isinstance(arguments, str) else arguments
        call = {"id": each["id"]} if isinstance(each.get("id"), str) else {}
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        read.append({**call, "type": "function", "function": function})
    message["tool_calls"] = read
