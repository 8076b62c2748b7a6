"""Settings as dataclasses: limits declared with each field, several classes as one flat class, and what a run reads.

A docstring under a field is its help. The command line looks for it here, so torch is not imported.
"""

import ast
import inspect
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from promptkd.errors import RequestError, check_all

T = TypeVar("T")


def option(
    default: Any, *, at_least: float | None = None, at_most: float | None = None, above: float | None = None
) -> Any:
    limits = {"at_least": at_least, "at_most": at_most, "above": above}
    return field(default=default, metadata={name: limit for name, limit in limits.items() if limit is not None})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the frozen dataclasses of settings. Raises `RequestError` with every value outside of its limits."""

    def __post_init__(self) -> None:
        check_all("Wrong settings", limit_checks(self))


def limit_checks(settings: Any) -> list[tuple[bool, str]]:
    """For `check_all`: the fields of a dataclass whose value exceeds a limit or is none of their choices, in words."""
    checks, hints = [], get_type_hints(type(settings))
    for each in fields(settings):
        value, annotation = vars(settings)[each.name], hints[each.name]
        literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        if value is not None or NoneType not in get_args(annotation):
            admitted = f"must be one of {', '.join(map(str, choices))}"
            expected = admitted if choices and value not in choices else beyond_limits(each.metadata, value)
            checks.append((expected != "", f"{each.name} {expected}, got {value!r}"))
    return checks


def no_effect(settings: Any, of: type, instead: Mapping[str, str]) -> list[tuple[bool, str]]:
    """For `check_all`: fields of a class `of` TRL that are given and that nothing reads, with what to do instead."""
    declared = {each.name: each.default for each in fields(of)}
    return [
        (vars(settings)[name] != declared[name], f"{name} has no effect here: {advice}")
        for name, advice in instead.items()
    ]


def beyond_limits(limits: Mapping[str, Any], value: Any) -> str:
    """What a value must be, where it exceeds a limit of its field's metadata: "must be at least 1"; else nothing."""
    least, most, above = (limits.get(name) for name in ("at_least", "at_most", "above"))
    number = math.nan if value is None else value  # of a field that needs a value: within no limits
    if above is not None and most is not None:
        return "" if above < number <= most else f"must lie above {above} and at most at {most}"
    if least is not None and most is not None:
        return "" if least <= number <= most else f"must lie in [{least}, {most}]"
    if least is not None and not number >= least:
        return "must be 0 or more" if least == 0 else f"must be at least {least}"
    return f"must be above {above}" if above is not None and not number > above else ""


def flat(name: str, owners: Iterable[type]) -> type:
    """A dataclass with all fields of `owners` and their help; a field that several have must be alike in all."""
    declared: dict[str, tuple[str, Any, Any]] = {}
    for owner in owners:
        hints, docs = get_type_hints(owner), docs_of(owner)
        for each in fields(owner):
            metadata = {"help": docs.get(each.name, ""), **each.metadata}
            new = (each.name, hints[each.name], field(default=each.default, metadata=metadata))
            known = declared.setdefault(each.name, new)
            if (known[1], known[2].default) != (new[1], each.default):
                raise TypeError(f"{owner.__name__}.{each.name} has another type or default than elsewhere.")
    return make_dataclass(name, declared.values(), kw_only=True, namespace={"_is_flat": True})


class Reader:
    """Takes settings out of a flat object that holds those of many classes, and keeps account of what was taken."""

    def __init__(self, values: Any):
        self._values = vars(values)
        self.read: set[str] = set()  # the names of those that were taken

    def __call__(self, owner: type[T]) -> T:
        """The part of the values that is an `owner`; a field that is not among them keeps its default."""
        names = [each.name for each in fields(owner)]  # type: ignore[arg-type]
        self.read.update(names)
        return owner(**{name: self._values[name] for name in names if name in self._values})

    def read_equal(self, settings: Any) -> None:
        """Count the values that `settings`, made elsewhere, shares as read."""
        self.read.update(name for name, value in vars(settings).items() if self._values.get(name) == value)

    def refuse_unread(self, reader: str, owners: Iterable[type]) -> None:
        """Refuse fields of `owners` whose value is not the default and that nobody took; `reader` should have."""
        declared = {each.name: each.default for owner in owners for each in fields(owner)}
        unread = [
            name
            for name in declared
            if name not in self.read and self._values.get(name, declared[name]) != declared[name]
        ]
        if unread:
            it = "it" if len(unread) == 1 else "them"
            own = sorted(read for read in self.read for name in unread if read.endswith(f"_{name}"))
            meant = f", or do you mean {' and '.join(own)}?" if own else "."
            raise RequestError(f"{reader} takes no {', '.join(unread)}. Leave {it} out{meant}")


def warn_of_old_name(old: str, new: str, stacklevel: int = 2) -> None:
    text = f"{old} is deprecated; write {new}. The old form goes with the next version."
    warnings.warn(text, FutureWarning, stacklevel + 1)


def accept_old_name(cls: type, old: str, new: str) -> None:
    """Let a class that defines `old` serve those who ask for `new`, with a warning. For `__init_subclass__`."""
    if old in vars(cls):
        warn_of_old_name(f"{cls.__qualname__}.{old}", new, stacklevel=3)
        setattr(cls, new, vars(cls)[old])


def docs_of(owner: type) -> dict[str, str]:
    """The docstring under each field, in `owner` and the dataclasses that it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if "__dataclass_fields__" in vars(base) and "_is_flat" not in vars(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            docs |= field_docs(definition)
    return docs


def field_docs(definition: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for declared, text in zip(definition.body, definition.body[1:], strict=False):  # neighbors
        match declared, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs
