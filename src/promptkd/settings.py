"""Settings as dataclasses: limits declared with each field, several classes as one flat class, and what a run reads.

A docstring under a field is its help. The command line looks for it here, so torch is not imported.
"""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, make_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from promptkd.errors import RequestError

T = TypeVar("T")


def option(
    default: Any,
    text: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with limits, which None never exceeds, and its help if no docstring stands under it."""
    known = {"help": text or None, "at_least": at_least, "at_most": at_most, "above": above}
    return field(default=default, metadata={name: value for name, value in known.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the frozen dataclasses of settings: a value outside of its limits is refused.

    Raises:
        RequestError: with everything that is wrong.
    """

    def __post_init__(self) -> None:
        refuse(problems(self))


def problems(settings: Any) -> list[str]:
    """The fields of a dataclass whose value exceeds a limit or is none of their choices, in words."""
    owner: type = type(settings)
    hints, values = _hints(owner), vars(settings)
    found = (_problem(each, hints[each.name], values[each.name]) for each in fields(settings))
    return [text for text in found if text]


def _problem(declared: Field[Any], annotation: Any, value: Any) -> str:
    limits: MappingProxyType[str, float] = declared.metadata
    least, most, above = (limits.get(name) for name in ("at_least", "at_most", "above"))
    expected = ""
    if value is None:
        return ""
    if (choices := choices_of(annotation)) and value not in choices:
        return f"{declared.name} must be one of {', '.join(map(str, choices))}, got {value!r}"
    if least is not None and most is not None and not least <= value <= most:
        expected = f"lie in [{least}, {most}]"
    elif least is not None and not value >= least:
        expected = "be 0 or more" if least == 0 else f"be at least {least}"
    elif above is not None and not value > above:
        expected = f"be above {above}"
    return f"{declared.name} must {expected}, got {value}" if expected else ""


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal that is the annotation or a member of its union."""
    members = (annotation, *get_args(annotation))
    return tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))


def refuse(wrong: Iterable[str]) -> None:
    """Raise a `RequestError` that lists what is wrong, if anything is."""
    if listed := "; ".join(wrong):
        raise RequestError(f"Wrong settings: {listed}.")


def flat(name: str, owners: Iterable[type]) -> type:
    """A dataclass with all fields of `owners` and their docstrings; a field that several have must be alike in all."""
    merged: dict[str, tuple[Any, Field[Any]]] = {}
    for owner in owners:
        docs = docs_of(owner)
        for each in fields(owner):
            known = merged.setdefault(each.name, (_hints(owner)[each.name], each))
            if known[0] != _hints(owner)[each.name] or known[1].default != each.default:
                raise TypeError(f"{owner.__name__}.{each.name} has another type or default than elsewhere.")
            if "help" not in known[1].metadata:
                text = {"help": docs.get(each.name, "")}
                merged[each.name] = (known[0], field(default=each.default, metadata={**each.metadata, **text}))
    declared = [(key, annotation, each) for key, (annotation, each) in merged.items()]
    return make_dataclass(name, declared, kw_only=True, namespace={"__flat__": True})


class Reader:
    """Takes settings out of a flat object that holds those of many classes, and keeps account of what was taken."""

    def __init__(self, values: Any):
        self._values, self._read = vars(values), set[str]()

    def __call__(self, owner: type[T]) -> T:
        """The part of the values that is an `owner`; a field that is not among them keeps its default."""
        names = [each.name for each in fields(owner)]  # type: ignore[arg-type]
        self._read.update(names)
        return owner(**{name: self._values[name] for name in names if name in self._values})

    def read_equal(self, settings: Any) -> None:
        """Count the values that `settings`, made elsewhere, shares as read."""
        self._read.update(name for name, value in vars(settings).items() if self._values.get(name) == value)

    def refuse_unread(self, reader: str, owners: Iterable[type]) -> None:
        """Refuse values other than the default that nobody took.

        Args:
            reader: who should have read them, to begin the message.
            owners: the classes whose fields are looked at.
        """
        declared = {each.name: each for owner in owners for each in fields(owner)}
        unread = [
            name for name, each in declared.items() if name not in self._read and self._values[name] != each.default
        ]
        if unread:
            it = "it" if len(unread) == 1 else "them"
            raise RequestError(f"{reader} takes no {', '.join(unread)}. Leave {it} out.")


def accept_old_name(cls: type, old: str, new: str) -> None:
    """Let a class that defines `old` serve those who ask for `new`, with a warning. For `__init_subclass__`."""
    if old in vars(cls):
        text = f"{cls.__qualname__}.{old} is called {new} now; the old name goes with the next version."
        warnings.warn(text, FutureWarning, stacklevel=3)
        setattr(cls, new, vars(cls)[old])


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def docs_of(owner: type) -> dict[str, str]:
    """The docstring under each field, in `owner` and the dataclasses that it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if "__dataclass_fields__" in vars(base) and "__flat__" not in vars(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            docs |= field_docs(definition)
    return docs


def field_docs(definition: ast.ClassDef) -> dict[str, str]:
    """The docstring under each field of a class, from its source."""
    docs: dict[str, str] = {}
    for declared, text in zip(definition.body, definition.body[1:], strict=False):  # neighbours
        match declared, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs
