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
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(file, error)
        told = f"{what}{'' if line is None else f' (line {line})'}: {reason(error)}"
        raise RequestError(told) from error


def origin(error: BaseException, file: Path) -> str:
    """ "line 7 of mine.py": where in `file`, else in a module beside it, an error arose or passed; "" if nowhere."""
    if (line := _line_in(file, error)) is not None:
        return f"line {line} of {file}"
    folder, package = file.resolve().parent, Path(__file__).resolve().parent.parent
    for each in reversed(frames(error)):
        path = Path(each.filename).resolve()
        is_own = path.is_relative_to(folder) and not path.is_relative_to(package)
        if is_own and "site-packages" not in path.parts and path.is_file():
            return f"line {each.lineno} of {path}"
    return ""


def frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an error was passed on, the errors that led to it first, each from the outermost call to the innermost."""
    earlier = error.__cause__ or error.__context__
    own = list(traceback.extract_tb(error.__traceback__))
    return own if earlier is None else [*frames(earlier), *own]


def reason(error: BaseException) -> str:
    """The error in one line: its type and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _line_in(file: Path, error: BaseException) -> int | None:
    lines = [each.lineno for each in frames(error) if Path(each.filename).resolve() == file.resolve()]
    return lines[-1] if lines else None
