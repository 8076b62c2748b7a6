"""What a command takes: the fields of its options and of its training configuration, with their help."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_type_hints

from promptkd.settings import docs_of, field_docs


@dataclass(frozen=True)
class Field:
    """One option: a flag and a key of the configuration file."""

    name: str
    annotation: Any
    required: bool
    default: Any
    help: str
    limits: Mapping[str, Any]
    """`at_least`, `at_most` and `above` of `promptkd.settings.option`; of a list, those of its items."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


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


def common_fields(command: ModuleType) -> list[Field]:
    """The training fields in common use, read from the source of their classes: importing those takes seconds.

    `SETTINGS_SOURCES` are patterns of files beside the package of `TRAINING_CONFIG`; of two fields the later one wins.
    """
    wanted: tuple[str, ...] = vars(command).get("COMMON_TRAINING_FLAGS", ())
    types: dict[str, Any] = {"Literal": Literal}
    found: dict[str, Field] = {}
    methods: list[str] = []
    for node in _definitions(command):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id="Literal"))):
                types[name] = _evaluated(node.value, types)
            case ast.ClassDef():
                docs = field_docs(node)
                for part in node.body:
                    match part:
                        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name in wanted:
                            annotation = _evaluated(part.annotation, types)
                            found[name] = Field(name, annotation, False, _literal(value), docs[name], {})
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


def _literal(value: ast.expr) -> Any:
    """Of `name: int = 7` and of `name: int = option(7, ...)`."""
    return ast.literal_eval(value.args[0] if isinstance(value, ast.Call) else value)


def positional(command: ModuleType) -> str | None:
    """The name of the option that takes the arguments which follow no flag, if the command has one."""
    return vars(command).get("POSITIONAL")


@cache
def _fields(owner: type) -> dict[str, Field]:
    annotations, docs = get_type_hints(owner), docs_of(owner)
    return {
        field.name: Field(
            name=field.name,
            annotation=annotations[field.name],
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            default=_default(field),
            help=" ".join((field.metadata.get("help") or docs.get(field.name, "")).split()),
            limits=field.metadata,
        )
        for field in dataclasses.fields(owner)
        if field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
