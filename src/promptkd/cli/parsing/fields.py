"""What a command takes: the fields of its options and of its training configuration, with their help."""

import dataclasses
import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

from promptkd.settings import docs_of


@dataclass(frozen=True)
class Field:
    """One option: a flag and a key of the configuration file."""

    name: str
    annotation: Any
    required: bool
    default: Any
    help: str

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
        )
        for field in dataclasses.fields(owner)
        if field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
