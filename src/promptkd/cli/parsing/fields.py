"""The fields of a command's options and training configuration: what each admits, in words, and how it is read."""

import ast
import dataclasses
import importlib
import math
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from promptkd.settings import docs_of, field_docs

_MOST_CHOICES_SHOWN = 6  # longer lists of choices stand in the sentences of the help, not beside the flag
LARGEST_INTEGER = 2**63 - 1  # counts and sizes are 64-bit integers further down
_LONGEST_NAME = 255  # bytes of a file's name, on every common file system
_ORDER = (bool, int, float, Literal, Enum, dict, Path, str, list, Any)  # in which members of a union are tried
_WORDS = {  # each type in error messages, and beside its flag in the help
    str: ("text", "TEXT"),
    int: ("a whole number", "INTEGER"),
    float: ("a finite number", "NUMBER"),
    bool: ("true or false", "true|false"),
    Path: ("a path", "PATH"),
    dict: ('a mapping such as {"key": 1}', "MAPPING"),
    types.NoneType: ("none", "none"),
    Any: ("a value", "VALUE"),
}


@dataclass(frozen=True)
class Field:
    name: str
    annotation: Any
    required: bool
    default: Any
    help: str
    limits: Mapping[str, Any]  # those of `promptkd.settings.option`; of a list, its items'

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand alone (`--packing`) and be negated (`--no-packing`)."""
        return bool in kinds_of(self.annotation)

    @property
    def takes_several(self) -> bool:
        return list in kinds_of(self.annotation)


def own_fields(command: ModuleType) -> dict[str, Field]:
    """The fields of the command's `Options`: its own class's in their order, then those of the classes it inherits."""
    known, owners = _fields(command.Options), command.Options.__mro__
    names = dict.fromkeys(name for owner in owners for name in vars(owner).get("__annotations__", ()))
    return {name: known[name] for name in names if name in known}


def positional_names(command: ModuleType) -> tuple[str, ...]:
    """The options that take the arguments which follow no flag, in their order."""
    named: str | tuple[str, ...] = vars(command).get("POSITIONAL", ())
    return (named,) if isinstance(named, str) else named


def training_fields(command: ModuleType) -> dict[str, Field]:
    """The fields of the command's training configuration, which is imported now; none if the command has none."""
    module, _, name = vars(command).get("TRAINING_CONFIG", "").partition(":")
    return _fields(getattr(importlib.import_module(module), name)) if module else {}


@cache
def _fields(owner: type) -> dict[str, Field]:
    annotations, docs, missing = get_type_hints(owner), docs_of(owner), dataclasses.MISSING
    found = {}
    for each in dataclasses.fields(owner):
        if each.init:
            default = each.default if each.default_factory is missing else each.default_factory()
            text = " ".join((each.metadata.get("help") or docs.get(each.name, "")).split())
            is_required, kept = default is missing, None if default is missing else default
            found[each.name] = Field(each.name, annotations[each.name], is_required, kept, text, each.metadata)
    return found


def common_fields(command: ModuleType) -> list[Field]:
    """The training fields in common use, read from the source of their classes: importing those takes seconds.

    `SETTINGS_SOURCES` are patterns of files beside the package of `TRAINING_CONFIG`; of two fields the later one wins.
    """
    wanted: tuple[str, ...] = vars(command).get("COMMON_TRAINING_FLAGS", ())
    names: dict[str, Any] = {"Literal": Literal}
    found: dict[str, Field] = {}
    methods: list[str] = []
    spec = find_spec(re.split("[.:]", command.TRAINING_CONFIG)[0])
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    files = [file for pattern in command.SETTINGS_SOURCES for file in sorted(folder.glob(pattern))]
    for node in (node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id="Literal"))):
                names[name] = _evaluated(node.value, names)
            case ast.ClassDef():
                docs = field_docs(node)
                for part in node.body:
                    match part:
                        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name in wanted:
                            # of `name: int = 7` and of `name: int = option(7, ...)`
                            default = ast.literal_eval(value.args[0] if isinstance(value, ast.Call) else value)
                            annotation = _evaluated(part.annotation, names)
                            found[name] = Field(name, annotation, False, default, docs[name], {})
                        case ast.Assign(targets=[ast.Name(id="name")], value=ast.Constant(value=str(method))):
                            methods.append(method)
    if "method" in found:
        found["method"] = dataclasses.replace(found["method"], annotation=Literal[tuple(methods)])
    return [found[name] for name in wanted]


def _evaluated(annotation: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(annotation), "", "eval"), names)  # our own source


def kinds_of(annotation: Any) -> dict[Any, Any]:
    """The members of a union, or the annotation alone, by the type that decides how each is read: `list`, `Literal`."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    enums = [each for each in members if isinstance(each, type) and issubclass(each, Enum)]
    return {Enum if each in enums else get_origin(each) or each: each for each in members}


def item_of(member: Any) -> Any:
    """The type of a list's items or a mapping's values; Any if the annotation does not say."""
    return get_args(member)[-1] if get_args(member) else Any


def choices(annotation: Any) -> dict[str, Any]:
    """What a Literal or an enumeration admits, by the text that stands for it; nothing for other types."""
    kinds, named = kinds_of(annotation), (bool, types.NoneType)
    members = get_args(kinds.get(Literal))
    literal = {str(each).lower() if isinstance(each, named) else str(each): each for each in members}
    return literal | {str(each.value): each for each in kinds.get(Enum, ())}


def describe(annotation: Any) -> str:
    """What a field takes, in words, for error messages."""
    return " or ".join(words for words, _ in _words(annotation))


def metavar(annotation: Any) -> str:
    """What stands for a field's value in the help, such as `INTEGER` or `PATH [PATH ...]`."""
    return "|".join(short for _, short in _words(annotation) if short)


def _words(annotation: Any) -> Iterator[tuple[str, str]]:
    """What each member of a union takes, in an error message and in the help; an enumeration lists its texts."""
    kinds, admitted = kinds_of(annotation), choices(annotation)
    if admitted:
        yield f"one of {', '.join(admitted)}", "|".join(admitted) if len(admitted) <= _MOST_CHOICES_SHOWN else "NAME"
    for kind, member in kinds.items():
        if kind is list:
            item = item_of(member)
            yield f"one or more values, each {describe(item)}", f"{metavar(item)} [{metavar(item)} ...]"
        elif kind in _WORDS and not (kind is str and Enum in kinds):
            yield _WORDS[kind]
        elif kind not in (Literal, Enum, str):
            yield f"a Python object ({member.__name__}) that neither a flag nor a file can give", ""


def plain(value: Any) -> Any:
    """`value` in the types of YAML and JSON: paths as text, enumerations as their values."""
    if isinstance(value, Enum | Path):
        return value.value if isinstance(value, Enum) else str(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if one is."""
    import difflib  # most commands need no guess

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def convert(value: Any, annotation: Any, *, default: Any = None) -> Any:
    """`value`, which is text, a list of texts (a flag with several values) or plain YAML data, as `annotation` asks.

    A text that equals the field's `default` is kept: that of `report_to` is the text "none". Raises ValueError if no
    member of the annotation takes the value.
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
    """`value` as one member of a union. Raises ValueError or OverflowError if that does not take it."""
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
        from promptkd.cli.parsing.config_file import parse_yaml  # PyYAML, which no help needs

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
