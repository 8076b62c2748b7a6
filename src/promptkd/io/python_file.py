"""Something of the user's own out of a Python file, named FILE.py:NAME."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promptkd.errors import RequestError

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")


def names_python(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:NAME."""
    return _SPEC.fullmatch(spec) is not None


def python_file(spec: str) -> Path:
    """The file of FILE.py:NAME."""
    match = _SPEC.fullmatch(spec)
    assert match is not None
    return Path(match["file"]).expanduser()


def load_python(spec: str, what: str) -> Any:
    """NAME of the file, which is run and may import modules beside it; `what` says in messages what was expected.

    Raises `RequestError` if there is no such file or name, or the file raises.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RequestError(f"Expected {what} as FILE.py:NAME. Got {spec!r}.")
    file, name = python_file(spec), match["name"]
    if not file.is_file():
        raise RequestError(f"Expected {what} in {file}. There is no such file.")
    found = importlib.util.spec_from_file_location(f"promptkd_own_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses and inspect look for it there
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    with own_code(f"{file} cannot be run", file):
        found.loader.exec_module(module)
    if name not in vars(module):
        own = [each for each in vars(module) if not each.startswith("_")]
        raise RequestError(f"{file} has no {name}, which should be {what}. It has {', '.join(own) or 'nothing'}.")
    return vars(module)[name]


@contextmanager
def own_code(what: str, file: Path) -> Iterator[None]:
    """Turn whatever the user's code raises in the body into a `RequestError` that names the line of `file`."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = [
            each
            for each in traceback.extract_tb(error.__traceback__)
            if Path(each.filename).resolve() == file.resolve()
        ]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise RequestError(f"{what}{'' if line is None else f' (line {line})'}: {reason}") from error
