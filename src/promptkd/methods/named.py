"""The named methods, found in the files of this folder, and their settings in one flat class."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from promptkd.errors import RequestError
from promptkd.methods.method import METHODS, Method, NamedMethod
from promptkd.methods.token_method import OBJECTIVES
from promptkd.models.adapters import ADAPTERS
from promptkd.settings import Reader, flat, warn_of_old_name

for _module in iter_modules([str(Path(__file__).parent)]):
    if _module.name != "named":
        import_module(f"promptkd.methods.{_module.name}")


def settings_classes() -> Iterable[type]:
    """The classes of the settings that named methods read: of methods, of objectives' coefficients, of adapters."""
    yield from (method for method in METHODS.values() if isinstance(method, type))
    yield from (coefficients for _, coefficients in OBJECTIVES.values() if coefficients is not None)
    yield from (factory for factory in ADAPTERS.values() if factory is not None)


MethodSettings: Any = flat("MethodSettings", settings_classes())
"""The settings of all methods, each at its default unless given."""


def read_method(name: str, take: Reader) -> Method:
    """The method of that name, from the settings that `take` holds.

    Raises:
        RequestError: if there is no such method, a setting that was given is not read, or some do not go together.
    """
    if name not in METHODS:
        raise RequestError(f"Expected a method of {', '.join(METHODS)}. Got {name!r}.")
    known: Any = METHODS[name]
    if isinstance(known, type) and issubclass(known, NamedMethod):
        method = take(known).build(take)
    else:
        warn_of_old_name(f"A function as METHODS[{name!r}]", "a subclass of NamedMethod (docs/extending.md)")
        method = known(take(MethodSettings))
    take.refuse_unread(name, settings_classes())
    return method.with_settings(take)


def named_method(name: str, settings: Any = None) -> Method:
    """The method of that name.

    Args:
        settings: `MethodSettings`; the method's own defaults if None.

    Raises:
        RequestError: if there is no such method, a setting is out of its range, or the method does not read it.
    """
    return read_method(name, Reader(MethodSettings() if settings is None else settings))
