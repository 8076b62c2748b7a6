"""Converts a flag's text, or a value from a YAML file, into the type of its field."""

import math
import os
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from promptkd.cli.parsing.config_file import parse_yaml
from promptkd.cli.parsing.fields import choices, item_of, kinds_of

LARGEST_INTEGER = 2**63 - 1  # counts and sizes are 64-bit integers further down
_LONGEST_NAME = 255  # bytes of a file's name, on every common file system
_ORDER = (bool, int, float, Literal, Enum, dict, Path, str, list, Any)
"""The order in which the members of a union are tried."""


def convert(value: Any, annotation: Any, *, default: Any = None) -> Any:
    """`value`, which is text, a list of texts (a flag with several values) or plain YAML data, as `annotation` asks.

    `default` is the field's own: a text that equals it is kept, so that `report_to`, whose default is the text
    "none", does not become None. Raises ValueError if no member of the annotation takes the value.
    """
    kinds, is_text = kinds_of(annotation), isinstance(value, str)
    if is_text and value == default:
        return value
    says_none = value is None or (is_text and value.lower() in ("none", "null"))
    if types.NoneType in kinds and says_none and value not in choices(annotation):
        return None
    untried: Any = dict if is_text and str in kinds else None  # a text may be the name of a file
    if Enum in kinds or (dict in kinds and (isinstance(value, dict) or (is_text and value.lstrip().startswith("{")))):
        untried = str  # else a misspelled choice or a broken mapping would pass as text
    for kind in _ORDER:
        if kind in kinds and kind is not untried:
            try:
                found = _read(value, kind, kinds[kind])
            except (ValueError, OverflowError):
                continue
            return found.value if isinstance(found, Enum) and str in kinds else found
    raise ValueError(f"expected {annotation}, got {value!r}")


def _read(value: Any, kind: Any, member: Any) -> Any:
    """`value` as one member of a union. Raises ValueError or OverflowError if it does not take it."""
    is_text = isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any or (kind is str and is_text):
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is int and (is_text or (is_number and isinstance(value, int))) and abs(int(value)) <= LARGEST_INTEGER:
        return int(value)
    if kind is float and (is_text or is_number) and math.isfinite(float(value)):
        return float(value)
    if kind in (Literal, Enum):
        for spelled, choice in choices(member).items():
            wanted = choice.value if isinstance(choice, Enum) else choice
            if value == spelled or (type(value) is type(wanted) and value == wanted):
                return choice
    if kind is dict:
        mapping = parse_yaml(value, "") if is_text else value
        if isinstance(mapping, dict) and all(isinstance(key, str) for key in mapping):
            return {key: convert(part, item_of(member)) for key, part in mapping.items()}
    if kind is Path and is_text and value and "\0" not in value:
        path = Path(value).expanduser()
        if all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts):
            return path
    if kind is list:
        return [convert(part, item_of(member)) for part in (value if isinstance(value, list) else [value])]
    raise ValueError
