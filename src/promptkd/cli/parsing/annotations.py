"""What the annotation of a field admits, and how the help and the error messages put it into words."""

import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

MOST_CHOICES_SHOWN = 6
"""Longer lists of choices stand in the sentences of the help, not beside the flag."""
_WORDS = {
    str: ("text", "TEXT"),
    int: ("a whole number", "INTEGER"),
    float: ("a finite number", "NUMBER"),
    bool: ("true or false", "true|false"),
    Path: ("a path", "PATH"),
    dict: ('a mapping such as {"key": 1}', "MAPPING"),
    types.NoneType: ("none", "none"),
    Any: ("a value", "VALUE"),
}
"""Each type in error messages, and beside its flag in the help."""


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation alone if it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def kind_of(member: Any) -> Any:
    """The type that decides how a member of a union is read: `list` for list[int], `Enum` for an enumeration."""
    if isinstance(member, type) and issubclass(member, Enum):
        return Enum
    return get_origin(member) or member


def item_of(member: Any) -> Any:
    """The type of a list's items or a mapping's values; Any if the annotation does not say."""
    return get_args(member)[-1] if get_args(member) else Any


def takes_switch(annotation: Any) -> bool:
    """Whether the flag may stand alone (`--packing`) and be negated (`--no-packing`)."""
    return bool in members(annotation)


def takes_values(annotation: Any) -> bool:
    """Whether the flag takes several values."""
    return any(kind_of(member) is list for member in members(annotation))


def choices(annotation: Any) -> dict[str, Any]:
    """What a Literal or an enumeration admits, by the text that stands for it; nothing for other types."""
    found: dict[str, Any] = {}
    for member in members(annotation):
        if kind_of(member) is Literal:
            found |= {_spelled(choice): choice for choice in get_args(member)}
        elif kind_of(member) is Enum:
            found |= {str(choice.value): choice for choice in member}
    return found


def describe(annotation: Any) -> str:
    """What a field takes, in words, for error messages."""
    admitted = choices(annotation)
    words = [f"one of {', '.join(admitted)}"] if admitted else []
    for member in _unnamed(annotation):
        if kind_of(member) is list:
            words.append(f"one or more values, each {describe(item_of(member))}")
        elif kind_of(member) in _WORDS:
            words.append(_WORDS[kind_of(member)][0])
        else:
            words.append(f"a Python object ({member.__name__}) that neither a flag nor a file can give")
    return " or ".join(words)


def metavar(annotation: Any) -> str:
    """What stands for a field's value in the help, such as `INTEGER` or `PATH [PATH ...]`."""
    admitted = choices(annotation)
    parts = ["|".join(admitted) if len(admitted) <= MOST_CHOICES_SHOWN else "NAME"] if admitted else []
    for member in _unnamed(annotation):
        if kind_of(member) is list:
            item = metavar(item_of(member))
            parts.append(f"{item} [{item} ...]")
        elif kind_of(member) in _WORDS:
            parts.append(_WORDS[kind_of(member)][1])
    return "|".join(parts)


def plain(value: Any) -> Any:
    """`value` in the types of YAML and JSON: paths as text, enumerations as their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if one is."""
    import difflib  # most commands need no guess

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _unnamed(annotation: Any) -> list[Any]:
    """The members that are no list of choices; text is not among them beside an enumeration, whose names it holds."""
    named = {Literal, Enum} | ({str} if any(kind_of(each) is Enum for each in members(annotation)) else set())
    return [each for each in members(annotation) if kind_of(each) not in named]


def _spelled(choice: Any) -> str:
    """`choice` as it is written on the command line and in YAML."""
    return str(choice).lower() if choice is None or isinstance(choice, bool) else str(choice)
