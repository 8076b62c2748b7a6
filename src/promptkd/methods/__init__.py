"""A method of distillation: whose responses, which part of the teacher is trained, what the student minimizes.

Each file holds a method or a family of them, which `METHODS` names, but method.py, method_file.py and token_*.py.
A method of your own is a `Method` with other choices, or with a loss function of its own (docs/extending.md).
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from promptkd.errors import RequestError
from promptkd.methods.method import METHODS, AdaptedMethod, Method, NamedMethod, Step, StudentLoss
from promptkd.methods.token_method import MixedMethod, TokenMethod
from promptkd.methods.token_objectives import OBJECTIVES
from promptkd.models.adapters import ADAPTERS
from promptkd.models.pair import Objective, Pair
from promptkd.settings import Reader, flat, warn_of_old_name

__all__ = ["METHODS", "AdaptedMethod", "Method", "MethodSettings", "MixedMethod", "NamedMethod", "Objective", "Pair"]
__all__ += ["Step", "StudentLoss", "TokenMethod", "named_method", "read_method", "settings_classes"]

for _module in iter_modules(__path__):
    import_module(f"promptkd.methods.{_module.name}")


def settings_classes() -> Iterable[type]:
    """The classes of the settings that named methods read: of methods, of objectives' coefficients, of adapters."""
    yield from (method for method in METHODS.values() if isinstance(method, type))
    yield from (coefficients for _, coefficients in OBJECTIVES.values() if coefficients is not None)
    yield from (factory for factory in ADAPTERS.values() if factory is not None)


MethodSettings: Any = flat("MethodSettings", settings_classes())  # of all methods


def read_method(name: str, take: Reader) -> Method:
    """The method of that name. Raises `RequestError` if there is none, or settings are unread or do not go together."""
    if name not in METHODS:
        raise RequestError(f"Expected a method of {', '.join(METHODS)}, or FILE.py:NAME. Got {name!r}.")
    known: Any = METHODS[name]
    if isinstance(known, type) and issubclass(known, NamedMethod):
        method = take(known).build(take)
    else:
        warn_of_old_name(f"A function as METHODS[{name!r}]", "a subclass of NamedMethod (docs/extending.md)")
        method = known(take(MethodSettings))
    take.refuse_unread(name, settings_classes())
    return method.with_settings(take)


def named_method(name: str, settings: Any = None) -> Method:
    """The method of that name, by `MethodSettings` or its own defaults. Raises `RequestError` as `read_method` does."""
    return read_method(name, Reader(MethodSettings() if settings is None else settings))
