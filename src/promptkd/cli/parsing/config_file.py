"""YAML configuration files: read with the rules of YAML 1.2, written atomically.

PyYAML follows YAML 1.1, where `2e-5` is text, `no` is false, `010` is 8 and `1:30` is 90. Here `2e-5` is a number, only
true and false are truth values, and numbers are decimal. A duplicate key is an error; no tag makes but plain data.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from promptkd.cli.recipes import recipes
from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.io.files import MIB, read_regular

_MOST_BYTES = MIB
_MOST_VALUES = 10_000  # once aliases are written out: ten lines of aliases to aliases can mean billions
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - not SafeLoader's, which are YAML 1.1's
    yaml_constructors: dict[Any, Any] = {  # noqa: RUF012 - nor do its sets, dates and bytes belong in a configuration
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + name for name in ("null", "str", "seq", "map")))
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _error("expected a mapping", node)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in keys:
                    raise _error(f"duplicate key {key.value!r}", key)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # quotes what YAML 1.2 takes for a number as well as what YAML 1.1 does
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quote_line_breaks(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """YAML counts three more characters than the line feed as line breaks; only double quotes keep them."""
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if {*"\x85\u2028\u2029"} & {*text} else None)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.60} is not a finite number")
    return number


# The core schema of YAML 1.2: how scalars without a tag are resolved, the characters that each may start with, and how
# they are read if not as YAML 1.1 does.
_SCALARS: tuple[tuple[str, str, str, Callable[[str], Any] | None], ...] = (
    ("null", r"(~|null|Null|NULL|)$", "~nN", None),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF", lambda text: {"true": True, "false": False}[text.lower()]),
    ("int", r"[-+]?[0-9]+$", "-+.0123456789", int),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", "-+.0123456789", _finite),
    ("merge", r"<<$", "<", None),
)
for _name, _pattern, _starts, _read in _SCALARS:
    _resolver = (_TAG + _name, re.compile(_pattern), [*_starts, *([""] if _name == "null" else [])])
    _Loader.add_implicit_resolver(*_resolver)
    if _read is not None:
        _Loader.add_constructor(_TAG + _name, lambda loader, node, read=_read: read(loader.construct_scalar(node)))
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(*_resolver)
_Dumper.add_representer(str, _quote_line_breaks)


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """The number of values in `node`, aliases written out. Raises if they are too many, or an alias contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node in counts:
        if (known := counts[node]) is None:
            raise _error("an alias contains itself", node)
        return known
    counts[node] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    count = counts[node] = 1 + sum(_count_values(part, counts) for part in parts)
    if count > _MOST_VALUES:
        raise _error(f"holds more than {_MOST_VALUES} values, its aliases written out", node)
    return count


def parse_yaml(text: str, name: str) -> Any:
    """The plain data in `text`. Raises `RequestError`, with `name` and the line, if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"{name}{where}: not readable as YAML: {error.problem or error.context}.") from error
    except KeyError as error:
        raise RequestError(f"{name}: not readable as YAML: {error} is neither true nor false.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not readable as YAML: {error}.") from error


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a configuration file, with underscores, and their values. Raises `RequestError` if it is unsound.

    A name that is no file is that of a recipe (`promptkd recipe`).
    """
    if path.is_dir() or not path.exists():
        path = recipes().get(str(path), path)
    try:
        text = read_regular(path, most=_MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        told, advice = f"{path}: {error.strerror or error}", "A recipe goes by its name; `promptkd recipe` lists them."
        raise RequestError(f"--config expects a YAML file. {told}. {advice}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--config expects a YAML file in UTF-8. {path}: {error}.") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        came = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RequestError(f"{path}: expected a mapping such as `learning_rate: 2e-5` at the top. Got {came}.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise RequestError(f"{path}: duplicate key {name}, once spelled {key}. Keep one of them.")
        values[name] = value
    return values


def write_config(path: Path, merged: dict[str, Any]) -> None:
    """Write plain data to `path` as YAML that `--config` reads back, atomically."""
    text = "# The configuration of this run. Run the same command with --config and this file to repeat it.\n"
    text += yaml.dump(merged, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    write_atomic(path, text)
