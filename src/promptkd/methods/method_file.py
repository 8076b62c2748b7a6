"""A method of the user's own out of a Python file: `--method FILE.py:NAME`."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from promptkd.errors import PromptKDError, RequestError
from promptkd.io.python_file import frames, load_python, origin, own_code, python_file, reason
from promptkd.memory import is_out_of_memory
from promptkd.methods.method import METHODS, Method, NamedMethod
from promptkd.objectives.kernels import Objective, token_values
from promptkd.settings import Reader

_EXPECTED = "a Method, a subclass of NamedMethod, or a function that returns a Method"
_COLUMNS = 1000
_AUTOGRAD = str(Path("torch", "autograd"))


def method_of_file(spec: str, settings: Mapping[str, Any], given: Mapping[str, Any], take: Reader) -> Method:
    """The method that FILE.py:NAME is or makes: a `Method`, a `NamedMethod` to be built, or a function to be called.

    Args:
        settings: of the method itself: the fields of a `NamedMethod`, the arguments of a function.
        given: settings of the run that differ from their defaults, of which a `NamedMethod` takes those it has.
        take: gives a `NamedMethod` the settings of further classes, and a method those of its adapter.

    Raises `RequestError` for a file that fails, a name that is no method, and settings that it does not take.
    """
    known = dict(METHODS)
    try:
        found = load_python(spec, _EXPECTED)
    finally:  # a name of its own does not hide a method of that name
        METHODS.clear()
        METHODS.update(known)
    file = python_file(spec)
    if isinstance(found, Method):
        _refuse_unknown(spec, settings, ())
        method: Any = found
    elif isinstance(found, type) and issubclass(found, NamedMethod):
        names = [each.name for each in fields(found)]
        _refuse_unknown(spec, settings, names)
        own = {name: given[name] for name in names if name in given} | dict(settings)
        take.read.update(names)
        with own_code(f"{spec} cannot be built", file):
            method = found(**own).build(take)
    elif callable(found):
        _refuse_unknown(spec, settings, _arguments(found))
        with own_code(f"{spec} cannot be called", file):
            method = found(**settings)
    else:
        method = found
    if not isinstance(method, Method):
        raise RequestError(f"{spec} must be {_EXPECTED} (docs/extending.md). Got {_kind(method)}.")
    if method.objective is not None:
        with own_code(f"{spec} cannot be used", file):
            method.moving.before_step(0.0)  # as the first step does
            _try_objective(method.objective)
    return method


@contextmanager
def failure_told(spec: str) -> Iterator[None]:
    """Turn what the code of FILE.py:NAME raises in the body into a `PromptKDError` with the file and the line.

    So is what torch raises in the backward pass of what it returned, where no line is known. Errors of other code, of
    memory, and those that say what to do are left as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PromptKDError) or is_out_of_memory(error):
            raise
        if place := origin(error, python_file(spec)):
            raise PromptKDError(f"{spec} failed in {place}: {reason(error)}") from error
        if _AUTOGRAD in frames(error)[-1].filename:
            raise PromptKDError(f"The backward pass of what {spec} returned failed: {reason(error)}") from error
        if isinstance(error, TypeError | AttributeError):  # it could not be called, or gave something of another type
            told = f"{spec} could not be used as it is called here: {reason(error)}"
            raise PromptKDError(f"{told}. docs/extending.md says what is expected.") from error
        raise


def _try_objective(objective: Objective) -> None:
    """Compute an objective for made-up logits of three tokens, before any model is loaded.

    Those have enough columns for an objective that takes the largest of them.
    """
    logits = torch.linspace(-1, 1, 3 * _COLUMNS).view(3, _COLUMNS).requires_grad_()
    with torch.enable_grad():
        values = token_values(objective, logits, logits.detach().flip(-1))
    if not values.requires_grad or not values.isfinite().all():
        expected = "An objective gives finite values with a gradient to the student's logits"
        raise RequestError(f"{expected}. Got {values!r} for logits between -1 and 1.")


def _arguments(function: Any) -> list[str] | None:
    """The names of a function's arguments; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.POSITIONAL_ONLY)]


def _refuse_unknown(spec: str, settings: Mapping[str, Any], known: Any) -> None:
    if known is not None and (unknown := [name for name in settings if name not in known]):
        told = f"{spec} takes no {', '.join(unknown)}: its settings are {', '.join(known) or 'none'}"
        raise RequestError(f"{told}. Correct --method_settings.")


def _kind(value: Any) -> str:
    return f"the {type(value).__name__} {value!r:.80}"
