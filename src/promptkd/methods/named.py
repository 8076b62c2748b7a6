"""The named methods, found in the files of this folder, and their settings in one flat class."""

import warnings
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from promptkd.errors import RequestError
from promptkd.methods.method import METHODS, Method, NamedMethod
from promptkd.methods.token_method import OBJECTIVES
from promptkd.models.adapters import ADAPTERS
from promptkd.settings import Reader, flat

for _module in iter_modules([str(Path(__file__).parent)]):
    if _module.name != "named":
        import_module(f"promptkd.methods.{_module.name}")

ADAPTER_SETTINGS: tuple[type, ...] = tuple(factory for factory in ADAPTERS.values() if factory is not None)


def settings_classes() -> Iterable[type]:
    """The classes of the settings that named methods read: of methods, of objectives' coefficients, of adapters."""
    yield from (method for method in METHODS.values() if isinstance(method, type))
    yield from (coefficients for _, coefficients in OBJECTIVES.values() if coefficients is not None)
    yield from ADAPTER_SETTINGS


if TYPE_CHECKING:
    MethodSettings: Any
else:
    MethodSettings = flat("MethodSettings", settings_classes())


def read_method(name: str, take: Reader) -> Method:
    """The method of that name, from settings that `take` gives out.

    Raises:
        RequestError: if there is no such method, or its settings do not go together.
    """
    if name not in METHODS:
        raise RequestError(f"Expected a method of {', '.join(METHODS)}. Got {name!r}.")
    method = METHODS[name]
    if isinstance(method, type) and issubclass(method, NamedMethod):
        return take(method).build(take)
    warnings.warn(
        f"METHODS[{name!r}] is a function; a method is a subclass of NamedMethod now, and functions go with the next "
        "version (docs/extending.md).",
        FutureWarning,
        stacklevel=2,
    )
    make: Any = method
    return make(take(MethodSettings))


def named_method(name: str, settings: Any = None) -> Method:
    """The method of that name.

    Args:
        settings: `MethodSettings`; the method's own defaults if None.

    Raises:
        RequestError: if there is no such method, a setting is out of its range, or the method does not read it.
    """
    take = Reader(MethodSettings() if settings is None else settings)
    method = read_method(name, take)
    take.refuse_unread(name, settings_classes())
    return method
