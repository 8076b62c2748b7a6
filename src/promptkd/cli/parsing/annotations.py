"""What the annotation of a field admits, and how the help and the error messages put it into words."""

import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

__all__ = [
    "MOST_CHOICES_SHOWN",
    "choices",
    "describe",
    "item_of",
    "kind_of",
    "members",
    "metavar",
    "spell",
    "takes_switch",
    "takes_values",
]

MOST_CHOICES_SHOWN = 6
"""Longer lists of choices stand in the sentences of the help, not beside the flag."""


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation alone if it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def takes_switch(annotation: Any) -> bool:
    """Whether the flag may stand alone (`--packing`) and be negated (`--no-packing`)."""
    return bool in members(annotation)


def takes_values(annotation: Any) -> bool:
    """Whether the flag takes several values."""
    return any(kind_of(member) is list for member in members(annotation))


def choices(annotation: Any) -> tuple[str, ...]:
    """The texts that a Literal or an enumeration admits; none for other types."""
    found: list[str] = []
    for member in members(annotation):
        if kind_of(member) is Literal:
            found += [spell(choice) for choice in get_args(member)]
        elif kind_of(member) is Enum:
            found += [str(choice.value) for choice in member]
    return tuple(found)


def kind_of(member: Any) -> Any:
    """The type that decides how a member of a union is read: `list` for list[int], `Enum` for an enumeration."""
    if isinstance(member, type) and issubclass(member, Enum):
        return Enum
    return get_origin(member) or member


def item_of(member: Any) -> Any:
    """What a list holds, or a mapping as its values; anything, if its annotation does not say."""
    return get_args(member)[-1] if get_args(member) else Any


def spell(choice: Any) -> str:
    """`choice` as it is written on the command line and in YAML."""
    return str(choice).lower() if choice is None or isinstance(choice, bool) else str(choice)


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    Path: "a path",
    dict: 'a mapping such as {"key": 1}',
    types.NoneType: "none",
    Any: "a value",
}
_METAVARS = {
    str: "TEXT",
    int: "INTEGER",
    float: "NUMBER",
    bool: "true|false",
    Path: "PATH",
    dict: "MAPPING",
    types.NoneType: "none",
    Any: "VALUE",
}


def describe(annotation: Any) -> str:
    """What a field takes, in words, for error messages."""
    admitted = choices(annotation)
    words = [f"one of {', '.join(admitted)}"] if admitted else []
    for member in members(annotation):
        kind = kind_of(member)
        if kind is list:
            words.append(f"one or more values, each {describe(item_of(member))}")
        elif kind in _WORDS and not (kind is str and _has_enum(annotation)):
            words.append(_WORDS[kind])
        elif kind not in (Literal, Enum, str):
            words.append(f"a Python object ({member.__name__}) that neither a flag nor a file can give")
    return " or ".join(words)


def metavar(annotation: Any) -> str:
    """What stands for a field's value in the help, such as `INTEGER` or `PATH [PATH ...]`."""
    admitted = choices(annotation)
    short = len(admitted) <= MOST_CHOICES_SHOWN
    parts = ["|".join(admitted) if short else "NAME"] if admitted else []
    for member in members(annotation):
        kind = kind_of(member)
        if kind is list:
            item = metavar(item_of(member))
            parts.append(f"{item} [{item} ...]")
        elif kind in _METAVARS and not (kind is str and _has_enum(annotation)):
            parts.append(_METAVARS[kind])
    return "|".join(parts)


def _has_enum(annotation: Any) -> bool:
    return any(kind_of(member) is Enum for member in members(annotation))
