"""Lists and objects in the cells of a CSV file: messages and references, which are JSON text there."""

import re
from collections.abc import Mapping
from typing import Any

from promptkd.data.messages import from_json
from promptkd.errors import RequestError

_PLAIN = ("prompt", "completion", "chosen", "response", "output", "answer", "answers")
_MESSAGES = re.compile(r"""\s*\[\s*\{.*['"](role|from)['"]\s*:""", re.DOTALL)
_REFERENCES = re.compile(r"""\s*(\[|\{\s*['"]text['"]\s*:)""")


class Cell(str):
    """The text of a CSV file's cell."""


def cell_value(name: str, value: Any) -> Any:
    """What the column `name` of a row holds: of a `Cell` its messages or references, any other text as it is.

    In a column that may be plain text, a list is read if it is one of messages, and an object if it is SQuAD's
    {"text": [...]}; `answers` may be any list. `RequestError` for Python's way of writing them, which is no JSON.
    """
    if not isinstance(value, Cell):
        return value
    text = str(value)
    if name == "ended":  # as Python, JSON and tables write it
        return text.strip().lower() not in ("false", "0")
    is_messages = name in _PLAIN and _MESSAGES.match(text) is not None
    if not is_messages and not (name in _PLAIN and _REFERENCES.match(text)):
        return text
    found = from_json(text)
    if isinstance(found, str) and (is_messages or name == "answers"):
        advice = "Write it as JSON text, or the file as JSONL"
        raise RequestError(f"{name!r} holds a list or an object that is not valid JSON: {text!r:.80}. {advice}.")
    return found if is_messages or name == "answers" or _is_squad(found) else text


def _is_squad(found: Any) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get("text"), list) and {*found} <= {"text", "answer_start"}
