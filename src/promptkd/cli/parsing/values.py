"""A flag's text, or a value from a YAML file, becomes what the annotation of its field asks for."""

import math
import os
import types
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args

from promptkd.cli.parsing.annotations import choices, item_of, kind_of, members, spell
from promptkd.cli.parsing.config_file import parse_yaml
from promptkd.errors import RequestError

__all__ = ["LARGEST_INTEGER", "convert", "plain"]

LARGEST_INTEGER = 2**63 - 1
"""What counts and sizes are kept in further down."""
_LONGEST_NAME = 255
"""Bytes of a file's name, on every common file system."""


class _MismatchError(ValueError):
    """The value is not of the type that is being tried."""


def convert(value: Any, annotation: Any, *, default: Any = None) -> Any:
    """`value` as `annotation` asks. `value` is text, a list of texts (a flag with several values) or plain YAML data.

    `default` is the field's own: a text that equals it is kept, so that `report_to`, whose default is the text
    "none", does not become None. Raises ValueError if no member of the annotation takes the value.
    """
    kinds = {kind_of(member) for member in members(annotation)}
    if isinstance(value, str) and value == default:
        return value
    if types.NoneType in kinds and _says_none(value) and value not in choices(annotation):
        return None
    if Enum in kinds or (dict in kinds and _looks_like_mapping(value)):
        kinds.discard(str)  # else a misspelt choice and a broken mapping would pass as text
    elif str in kinds and isinstance(value, str):
        kinds.discard(dict)  # a file's name
    for kind, read in _READERS.items():
        for member in members(annotation):
            if kind in kinds and kind_of(member) is kind:
                try:
                    found = read(value, member)
                except _MismatchError:
                    continue
                return found.value if isinstance(found, Enum) and str in members(annotation) else found
    raise _MismatchError


def _boolean(value: Any, _: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise _MismatchError


def _integer(value: Any, _: Any) -> int:
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            number = int(value)
        except ValueError:
            raise _MismatchError from None
        if abs(number) <= LARGEST_INTEGER:
            return number
    raise _MismatchError


def _float(value: Any, _: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _MismatchError from None
        if math.isfinite(number):
            return number
    raise _MismatchError


def _text(value: Any, _: Any) -> str:
    if isinstance(value, str):
        return value
    raise _MismatchError


def _path(value: Any, _: Any) -> Path:
    if isinstance(value, str) and value and "\0" not in value:
        path = Path(value).expanduser()
        if all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts):
            return path
    raise _MismatchError


def _literal(value: Any, member: Any) -> Any:
    return _choice(value, {choice: choice for choice in get_args(member)})


def _enumeration(value: Any, member: Any) -> Enum:
    return _choice(value, {choice.value: choice for choice in member})


def _choice(value: Any, known: dict[Any, Any]) -> Any:
    for choice, result in known.items():
        if (type(value) is type(choice) and value == choice) or (isinstance(value, str) and value == spell(choice)):
            return result
    raise _MismatchError


def _mapping(value: Any, member: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_yaml(value, "")
        except RequestError:
            raise _MismatchError from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _MismatchError
    return {key: convert(part, item_of(member)) for key, part in value.items()}


def _list(value: Any, member: Any) -> list[Any]:
    return [convert(part, item_of(member)) for part in (value if isinstance(value, list) else [value])]


def _anything(value: Any, _: Any) -> Any:
    return value


_READERS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _boolean,
    int: _integer,
    float: _float,
    Literal: _literal,
    Enum: _enumeration,
    dict: _mapping,
    Path: _path,
    str: _text,
    list: _list,
    Any: _anything,
}
"""How each kind of type is read, in the order in which the members of a union are tried."""


def _says_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in ("none", "null"))


def _looks_like_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{"))


def plain(value: Any) -> Any:
    """`value` in the types that YAML and JSON know: paths as text, enumerations as their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value
