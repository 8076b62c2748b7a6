"""What a command takes: the fields of its options and of its training configuration, and what each admits, in words."""

import ast
import dataclasses
import importlib
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

MOST_CHOICES_SHOWN = 6  # longer lists of choices stand in the sentences of the help, not beside the flag
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


@dataclass(frozen=True)
class Field:
    """One option: a flag and a key of the configuration file."""

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


def training_fields(command: ModuleType) -> dict[str, Field]:
    """The fields of the command's training configuration, which is imported now; none if the command has none."""
    target = vars(command).get("TRAINING_CONFIG")
    if target is None:
        return {}
    module, _, name = target.partition(":")
    return _fields(getattr(importlib.import_module(module), name))


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
    for node in _definitions(command):
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


def _definitions(command: ModuleType) -> Iterator[ast.stmt]:
    """The statements of the files that a command's `SETTINGS_SOURCES` name."""
    spec = find_spec(re.split("[.:]", command.TRAINING_CONFIG)[0])
    assert spec is not None
    assert spec.origin is not None
    for pattern in command.SETTINGS_SOURCES:
        for file in sorted(Path(spec.origin).parent.glob(pattern)):
            yield from ast.parse(file.read_text(encoding="utf-8")).body


def _evaluated(annotation: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(annotation), "", "eval"), names)  # our own source


def kinds_of(annotation: Any) -> dict[Any, Any]:
    """The members of a union, or the annotation alone, by the type that decides how each is read.

    That is `list` for list[int], `Literal` for a literal and `Enum` for an enumeration.
    """
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return {
        Enum if isinstance(each, type) and issubclass(each, Enum) else get_origin(each) or each: each
        for each in members
    }


def item_of(member: Any) -> Any:
    """The type of a list's items or a mapping's values; Any if the annotation does not say."""
    return get_args(member)[-1] if get_args(member) else Any


def choices(annotation: Any) -> dict[str, Any]:
    """What a Literal or an enumeration admits, by the text that stands for it; nothing for other types."""
    kinds = kinds_of(annotation)
    literal = {
        str(each).lower() if each is None or isinstance(each, bool) else str(each): each
        for each in get_args(kinds.get(Literal))
    }
    return literal | {str(each.value): each for each in kinds.get(Enum, ())}


def describe(annotation: Any) -> str:
    """What a field takes, in words, for error messages."""
    return " or ".join(words for words, _ in _words(annotation))


def metavar(annotation: Any) -> str:
    """What stands for a field's value in the help, such as `INTEGER` or `PATH [PATH ...]`."""
    return "|".join(short for _, short in _words(annotation) if short)


def _words(annotation: Any) -> Iterator[tuple[str, str]]:
    """What each member of a union takes, in an error message and in the help; an enumeration's texts are its names."""
    kinds, admitted = kinds_of(annotation), choices(annotation)
    if admitted:
        yield f"one of {', '.join(admitted)}", "|".join(admitted) if len(admitted) <= MOST_CHOICES_SHOWN else "NAME"
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
