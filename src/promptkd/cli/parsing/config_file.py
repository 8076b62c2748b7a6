"""YAML configuration files: read with the rules of YAML 1.2, written atomically.

PyYAML follows YAML 1.1, where `2e-5` is text, `no` is false, `010` is 8 and `1:30` is 90. Here `2e-5` is a number,
only `true` and `false` are truth values, numbers are decimal, and a key that stands twice is an error. No tag makes
anything but plain data: texts, numbers, truth values, null, lists and mappings.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from promptkd.errors import RequestError
from promptkd.io.atomic import write_atomic
from promptkd.io.files import MIB, read_regular

__all__ = ["parse_yaml", "read_config", "write_config"]

_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_NUMBER_STARTS = list("-+.0123456789")
_MOST_BYTES = MIB
_MOST_VALUES = 10_000
"""Values of a document once its aliases are written out: ten lines of aliases to aliases can mean billions."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - not SafeLoader's, which are YAML 1.1's
    yaml_constructors: dict[Any, Any] = {  # noqa: RUF012 - nor do its sets, dates and bytes belong in a configuration
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq", "map")))
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _written_out(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, _NUMBER_STARTS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
_Loader.add_constructor(
    "tag:yaml.org,2002:bool", lambda loader, node: {"true": True, "false": False}[loader.construct_scalar(node).lower()]
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _finite(loader.construct_scalar(node)))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.60} is no finite number")
    return number


def _written_out(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """How many values `node` holds with its aliases written out. Raises where they are too many, or hold themselves."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node in sizes:
        size = sizes[node]
        if size is None:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands inside of itself", node.start_mark)
        return size
    sizes[node] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    size = sizes[node] = 1 + sum(_written_out(part, sizes) for part in parts)
    if size > _MOST_VALUES:
        raise yaml.constructor.ConstructorError(
            None, None, f"holds more than {_MOST_VALUES} values, its aliases written out", node.start_mark
        )
    return size


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that YAML 1.2 takes for numbers as well as those that YAML 1.1 does."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted_breaks(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """YAML counts three more characters than the line feed as line breaks; only double quotes keep them."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if {*"\x85\u2028\u2029"} & {*text} else None
    )


_Dumper.add_representer(str, _quoted_breaks)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, _NUMBER_STARTS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)


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
    """The keys of a configuration file, with underscores, and their values.

    Raises `RequestError` if the file is missing, is not YAML, is no mapping or holds a key twice.
    """
    try:
        text = read_regular(path, most=_MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"--config expects a YAML file. {path}: {error.strerror or error}.") from error
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
            raise RequestError(f"{path}: {name} stands twice, once as {key}. Keep one of them.")
        values[name] = value
    return values


def write_config(path: Path, merged: dict[str, Any]) -> None:
    """Write plain data to `path` as YAML that `--config` reads back, atomically."""
    text = "# The configuration of this run. Run the same command with --config and this file to repeat it.\n"
    text += yaml.dump(merged, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    write_atomic(path, text)
